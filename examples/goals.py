"""
Reach goals with hindsight experience replay: dictionaries of observations, MultiInputPolicy and HerReplayBuffer.

    python examples/goals.py
    python examples/goals.py --timesteps 20000

The task is Stable-Baselines3's: flip each of some bits until all are one. A step pays -1 until they are.
"""

import argparse

import numpy as np
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_qsm import QSM


def main() -> None:
    """Train with relabelled goals and print the share of episodes that reach theirs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timesteps", type=int, default=5_000)
    args = parser.parse_args()

    # A bit is flipped where its component of the action is positive
    env = Monitor(BitFlippingEnv(n_bits=5, continuous=True, max_steps=10))
    model = QSM(
        "MultiInputPolicy",
        env,
        replay_buffer_class=HerReplayBuffer,
        # Each transition is replayed with its own goal and, four times as often, with one that was reached later
        replay_buffer_kwargs={"n_sampled_goal": 4, "goal_selection_strategy": "future"},
        gamma=0.95,
        seed=0,
    )
    model.learn(args.timesteps)

    lengths = evaluate_policy(model, env, n_eval_episodes=50, return_episode_rewards=True)[1]
    # An episode that is shorter than the limit has reached its goal
    print(f"goal reached in {np.mean(np.array(lengths) < 10):.0%} of 50 episodes after {args.timesteps} steps")


if __name__ == "__main__":
    main()
