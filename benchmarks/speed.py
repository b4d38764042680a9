"""
Speed and memory of QSM beside SB3's SAC and TD3 and sb3-contrib's TQC, on one core.

    python benchmarks/speed.py --out benchmarks/results/speed
    python benchmarks/speed.py --out benchmarks/results/speed --only gradient predict
    python benchmarks/speed.py --out benchmarks/results/speed --plot

Within a section the subjects run in one process, interleaved: every round times each of them once. The table holds medians
and quartiles over the rounds, and the ratio to SAC of the medians. The replay buffers hold random numbers of
HalfCheetah-v5's shapes, since the cost of an update does not depend on them; the section ``environment`` trains on the real
task. Memory and the time to compile are measured in a process for each subject.
"""

import argparse
import copy
import csv
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from sb3_contrib import TQC
from stable_baselines3 import SAC, TD3
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_qsm import QSM
from sb3_qsm.common.performance import has_bf16
from sb3_qsm.diffusion.linear import prefers_onednn

TRANSITIONS = 20_000
BASELINES: dict[str, type[OffPolicyAlgorithm]] = {"SAC": SAC, "TD3": TD3, "TQC": TQC}
#: Two hidden layers of 256 for all, which are the defaults of SAC and QSM
SAME_WIDTH = {"policy_kwargs": {"net_arch": [256, 256]}}
PRECISIONS = ["float32", "bf16"] if has_bf16(th.device("cpu")) else ["float32"]
REFERENCE = "SAC"
CLOCKS = {"wall": time.perf_counter, "processor": time.thread_time}
#: The one that times are taken by; :func:`settle` sets it
clock: Callable[[], float] = time.perf_counter
Row = dict[str, Any]


def make_model(algo: type[OffPolicyAlgorithm], buffer_size: int = TRANSITIONS, **kwargs: Any) -> OffPolicyAlgorithm:
    """
    A model with a full replay buffer, ready for ``train``.

    :param algo: Algorithm
    :param buffer_size: Size of the buffer
    :param kwargs: Further constructor arguments
    :return: The model
    """
    kwargs = copy.deepcopy({**SAME_WIDTH, **kwargs})  # SAC adds to its policy_kwargs
    model = algo("MlpPolicy", gym.make("HalfCheetah-v5"), seed=0, device="cpu", buffer_size=buffer_size, **kwargs)
    model.set_logger(Logger(None, []))
    rng, buffer = np.random.default_rng(0), model.replay_buffer
    for array in (buffer.observations, buffer.next_observations, buffer.rewards):
        array[:] = rng.standard_normal(array.shape, dtype=np.float32)
    buffer.actions[:] = rng.uniform(-1, 1, size=buffer.actions.shape)
    buffer.full = True
    return model


def settle(core: int, clock_name: str) -> None:
    """
    Stay on one core, where the system can pin a process, with one thread.

    :param core: Number of the core
    :param clock_name: Key of ``CLOCKS``, by which times are taken from now on
    """
    global clock
    th.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})
    clock = CLOCKS[clock_name]


def measure(subjects: dict[str, Callable[[], Any]], repetitions: int, rounds: int) -> dict[str, list[float]]:
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
        function()
    for _ in range(rounds):
        for name, function in subjects.items():
            start = clock()
            for _ in range(repetitions):
                function()
            times[name].append((clock() - start) / repetitions * 1e3)
    return times


def rows(section: str, times: dict[str, list[float]], reference: str = REFERENCE) -> Iterator[Row]:
    """
    :param section: Name of the measurement
    :param times: Milliseconds by subject
    :param reference: Subject that the others are compared with
    :return: One row a subject
    """
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4)
        ratio = statistics.median(times[reference]) / median
        print(f"{section:44} {name:28} {median:9.3f} ms  {ratio:6.2f} x {reference}'s speed", flush=True)
        yield row(section, name, "ms", median, low, high, ratio)


