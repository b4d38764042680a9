"""Mazes of gymnasium-robotics with several goals or routes."""

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from sb3_qsm.common.checks import check_integer, check_number
from sb3_qsm.envs.plane import Box, FloatArray, PlaneEnv, check_routes

Observation = npt.NDArray[np.float32]
MazeMap = Sequence[Sequence[int | str]]

#: Maps as in gymnasium-robotics: 1 wall, 0 free, "r" start, "g" goal; gates are cells (row, column), one for each route
MAZES: dict[str, dict[str, Any]] = {
    "TwoRoutes": {
        "maze_map": [
            [1, 1, 1, 1, 1],
            [1, 0, 0, 0, 1],
            [1, "g", 1, "r", 1],
            [1, 0, 0, 0, 1],
            [1, 1, 1, 1, 1],
        ],
        "gates": [(1, 2), (3, 2)],
    },
    "TwoGoals": {
        "maze_map": [
            [1, 1, 1, 1, 1, 1, 1],
            [1, "g", 0, 0, 0, "g", 1],
            [1, 1, 1, "r", 1, 1, 1],
            [1, 1, 1, 1, 1, 1, 1],
        ],
    },
    # A cross: a ring round it would give every goal several routes, and so more modes than goals
    "FourGoals": {
        "maze_map": [
            [1, 1, 1, 1, 1, 1, 1],
            [1, 1, 1, "g", 1, 1, 1],
            [1, 1, 1, 0, 1, 1, 1],
            [1, "g", 0, "r", 0, "g", 1],
            [1, 1, 1, 0, 1, 1, 1],
            [1, 1, 1, "g", 1, 1, 1],
            [1, 1, 1, 1, 1, 1, 1],
        ],
    },
}


class MazeEnv(PlaneEnv):
    """
    MuJoCo's ball ("point") or ant of gymnasium-robotics in a maze with any number of goals. The reward is 1 at a goal, where
    the episode ends, and else 0. The first two entries of the observation are the position; the others are the agent's
    velocities, and with the ant its posture. It is not told where the goals are.

    :param maze_map: Rows of cells: 1 wall, 0 free, "r" start, "g" goal
    :param gates: One cell (row, column) for each route
    :param agent: ``"point"`` or ``"ant"``
    :param action_repeat: Steps of the simulation for one action; by default 5 for the point, of 0.01 s each, and 1 for the
        ant, of 0.05 s
    :param goal_radius: Distance at which a goal is reached, in cells
    :param start_noise: Largest distance of the start from the centre of its cell along each axis, in cells; at most 0.4
    :param blocked: Indices of routes whose gate is a wall
    :param render_mode: ``"rgb_array"`` or None
    :raises ImportError: if gymnasium-robotics is not installed
    :raises ValueError: if the map or another argument makes no sense
    """

    def __init__(
        self,
        maze_map: MazeMap,
        gates: Sequence[tuple[int, int]] = (),
        agent: str = "point",
        action_repeat: int | None = None,
        goal_radius: float = 0.45,
        start_noise: float = 0.1,
        blocked: Sequence[int] = (),
        render_mode: str | None = None,
    ) -> None:
        if agent not in ("point", "ant"):
            raise ValueError(f"agent must be 'point' or 'ant', got {agent!r}")
        if action_repeat is not None:
            check_integer("action_repeat", action_repeat, 1)
        check_number("goal_radius", goal_radius, 0.0, strict=True)
        # Beyond half a cell the start might be in a wall
        check_number("start_noise", start_noise, 0.0, high=0.4)
        _check_map(maze_map, gates)
        closed = [gates[route] for route in check_routes(blocked, len(gates))]
        maze_map = [
            [1 if (row, column) in closed else cell for column, cell in enumerate(cells)] for row, cells in enumerate(maze_map)
        ]
        self.cell = 1.0 if agent == "point" else 4.0
        self._agent, starts, goals = _make_agent(agent, maze_map, self.cell)
        self._starts = np.asarray(starts)
        self.action_repeat = action_repeat or (5 if agent == "point" else 1)
        self.start_noise = start_noise * self.cell
        self.agent_radius = 0.1 * self.cell
        height, width = len(maze_map) * self.cell, len(maze_map[0]) * self.cell

        def box(row: int, column: int) -> Box:
            x, y = column * self.cell - width / 2, height / 2 - row * self.cell
            return (x, y - self.cell, x + self.cell, y)

        walls = [box(i, j) for i, cells in enumerate(maze_map) for j, cell in enumerate(cells) if cell == 1]
        bounds = (-width / 2, -height / 2, width / 2, height / 2)
        # The closed gates are walls already
        super().__init__(goals, goal_radius * self.cell, bounds, walls, [box(*gate) for gate in gates], (), render_mode)
        self.blocked = tuple(blocked)
        self.observation_space = spaces.Box(-np.inf, np.inf, self._agent.observation_space.shape, np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, self._agent.action_space.shape, np.float32)

    @property
    def position(self) -> FloatArray:
        """Where the agent is, shape ``(2,)``."""
        return np.asarray(self._agent.data.qpos[:2], dtype=np.float64)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Observation, dict[str, Any]]:
        """
        :param seed: Seed of the starts
        :param options: Not used
        :return: First observation and info
        """
        super().reset(seed=seed, options=options)
        start = self._starts[self.np_random.integers(len(self._starts))]
        self._agent.init_qpos[:2] = start + self.np_random.uniform(-self.start_noise, self.start_noise, 2)
        observation, _ = self._agent.reset(seed=seed)
        return observation.astype(np.float32), self._start_path()

    def step(self, action: npt.NDArray[np.float32]) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """
        :param action: Forces or torques
        :return: Observation, reward, whether a goal is reached, False, info
        """
        for _ in range(self.action_repeat):
            observation = self._agent.step(action)[0]
        info = self._follow_path()
        return observation.astype(np.float32), float(info["success"]), info["success"], False, info

    def close(self) -> None:
        """Free what the simulation holds."""
        self._agent.close()


