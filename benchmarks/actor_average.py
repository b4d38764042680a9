"""
Deterministic returns of the actor beside those of moving averages of its weights, in one training of QSM's defaults.

    python benchmarks/actor_average.py --env Walker2d-v5 --timesteps 100000 --seed 0 --compile --out runs/average

At every evaluation the actor and each average play the same ten episodes. Rows are written to ``ENV-seedSEED.csv``.
"""

import argparse
import csv
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch as th
from cells import make_env
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_qsm import QSM
from sb3_qsm.common.gradient_step import average_weight


class EvaluateAverages(BaseCallback):
    """
    Keep the averages and write what they return.

    :param args: Arguments of the command
    """

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.args = args
        self.path = args.out / f"{args.env.replace('/', '-')}-seed{args.seed}.csv"

    def _on_training_start(self) -> None:
        self.env = make_vec_env(partial(make_env, self.args.env), 10, seed=10_000)
        self.weights = list(self.model.actor.parameters())
        self.averages = {tau: [weight.detach().clone() for weight in self.weights] for tau in self.args.taus}

    @th.no_grad()
    def _on_step(self) -> bool:
        for tau, average in self.averages.items():
            # Called before the update of this step
            th._foreach_lerp_(average, self.weights, average_weight(tau, self.model._n_updates))
        if self.num_timesteps % self.args.eval_freq == 0:
            own = [weight.clone() for weight in self.weights]
            row = {"timesteps": self.num_timesteps}
            for name, weights in {"actor": own, **self.averages}.items():
                th._foreach_copy_(self.weights, weights)
                self.env.seed(10_000)
                returns, _ = evaluate_policy(self.model, self.env, 10, return_episode_rewards=True)
                row |= {f"{name}_mean": f"{np.mean(returns):.1f}", f"{name}_std": f"{np.std(returns):.1f}"}
            th._foreach_copy_(self.weights, own)
            first = not self.path.exists()
            with self.path.open("a", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, row, lineterminator="\n")
                if first:
                    writer.writeheader()
                writer.writerow(row)
            print(row, flush=True)
        return True


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Run the command.

    :param arguments: Command line; by default that of the process
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", required=True)
    parser.add_argument("--timesteps", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--taus", type=float, nargs="+", default=[0.005, 0.001, 0.0003])
    parser.add_argument("--eval-freq", type=int, default=2500)
    parser.add_argument("--compile", action="store_true", help="compile the updates")
    parser.add_argument("--out", type=Path, required=True, help="folder of the CSV")
    args = parser.parse_args(arguments)
    th.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    callback = EvaluateAverages(args)
    if callback.path.exists():
        parser.error(f"{callback.path} exists")
    # The averages here are the callback's
    model = QSM("MlpPolicy", make_env(args.env), seed=args.seed, device="cpu", compile=args.compile, actor_ema=False)
    model.learn(args.timesteps, callback)


if __name__ == "__main__":
    main()