def row(
    section: str,
    subject: str,
    unit: str,
    median: float,
    quartile_1: float | None = None,
    quartile_3: float | None = None,
    ratio: float | None = None,
) -> Row:
    """
    :param section: Name of the measurement
    :param subject: What was measured
    :param unit: Unit of the numbers
    :param median: Median over the rounds, or the only value
    :param quartile_1: First quartile
    :param quartile_3: Third quartile
    :param ratio: Speed in units of SAC's, or for memory the amount
    :return: A row of the CSV
    """
    return {
        "section": section,
        "subject": subject,
        "unit": unit,
        "median": round(median, 4),
        "quartile_1": "" if quartile_1 is None else round(quartile_1, 4),
        "quartile_3": "" if quartile_3 is None else round(quartile_3, 4),
        "over_sac": "" if ratio is None else round(ratio, 3),
        "clock": next(name for name, function in CLOCKS.items() if function is clock),
        "onednn_linear": prefers_onednn(),
        "torch": th.__version__,
        "cpu": th.cpu.get_capabilities().get("cpu_name", platform.machine()),
        "commit": _commit(),
    }


@functools.cache
def _commit() -> str:
    return subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    ).stdout.strip()


def qsm_variants(
    diffusion_steps: tuple[int, ...], compiled: tuple[bool, ...] = (False, True), target_sampling_steps: int | None = None
) -> dict[str, dict[str, Any]]:
    """
    :param diffusion_steps: Numbers of diffusion steps
    :param compiled: Values of ``compile``
    :param target_sampling_steps: Steps of the critics' target
    :return: Constructor arguments by name, for every precision of this processor
    """
    target = "" if target_sampling_steps is None else f" target in {target_sampling_steps}"
    return {
        f"QSM T={steps}{target} {precision}{' compiled' if compile_ else ''}": {
            "diffusion_steps": steps,
            "target_sampling_steps": target_sampling_steps,
            "precision": precision,
            "compile": compile_,
        }
        for steps in diffusion_steps
        for precision in PRECISIONS
        for compile_ in compiled
    }


def gradient(rounds: int) -> Iterator[Row]:
    """Gradient steps at batch 256."""
    models = {name: make_model(algo) for name, algo in BASELINES.items()}
    variants = (
        qsm_variants((5, 10, 20)) | qsm_variants((5,), target_sampling_steps=2) | qsm_variants((10,), target_sampling_steps=3)
    )
    models |= {name: make_model(QSM, **kwargs) for name, kwargs in variants.items()}
    # train(1): as in a training, with what SB3 does once for each environment step
    subjects = {name: functools.partial(model.train, 1, 256) for name, model in models.items()}
    yield from rows("gradient step", measure(subjects, 15, rounds))


def predict(rounds: int) -> Iterator[Row]:
    """Acting on one observation, and on 1,000."""
    models = {name: make_model(algo) for name, algo in BASELINES.items()}
    models |= {name: make_model(QSM, **kwargs) for name, kwargs in qsm_variants((1, 5, 10, 20), (False,)).items()}
    models["QSM T=10 in 3 float32"] = make_model(QSM, diffusion_steps=10, sampling_steps=3)
    rng = np.random.default_rng(0)
    for number, repetitions in ((1, 100), (1000, 10)):
        obs = rng.normal(size=(number, 17)[number == 1 :])
        for deterministic in (False, True):
            subjects = {
                name: functools.partial(model.predict, obs, deterministic=deterministic)
                for name, model in models.items()
                if number > 1 or "bf16" not in name  # one observation is always float32
            }
            section = f"predict, {number} obs., {'deterministic' if deterministic else 'sampled'}"
            yield from rows(section, measure(subjects, repetitions, rounds))


def cost(rounds: int) -> Iterator[Row]:
    """The gradient step against the number of diffusion steps, the batch and the width of the layers."""
    models = {f"QSM T={steps}": make_model(QSM, diffusion_steps=steps) for steps in (1, 2, 5, 8, 10, 15, 20)}
    models[REFERENCE] = make_model(SAC)
    subjects = {name: functools.partial(model.train, 1, 256) for name, model in models.items()}
    yield from rows("gradient step against T", measure(subjects, 15, rounds))
    models = {"SAC": make_model(SAC), "QSM T=5": make_model(QSM, diffusion_steps=5), "QSM T=10": make_model(QSM)}
    for batch_size in (64, 256, 1024):
        subjects = {name: functools.partial(model.train, 1, batch_size) for name, model in models.items()}
        yield from rows(f"gradient step, batch {batch_size}", measure(subjects, 10, rounds))
    for width in (64, 512):
        wide: dict[str, Any] = {"policy_kwargs": {"net_arch": [width, width]}}
        models = {
            "SAC": make_model(SAC, **wide),
            "QSM T=5": make_model(QSM, diffusion_steps=5, **wide),
            "QSM T=10": make_model(QSM, **wide),
        }
        subjects = {name: functools.partial(model.train, 1, 256) for name, model in models.items()}
        yield from rows(f"gradient step, width {width}", measure(subjects, 10, rounds))