def _check_map(maze_map: MazeMap, gates: Sequence[tuple[int, int]]) -> None:
    if len({len(cells) for cells in maze_map}) != 1:
        raise ValueError(f"maze_map must be rows of one length, got lengths {[len(cells) for cells in maze_map]}")
    cells = [cell for row in maze_map for cell in row]
    unknown = sorted({repr(cell) for cell in cells if cell not in (0, 1, "r", "g")})
    if unknown:
        raise ValueError(f"maze_map may hold 1 (wall), 0 (free), 'r' (start) and 'g' (goal), got {', '.join(unknown)}")
    for cell, what in (("r", "start"), ("g", "goal")):
        if cell not in cells:
            raise ValueError(f"maze_map has no {what}, a cell {cell!r}")
    for row, column in gates:
        if not (0 <= row < len(maze_map) and 0 <= column < len(maze_map[0])) or maze_map[row][column] != 0:
            raise ValueError(f"gates must be free cells (row, column) of the map, got {(row, column)}")


def _make_agent(agent: str, maze_map: MazeMap, cell: float) -> tuple[Any, list[FloatArray], list[FloatArray]]:
    """The simulation, the starts and the goals."""
    try:
        modules: list[Any] = [
            importlib.import_module(name)
            for name in (
                "gymnasium_robotics.envs.maze.maze_v4",
                "gymnasium_robotics.envs.maze.point",
                "gymnasium.envs.mujoco.ant_v5",
            )
        ]
    except ImportError as error:
        raise ImportError(f'the mazes need pip install "sb3-qsm[modes]": {error}') from error
    maze_v4, point, ant = modules

    if agent == "point":
        xml = Path(point.__file__).parents[1] / "assets" / "point" / "point.xml"
        make: Any = point.PointEnv
        kwargs: dict[str, Any] = {}
    else:
        xml = Path(ant.__file__).parent / "assets" / "ant.xml"
        make = ant.AntEnv
        # The observation of D4RL's AntMaze: positions and velocities
        kwargs = {
            "exclude_current_positions_from_observation": False,
            "include_cfrc_ext_in_observation": False,
            "reset_noise_scale": 0.0,
        }
    maze, file = maze_v4.Maze.make_maze(str(xml), maze_map, cell, 0.4 if agent == "point" else 0.5)
    try:
        return make(xml_file=file, **kwargs), maze.unique_reset_locations, maze.unique_goal_locations
    finally:
        # gymnasium-robotics leaves it in the folder for temporary files
        os.remove(file)
