"""
Train DDiffPG where two routes lead to a goal, close one of them, and take the other without training again.

    python examples/replanning.py
    python examples/replanning.py --timesteps 40000 --seed 1

An agent that keeps to its mode runs into the closed gate. This one notices that it stands still, and goes on in another mode.
"""

import argparse

import gymnasium as gym
import numpy as np

import sb3_qsm.envs  # noqa: F401  registers the environments
from sb3_qsm import DDiffPG

ENV = "sb3_qsm/PointMaze_TwoRoutes-v0"


def replan(model: DDiffPG, env: gym.Env, mode: int, patience: int = 8, seed: int | None = None) -> tuple[bool, list[int]]:
    """
    Play an episode in a mode, and go on in the next one whenever the agent has not come far in some steps.

    :param model: Trained model
    :param env: Environment whose observation begins with a position, shape ``(2,)``
    :param mode: Mode to begin with
    :param patience: Number of steps
    :param seed: Seed of the environment
    :return: Whether the episode succeeded, and the modes that were tried
    """
    observation, _ = env.reset(seed=seed)
    path, tried, over = [observation], [mode], False
    while not over:
        action, _ = model.predict(observation, mode=tried[-1])
        observation, _, terminated, truncated, info = env.step(action)
        path.append(observation)
        over = terminated or truncated
        if len(path) > patience and np.linalg.norm((path[-1] - path[-1 - patience])[:2]) < 0.15:
            tried.append((tried[-1] + 1) % len(model.modes))
            path = [observation]
    return info["success"], tried


def main() -> None:
    """Train, close each route in turn, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timesteps", type=int, default=30_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--episodes", type=int, default=20)
    args = parser.parse_args()

    env = gym.make(ENV)
    kwargs = {"position": [0, 1], "target_action_steps": 5, "policy_kwargs": {"net_arch": [128, 128]}}
    model = DDiffPG("MlpPolicy", env, seed=args.seed, device="cpu", **kwargs).learn(args.timesteps)
    print(f"{len(model.modes)} modes after {args.timesteps} steps")
    for mode, known in enumerate(model.modes):
        x, y = known.trajectory[len(known.trajectory) // 2]
        print(f"  mode {mode}: {known.size} successes, halfway at ({x:.2f}, {y:.2f})")
    for route in (0, 1) if model.modes else ():
        blocked = gym.make(ENV, blocked=[route])
        for mode in range(len(model.modes)):
            # So patient that it never changes
            for patience, name in ((10**6, "that mode alone"), (8, "replanning")):
                wins = [replan(model, blocked, mode, patience, seed)[0] for seed in range(args.episodes)]
                print(f"route {route} closed, mode {mode}, {name}: success {np.mean(wins):.2f}")


if __name__ == "__main__":
    main()