def environment(rounds: int) -> Iterator[Row]:
    """Environment steps of a training on HalfCheetah-v5, one gradient step for each."""
    for n_envs in (1, 4):
        models: dict[str, OffPolicyAlgorithm] = {}
        for name, algo, kwargs in (
            *((name, algo, {}) for name, algo in BASELINES.items()),
            *((name, QSM, kwargs) for name, kwargs in qsm_variants((5, 10)).items()),
        ):
            env = make_vec_env("HalfCheetah-v5", n_envs=n_envs)
            models[name] = algo(
                "MlpPolicy",
                env,
                device="cpu",
                seed=0,
                buffer_size=TRANSITIONS,
                gradient_steps=-1,
                **copy.deepcopy(SAME_WIDTH),
                **kwargs,
            )
            models[name].learn(256)
        steps = 200
        subjects = {
            name: functools.partial(model.learn, steps, reset_num_timesteps=False, log_interval=1000)
            for name, model in models.items()
        }
        times = {name: [value / steps for value in values] for name, values in measure(subjects, 1, rounds).items()}
        yield from rows(f"environment step, {n_envs} env.", times)


CHILD = """
import json, pathlib, re, resource, sys, time
import torch as th
sys.path[:0] = {path!r}
import speed
th.set_num_threads(1)
model = speed.make_model(getattr(speed, {algo!r}), buffer_size=100_000, **{kwargs!r})
start = time.perf_counter()
model.train(2, 256)
first = time.perf_counter() - start
model.train(100, 256)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
status = pathlib.Path("/proc/self/status")
if status.exists():
    # The above counts what the process that started this one had, too
    peak = int(re.search(r"VmHWM:\\s*(\\d+)", status.read_text())[1])
print(json.dumps([peak / 1024, first]))
"""


def in_a_process(algo: str, kwargs: dict[str, Any], cache: str) -> tuple[float, float]:
    """
    :param algo: Name of the algorithm
    :param kwargs: Constructor arguments
    :param cache: Folder that keeps what was compiled
    :return: Peak memory in MiB of a process with a buffer of 100,000 transitions, and seconds of the first two gradient steps
    """
    code = CHILD.format(path=[str(Path(__file__).parent)], algo=algo, kwargs=kwargs)
    child = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}, capture_output=True, text=True
    )
    if child.returncode:
        raise RuntimeError(child.stderr)
    memory, first = json.loads(child.stdout.splitlines()[-1])
    return memory, first


def memory(rounds: int) -> Iterator[Row]:
    """Peak memory, and the time of the first update: compiled with an empty cache, and again with the cache that is left."""
    peaks = {}
    for name, algo, kwargs in (
        *((name, name, {}) for name in BASELINES),
        *((name, "QSM", kwargs) for name, kwargs in qsm_variants((5, 10)).items()),
    ):
        with tempfile.TemporaryDirectory() as cache:
            if kwargs.get("compile"):
                cold_peak, seconds = in_a_process(algo, kwargs, cache)
                yield row("first gradient steps, nothing compiled before", name, "s", seconds)
                yield row("peak memory, nothing compiled before", name, "MiB", cold_peak, ratio=cold_peak / peaks[REFERENCE])
            peak, seconds = in_a_process(algo, kwargs, cache)
            yield row("first gradient steps", name, "s", seconds)
            peaks[name] = peak
            print(
                f"{name:30} {peak:7.0f} MiB, {peak / peaks[REFERENCE]:5.2f} of SAC's; first steps {seconds:6.1f} s", flush=True
            )
            yield row("peak memory", name, "MiB", peak, ratio=peak / peaks[REFERENCE])


