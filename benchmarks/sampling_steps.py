"""
Return of trained models that act in fewer steps.

    python benchmarks/sampling_steps.py --out benchmarks/results/export MODEL.zip MODEL.safetensors ... --env Hopper-v5

Every setting plays the same episodes: same seeds of the environment and of the policy's draws. ``sampling_steps`` is empty
where the model acts with the whole chain of its own sampler. Rows are appended to ``sampling_steps.csv``.
"""

import argparse
import csv
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_qsm import QSM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL")
    parser.add_argument("--env", required=True)
    parser.add_argument("--steps", type=int, nargs="*", help="values of sampling_steps; by default 1, 2, 3, 5 and T")
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder of the CSV")
    args = parser.parse_args()
    th.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "sampling_steps.csv"

    env = Monitor(gym.make(args.env))
    for file in args.models:
        load = QSM.load_safe if file.suffix == ".safetensors" else QSM.load
        model = load(file, device="cpu", buffer_size=1)
        steps = args.steps or sorted({1, 2, 3, 5, model.diffusion_steps})
        for sampling_steps in [None, *(n for n in steps if n <= model.diffusion_steps)]:
            model.actor.sampling_steps = sampling_steps
            for deterministic in (False, True):
                th.manual_seed(args.seed)
                env.reset(seed=args.seed)
                returns, _ = evaluate_policy(
                    model, env, args.episodes, deterministic=deterministic, return_episode_rewards=True
                )
                row = {
                    "model": file.name,
                    "env": args.env,
                    "timesteps": model.num_timesteps,
                    "diffusion_steps": model.diffusion_steps,
                    "sampler": model.sampler,
                    "sampling_steps": "" if sampling_steps is None else sampling_steps,
                    "deterministic": deterministic,
                    "episodes": args.episodes,
                    "mean": round(float(np.mean(returns)), 2),
                    "std": round(float(np.std(returns)), 2),
                }
                print(row, flush=True)
                new = not path.exists()
                with path.open("a", newline="") as out:
                    writer = csv.DictWriter(out, fieldnames=list(row))
                    if new:
                        writer.writeheader()
                    writer.writerow(row)


if __name__ == "__main__":
    main()
