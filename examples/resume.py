"""
Train so that the run may be killed at any time: started again, the same command goes on where the last checkpoint was.

    python examples/resume.py
    python examples/resume.py --timesteps 50000 --out runs/resume
"""

import argparse
from pathlib import Path

import gymnasium as gym
from stable_baselines3.common.monitor import Monitor

from sb3_qsm import QSM
from sb3_qsm.common.checkpoint import RunCheckpointCallback, resume


def main() -> None:
    """Start or go on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timesteps", type=int, default=10_000, help="of the whole run")
    parser.add_argument("--save-freq", type=int, default=1_000)
    parser.add_argument("--out", type=Path, default=Path("runs/resume"))
    args = parser.parse_args()

    env = Monitor(gym.make("Pendulum-v1"))
    if (args.out / "checkpoint.zip").exists():
        # Model, replay buffer, random generators and counters
        model = resume(QSM, args.out, env)
        print(f"going on after {model.num_timesteps} steps", flush=True)
    else:
        model = QSM("MlpPolicy", env, seed=0)
        print("a new run", flush=True)

    missing = args.timesteps - model.num_timesteps
    if missing > 0:
        checkpoints = RunCheckpointCallback(save_freq=args.save_freq, folder=args.out)
        model.learn(missing, callback=checkpoints, reset_num_timesteps=False)
        model.save(args.out / "model")
    print(f"done after {model.num_timesteps} steps")


if __name__ == "__main__":
    main()
