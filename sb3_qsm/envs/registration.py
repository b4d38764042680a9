"""Names of the environments."""

import gymnasium as gym

from sb3_qsm.envs.maze import MAZES

#: Longest episodes of the mazes, in actions
MAZE_STEPS = {"Point": 60, "Ant": 500}


def register_envs() -> None:
    """Register the environments with gymnasium; those that are registered stay as they are."""
    entries = {
        "NGoalPoint": ("point:NGoalPointEnv", 15, {}),
        "Corridor": ("point:CorridorEnv", 60, {}),
        **{
            f"{agent}Maze_{maze}": ("maze:MazeEnv", steps, {"agent": agent.lower(), **layout})
            for agent, steps in MAZE_STEPS.items()
            for maze, layout in MAZES.items()
        },
    }
    for name, (entry_point, max_episode_steps, kwargs) in entries.items():
        env_id = f"sb3_qsm/{name}-v0"
        if env_id not in gym.registry:
            gym.register(env_id, f"sb3_qsm.envs.{entry_point}", max_episode_steps=max_episode_steps, kwargs=kwargs)
