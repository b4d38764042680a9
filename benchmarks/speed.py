"""
Gradient steps and actions per second of QSM beside SB3's SAC, measured in one process, interleaved, on one thread.

    python benchmarks/speed.py --out benchmarks/results/speed

Every round times each subject once; the table gives medians and quartiles over the rounds, and the ratio to SAC of the
medians. The replay buffer holds random numbers of HalfCheetah-v5's shapes: the cost of an update does not depend on them.
"""

import argparse
import csv
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_qsm import QSM
from sb3_qsm.diffusion.linear import prefers_onednn

TRANSITIONS = 20_000


def make_model(algo: type[OffPolicyAlgorithm], **kwargs: Any) -> OffPolicyAlgorithm:
    """
    A model with a full replay buffer, ready for ``train``.

    :param algo: Algorithm
    :param kwargs: Further constructor arguments
    :return: The model
    """
    model = algo("MlpPolicy", gym.make("HalfCheetah-v5"), seed=0, device="cpu", buffer_size=TRANSITIONS, **kwargs)
    model.set_logger(Logger(None, []))
    rng, buffer = np.random.default_rng(0), model.replay_buffer
    buffer.observations[:] = rng.normal(size=buffer.observations.shape)
    buffer.next_observations[:] = rng.normal(size=buffer.observations.shape)
    buffer.actions[:] = rng.uniform(-1, 1, size=buffer.actions.shape)
    buffer.rewards[:] = rng.normal(size=buffer.rewards.shape)
    buffer.full = True
    return model


def measure(subjects: dict[str, Callable[[], None]], repetitions: int, rounds: int) -> dict[str, list[float]]:
    """
    Time every subject in turn, ``rounds`` times.

    :param subjects: Functions by name
    :param repetitions: Calls in one timing
    :param rounds: Number of rounds
    :return: Milliseconds a call, by name, one for each round
    """
    times: dict[str, list[float]] = {name: [] for name in subjects}
    for function in subjects.values():
        function()
    for _ in range(rounds):
        for name, function in subjects.items():
            start = time.perf_counter()
            for _ in range(repetitions):
                function()
            times[name].append((time.perf_counter() - start) / repetitions * 1e3)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--compile", action="store_true", help="measure compile=True too (a minute or two to compile)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the CSV")
    args = parser.parse_args()
    th.set_num_threads(1)

    models = {"SAC": make_model(SAC)}
    for steps in (5, 10, 20):
        models[f"QSM T={steps}"] = make_model(QSM, diffusion_steps=steps)
        if args.compile:
            models[f"QSM T={steps} compiled"] = make_model(QSM, diffusion_steps=steps, compile=True)
    single, batch = np.random.default_rng(0).normal(size=17), np.random.default_rng(0).normal(size=(1000, 17))
    rows = []
    for task, repetitions, call in (
        ("gradient step", 15, lambda model: model.train(1, 256)),
        ("predict, 1 observation", 100, lambda model: model.predict(single)),
        ("predict, 1 observation, deterministic", 100, lambda model: model.predict(single, deterministic=True)),
        ("predict, 1000 observations", 10, lambda model: model.predict(batch)),
    ):
        subjects = {
            name: (lambda model=model, call=call: call(model))
            for name, model in models.items()
            if task == "gradient step" or "compiled" not in name
        }
        times = measure(subjects, repetitions, args.rounds)
        for name, values in times.items():
            low, median, high = statistics.quantiles(values, n=4)
            row = {
                "task": task,
                "subject": name,
                "median_ms": round(median, 4),
                "quartile_1_ms": round(low, 4),
                "quartile_3_ms": round(high, 4),
                "speed_over_sac": round(statistics.median(times["SAC"]) / median, 3),
                "onednn_linear": prefers_onednn(),
                "torch": th.__version__,
                "cpu": th.cpu.get_capabilities().get("cpu_name", platform.machine()),
            }
            rows.append(row)
            print(f"{task:40} {name:20} {median:9.3f} ms  {row['speed_over_sac']:6.2f} x SAC's speed", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "speed.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
