"""
Write an environment, check it, and train QSM on it.

    python examples/own_environment.py
    python examples/own_environment.py --timesteps 10000

What QSM needs: actions in a bounded Box, and an observation space of Stable-Baselines3.
"""

import argparse

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_qsm import QSM


class Thermostat(gym.Env):
    """Keep a room, which loses warmth to the outside, at the wanted temperature by heating and cooling."""

    def __init__(self) -> None:
        # The room, the wanted temperature and the outside, in tens of degrees
        self.observation_space = spaces.Box(-5.0, 5.0, (3,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)  # seeds self.np_random
        self.state = self.np_random.uniform([0.0, 1.5, -1.0], [3.0, 2.5, 3.0]).astype(np.float32)
        return self.state.copy(), {}

    def step(self, action):
        room, wanted, outside = self.state
        self.state[0] = np.clip(room + 0.2 * (outside - room) + 0.8 * action[0], -5.0, 5.0)
        reward = -float(abs(self.state[0] - wanted)) - 0.05 * float(action[0] ** 2)
        # Nothing ends an episode but its time, which TimeLimit reports as truncated: such ends are bootstrapped
        return self.state.copy(), reward, False, False, {}


def main() -> None:
    """Check the environment, train, and compare with the untrained policy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timesteps", type=int, default=5_000)
    args = parser.parse_args()

    check_env(Thermostat())
    env = Monitor(TimeLimit(Thermostat(), max_episode_steps=50))
    model = QSM("MlpPolicy", env, seed=0)
    before, _ = evaluate_policy(model, env, n_eval_episodes=10)
    model.learn(args.timesteps)
    after, _ = evaluate_policy(model, env, n_eval_episodes=10)
    print(f"return before training {before:.1f}, after {args.timesteps} steps {after:.1f}")


if __name__ == "__main__":
    main()
