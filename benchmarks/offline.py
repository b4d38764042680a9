"""
Learning from data of mixed quality: behaviour cloning, offline Q-score matching, and going on online.

    python benchmarks/offline.py --seeds 0 1 2 --kwargs '{"compile": true}' --out benchmarks/results/offline

For each seed an agent is trained online for ``--collect`` steps, and everything it did on the way, from random actions to its
last ones, is the dataset. Two new agents are pretrained on it: one clones it, one also follows its critic. The latter then
goes on online with batches of both kinds of data. A row with the return of ``--eval-episodes`` episodes is written for each of
them every ``--eval-freq`` steps.
"""

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_qsm import QSM


class Recorder:
    """
    Evaluate and write a row.

    :param path: The CSV
    :param env: Name of the environment
    :param seed: Seed of the runs
    :param episodes: Episodes of an evaluation
    """

    def __init__(self, path: Path, env: str, seed: int, episodes: int) -> None:
        self.seed = seed
        self.episodes = episodes
        self.eval_env = Monitor(gym.make(env))
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("w", newline="")
        self.writer = csv.writer(self.file)
        self.writer.writerow(["seed", "phase", "step", "return", "std"])

    def write(self, phase: str, step: int, returns: list[float]) -> None:
        """
        :param phase: What is evaluated
        :param step: Gradient or environment step
        :param returns: Returns of the episodes
        """
        row = [self.seed, phase, step, f"{np.mean(returns):.2f}", f"{np.std(returns):.2f}"]
        self.writer.writerow(row)
        self.file.flush()
        print(*row, flush=True)

    def evaluate(self, phase: str, step: int, model: QSM) -> None:
        """
        :param phase: What is evaluated
        :param step: Gradient or environment step
        :param model: The agent
        """
        self.eval_env.reset(seed=1000 + self.seed)
        returns, _ = evaluate_policy(model, self.eval_env, self.episodes, return_episode_rewards=True)
        self.write(phase, step, returns)


class Evaluate(BaseCallback):
    """
    Evaluate an agent while it learns online.

    :param recorder: What writes the rows
    :param phase: What is evaluated
    :param freq: Environment steps between evaluations
    """

    def __init__(self, recorder: Recorder, phase: str, freq: int) -> None:
        super().__init__()
        self.recorder = recorder
        self.phase = phase
        self.freq = freq

    def _on_step(self) -> bool:
        if self.num_timesteps % self.freq == 0:
            self.recorder.evaluate(self.phase, self.num_timesteps, self.model)
        return True


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="InvertedDoublePendulum-v5")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--collect", type=int, default=10_000, help="environment steps of the dataset")
    parser.add_argument("--pretrain", type=int, default=8_000, help="gradient steps on the dataset")
    parser.add_argument("--online", type=int, default=10_000, help="environment steps afterwards")
    parser.add_argument("--behaviour", type=float, default=0.7, help="weight of the behaviour term in offline QSM")
    parser.add_argument("--eval-freq", type=int, default=2000)
    parser.add_argument("--eval-episodes", type=int, default=10)
    parser.add_argument("--kwargs", type=json.loads, default={}, help="further constructor arguments, as JSON")
    parser.add_argument("--out", type=Path, required=True, help="folder of the CSVs")
    args = parser.parse_args()

    for seed in args.seeds:
        recorder = Recorder(args.out / f"{args.env}_{seed}.csv", args.env, seed, args.eval_episodes)

        def make(seed: int = seed, **kwargs: Any) -> QSM:
            return QSM("MlpPolicy", Monitor(gym.make(args.env)), seed=seed, **{**args.kwargs, **kwargs})

        collector = make().learn(args.collect)
        recorder.write("data", args.collect, collector.get_env().env_method("get_episode_rewards")[0])
        recorder.evaluate("collector", args.collect, collector)

        found = {}
        for phase, behaviour in (("cloning", 1.0), ("offline", args.behaviour)):
            # It acts by its policy from the first step on
            model = found[phase] = make(seed + 1000, learning_starts=0, exploration_initial_eps=0.0)
            model.load_offline(collector.replay_buffer, behaviour=args.behaviour, behaviour_decay_steps=args.online)
            for step in range(0, args.pretrain, args.eval_freq):
                model.pretrain(min(args.eval_freq, args.pretrain - step), behaviour=behaviour)
                recorder.evaluate(phase, min(step + args.eval_freq, args.pretrain), model)
        found["offline"].learn(args.online, callback=Evaluate(recorder, "online", args.eval_freq))


if __name__ == "__main__":
    main()
