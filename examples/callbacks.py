"""
Evaluate and save while training, then read what was written and draw the policy.

    pip install "sb3-qsm[plots]"
    python examples/callbacks.py
    python examples/callbacks.py --timesteps 20000 --out runs/callbacks
"""

import argparse
from pathlib import Path

import gymnasium as gym
import numpy as np
from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback
from stable_baselines3.common.monitor import Monitor, load_results

from sb3_qsm import QSM
from sb3_qsm.plots import plot_action_landscape


def main() -> None:
    """Train, print the curves and draw the best policy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timesteps", type=int, default=5_000)
    parser.add_argument("--out", type=Path, default=Path("runs/callbacks"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    every = max(args.timesteps // 4, 1)
    env = Monitor(gym.make("Pendulum-v1"), str(args.out / "monitor.csv"))
    # Evaluations have an environment of their own
    eval_env = Monitor(gym.make("Pendulum-v1"))
    evaluate = EvalCallback(
        eval_env, eval_freq=every, n_eval_episodes=3, log_path=str(args.out), best_model_save_path=str(args.out), verbose=0
    )
    save = CheckpointCallback(save_freq=every, save_path=str(args.out / "checkpoints"), name_prefix="qsm")
    QSM("MlpPolicy", env, seed=0).learn(args.timesteps, callback=[evaluate, save])

    evaluations = np.load(args.out / "evaluations.npz")
    for step, returns in zip(evaluations["timesteps"], evaluations["results"], strict=True):
        print(f"step {step}: return {returns.mean():.0f} ± {returns.std():.0f}")
    episodes = load_results(str(args.out))  # a pandas.DataFrame with a row for each training episode
    last = f", the last return {episodes['r'].iloc[-1]:.0f}" if len(episodes) else ""
    print(f"{len(episodes)} training episodes{last}")

    best = QSM.load(args.out / "best_model")
    observation, _ = eval_env.reset(seed=0)
    plot_action_landscape(best, observation).savefig(args.out / "actions.png")


if __name__ == "__main__":
    main()
