"""
Learn from pictures with CnnPolicy.

    python examples/images.py
    python examples/images.py --timesteps 10000

A replay buffer of pictures is large: here 64 x 64 x 3 bytes for an observation, and as many for the next one.
"""

import argparse

import gymnasium as gym
import numpy as np
from gymnasium.wrappers import AddRenderObservation, TransformObservation
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

import sb3_qsm.envs  # noqa: F401  registers the environments
from sb3_qsm import QSM


def make_env() -> gym.Env:
    """A point between four goals, seen from above instead of told its position."""
    env = AddRenderObservation(gym.make("sb3_qsm/NGoalPoint-v0", render_mode="rgb_array"), render_only=True)
    space = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)
    return Monitor(TransformObservation(env, lambda picture: picture[::4, ::4], space))


def main() -> None:
    """Train and print the return."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timesteps", type=int, default=3_000)
    args = parser.parse_args()

    env = make_env()
    model = QSM(
        "CnnPolicy",
        env,
        buffer_size=10_000,
        batch_size=32,
        # One convolutional network for actor and critics, trained by the actor's loss
        policy_kwargs={"share_features_extractor": True, "net_arch": [64, 64]},
        seed=0,
    )
    model.learn(args.timesteps)
    mean, std = evaluate_policy(model, env, n_eval_episodes=10)
    print(f"pictures of {model.observation_space.shape}, return {mean:.2f} ± {std:.2f} after {args.timesteps} steps")


if __name__ == "__main__":
    main()