SECTIONS: dict[str, Callable[[int], Iterator[Row]]] = {
    function.__name__: function for function in (gradient, predict, cost, environment, memory)
}


def markdown(table: list[Row]) -> str:
    """
    :param table: Rows of the CSV
    :return: The table of the documentation: time and ratio of every subject
    """
    units = {"ms": "{:.2f} ms", "MiB": "{:.0f} MiB", "s": "{:.1f} s"}
    # A section alone may have been measured again
    commits = ", ".join(dict.fromkeys(line["commit"] for line in table))
    lines = [f"Measured at commit {commits} with torch {table[0]['torch']} on one core of an {table[0]['cpu']}."]
    for section in dict.fromkeys(line["section"] for line in table):
        found = [line for line in table if line["section"] == section]
        relative = "of SAC's memory" if found[0]["unit"] == "MiB" else "SAC's speed"
        lines += ["", f"| {section} | median | x {relative} |", "| --- | ---: | ---: |"]
        lines += [
            f"| {line['subject']} | {units[line['unit']].format(float(line['median']))} | {line['over_sac'] or '-'} |"
            for line in found
        ]
    return "\n".join(lines) + "\n"


def plot(table: list[Row], path: Path) -> None:
    """
    :param table: Rows of the CSV; without any of the sections that are drawn there is no picture
    :param path: Picture to write
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    by_section = {section: [line for line in table if line["section"] == section] for section in {r["section"] for r in table}}
    bars = {"gradient step": "Gradient steps, batch 256", "environment step, 1 env.": "Training on HalfCheetah-v5"}
    bars = {section: title for section, title in bars.items() if section in by_section}
    curve = by_section.get("gradient step against T", [])
    panels = len(bars) + bool(curve)
    if not panels:
        return
    figure, axes = plt.subplots(1, panels, figsize=(5 * panels, 4), constrained_layout=True, squeeze=False)
    for ax, (section, title) in zip(axes[0], bars.items(), strict=False):
        lines = by_section[section]
        colors = ["#0072B2" if line["subject"].startswith("QSM") else "#999999" for line in lines]
        ax.barh([line["subject"] for line in lines], [float(line["over_sac"]) for line in lines], color=colors)
        ax.axvline(1.0, color="black", linewidth=0.8)
        ax.invert_yaxis()
        ax.set(title=title, xlabel="speed in units of SAC's")
    if curve:
        qsm = [line for line in curve if line["subject"] != REFERENCE]
        sac = float(next(line["median"] for line in curve if line["subject"] == REFERENCE))
        axes[0, -1].plot([int(line["subject"].split("=")[1]) for line in qsm], [float(line["median"]) for line in qsm], "o-")
        axes[0, -1].axhline(sac, color="#999999", linestyle="--", label="SAC")
        axes[0, -1].legend(frameon=False)
        axes[0, -1].set(title="Cost of a gradient step", xlabel="diffusion steps T", ylabel="ms", ylim=(0, None))
    for ax in axes[0]:
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections to measure")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--core", type=int, default=0, help="core to stay on, where the system can pin a process")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="processor: the time that the thread runs, steadier on a busy machine"
    )
    parser.add_argument("--plot", action="store_true", help="only write the table and the picture from the CSV")
    parser.add_argument("--out", type=Path, required=True, help="folder of the CSV and the picture")
    args = parser.parse_args()
    path = args.out / "speed.csv"
    table: list[Row] = []
    if path.exists():
        with path.open(newline="") as file:
            table = list(csv.DictReader(file))
    if not args.plot:
        settle(args.core, args.clock)
        args.out.mkdir(parents=True, exist_ok=True)
        for name in args.only:
            new = list(SECTIONS[name](args.rounds))
            measured = {line["section"] for line in new}
            table = [line for line in table if line["section"] not in measured] + new
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, fieldnames=list(new[0]))
                writer.writeheader()
                writer.writerows(table)
    (args.out / "table.md").write_text(markdown(table))
    plot(table, args.out / "speed.png")


if __name__ == "__main__":
    main()
