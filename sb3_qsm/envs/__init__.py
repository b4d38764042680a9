"""
Small environments in the plane with several equally good ways to succeed, registered with gymnasium on import:

- ``sb3_qsm/NGoalPoint-v0``: a point among n goals on a circle
- ``sb3_qsm/Corridor-v0``: a point in a corridor, with two ways round an obstacle
- ``sb3_qsm/PointMaze_TwoRoutes-v0``, ``..._TwoGoals-v0``, ``..._FourGoals-v0``, and the same with ``AntMaze``: MuJoCo's ball
  and ant of gymnasium-robotics in mazes with sparse reward (``pip install "sb3-qsm[modes]"``)
"""

from sb3_qsm.envs.maze import MAZES, MazeEnv
from sb3_qsm.envs.plane import PlaneEnv
from sb3_qsm.envs.point import CorridorEnv, NGoalPointEnv, PointEnv
from sb3_qsm.envs.registration import register_envs

__all__ = ["MAZES", "CorridorEnv", "MazeEnv", "NGoalPointEnv", "PlaneEnv", "PointEnv", "register_envs"]

register_envs()
