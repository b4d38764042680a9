"""
Train one agent and append its evaluations to a CSV: one command for every learning curve that this repository quotes.

    python benchmarks/learning_curve.py --env HalfCheetah-v5 --timesteps 60000 --seed 0 --out benchmarks/results/learning

The row of an evaluation is written when it is made, so that a killed run leaves its curve so far. A finished curve is not
run again.
"""

import argparse
import csv
import importlib.metadata
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import stable_baselines3
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_qsm import QSM

#: Named settings that the comparison of defaults uses, besides what --kwargs gives
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": QSM.paper_hyperparameters(),
    # FlowRL's QSM (arXiv 2603.27450), written out so that it stays what it is when the defaults move
    "flowrl": {
        "score_target": "noised",
        "diffusion_steps": 20,
        "noise_schedule": "cosine",
        "sampler": "ddpm_x0",
        "temperature": 0.1,
        "q_grad_clip": None,
        "gradient_critic": "target",
        "critic_reduction": "mean",
        "target_policy_noise": 0.0,
        "exploration_initial_eps": 0.0,
        "policy_kwargs": {"critic_layer_norm": False},
    },
}


class EvaluateToCsv(BaseCallback):
    """
    Evaluate every ``freq`` steps on an environment of its own, sampled and deterministic, and append a row to a CSV.

    :param env_id: Environment
    :param path: CSV file
    :param run: Columns that are the same for the whole run
    :param freq: Environment steps between evaluations
    :param episodes: Episodes of an evaluation, for each of the two ways to act
    :param seed: Seed of the evaluation environment
    """

    def __init__(self, env_id: str, path: Path, run: dict[str, Any], freq: int, episodes: int, seed: int) -> None:
        super().__init__()
        self.env_id, self.path, self.run, self.freq, self.episodes, self.seed = env_id, path, run, freq, episodes, seed
        self.eval_seconds = 0.0

    def _on_training_start(self) -> None:
        self.eval_env = Monitor(gym.make(self.env_id))
        self.start = time.perf_counter()

    def _on_step(self) -> bool:
        if self.num_timesteps % self.freq == 0:
            self.evaluate()
        return True

    def evaluate(self) -> None:
        begin = time.perf_counter()
        train_seconds = begin - self.start - self.eval_seconds
        row = {**self.run, "timesteps": self.num_timesteps, "train_seconds": round(train_seconds, 1)}
        # The evaluation must not change the run: its sampled actions come from a saved and restored generator
        states = th.get_rng_state(), np.random.get_state()
        th.manual_seed(self.seed)
        for name, deterministic in (("sampled", False), ("deterministic", True)):
            self.eval_env.reset(seed=self.seed)
            returns, _ = evaluate_policy(
                self.model, self.eval_env, self.episodes, deterministic=deterministic, return_episode_rewards=True
            )
            row[f"{name}_mean"] = round(float(np.mean(returns)), 3)
            row[f"{name}_std"] = round(float(np.std(returns)), 3)
        th.set_rng_state(states[0])
        np.random.set_state(states[1])
        spread = self.model._action_std() if isinstance(self.model, QSM) else None
        row["action_std"] = round(spread, 4) if spread is not None else ""
        for key in ("q_mean", "q_grad", "action_saturation", "critic_loss", "actor_loss"):
            value = self.model.logger.name_to_value.get(f"train/{key}")
            row[key] = round(float(value), 5) if value is not None else ""
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(row))
            if new:
                writer.writeheader()
            writer.writerow(row)
        print(row, flush=True)
        self.eval_seconds += time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algo", choices=["qsm", "sac", "td3"], default="qsm")
    parser.add_argument("--env", required=True)
    parser.add_argument("--timesteps", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="default", help="named setting of QSM")
    parser.add_argument("--kwargs", type=json.loads, default={}, help="further constructor arguments, as JSON")
    parser.add_argument("--label", help="name of the setting in the CSV; by default the preset")
    parser.add_argument("--eval-freq", type=int, default=5000)
    parser.add_argument("--eval-episodes", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True, help="folder of the CSV")
    parser.add_argument("--save", action="store_true", help="save the trained model beside the CSV")
    args = parser.parse_args()

    th.set_num_threads(1)
    label = args.label or args.preset
    path = args.out / f"{args.algo}-{label}-{args.env.replace('/', '_')}-{args.seed}.csv"
    if path.exists():
        with path.open() as file:
            if [row["timesteps"] for row in csv.DictReader(file)][-1:] == [str(args.timesteps)]:
                print(f"{path} is finished")
                return
        path.unlink()
    args.out.mkdir(parents=True, exist_ok=True)

    algo = {"qsm": QSM, "sac": stable_baselines3.SAC, "td3": stable_baselines3.TD3}[args.algo]
    kwargs = {**(PRESETS[args.preset] if args.algo == "qsm" else {}), **args.kwargs}
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    run = {
        "algo": args.algo,
        "setting": label,
        "env": args.env,
        "seed": args.seed,
        "eval_episodes": args.eval_episodes,
        "commit": commit,
        "torch": th.__version__,
        "stable_baselines3": stable_baselines3.__version__,
        "gymnasium": gym.__version__,
        "mujoco": importlib.metadata.version("mujoco"),
        "cpu": platform.machine(),
        "command": "python " + " ".join(sys.argv),
    }
    model = algo("MlpPolicy", gym.make(args.env), seed=args.seed, device="cpu", **kwargs)
    callback = EvaluateToCsv(args.env, path, run, args.eval_freq, args.eval_episodes, seed=10_000 + args.seed)
    model.learn(args.timesteps, callback=callback, log_interval=10**9)
    if args.timesteps % args.eval_freq:
        callback.evaluate()
    if args.save:
        model.save(path.with_suffix(".zip"))


if __name__ == "__main__":
    main()
