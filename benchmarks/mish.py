"""
Mish with one exponential beside PyTorch's: alone, and in a gradient step with the settings of the paper.

    python benchmarks/mish.py --out benchmarks/results/speed/mish.csv

Both are timed in turns on one core, by the time that the thread runs.
"""

import argparse
import csv
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import speed
import torch as th
from torch import nn

from sb3_qsm import QSM
from sb3_qsm.diffusion.activations import Mish


class PlainMish(nn.Mish):
    """PyTorch's: networks take the faster one for ``nn.Mish`` itself alone."""


def gradient_of(activation: nn.Module) -> Callable[[th.Tensor], th.Tensor]:
    """The sum of the activation's derivative and value, so that a compiler drops neither."""

    def function(x: th.Tensor) -> th.Tensor:
        value, pull_back = th.func.vjp(activation, x)
        return value + pull_back(th.ones_like(x))[0]

    return function


def step(activation: type[nn.Module], compile: bool) -> Callable[[], Any]:
    kwargs = QSM.paper_hyperparameters(100_000)
    kwargs["policy_kwargs"]["activation_fn"] = activation
    model = speed.make_model(QSM, compile=compile, **kwargs)
    return lambda: model.train(1, 256)


def subjects() -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """Calls with PyTorch's and with ours, by name."""
    x = th.randn(256, 512)
    pair = PlainMish(), Mish()
    alone = {
        "256 x 512, eager, no gradient": pair,
        "256 x 512, compiled": tuple(th.compile(activation) for activation in pair),
        "256 x 512, compiled, with gradient": tuple(th.compile(gradient_of(activation)) for activation in pair),
    }
    found = {name: tuple(lambda f=f: f(x) for f in functions) for name, functions in alone.items()}
    for compile in (False, True):
        name = f"gradient step, paper's settings, {'compiled' if compile else 'eager'}"
        found[name] = step(PlainMish, compile), step(nn.Mish, compile)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--core", type=int, default=0, help="core to stay on, where the system can pin a process")
    parser.add_argument("--out", type=Path, required=True, help="CSV to write")
    args = parser.parse_args()
    speed.settle(args.core, "processor")
    rows = []
    for name, (plain, ours) in subjects().items():
        with th.no_grad() if name.startswith("256") else th.enable_grad():
            times = speed.measure({"PyTorch's": plain, "one exponential": ours}, 1, args.rounds)
        for subject, values in times.items():
            ratios = [before / after for before, after in zip(times["PyTorch's"], values, strict=True)]
            low, median, high = statistics.quantiles(values, n=4)
            line = speed.row(name, subject, "ms", median, low, high, None)
            rows.append({**line, "over_pytorch": round(statistics.median(ratios), 3)})
            print(f"{name:48} {subject:16} {median:9.3f} ms  {rows[-1]['over_pytorch']:6.2f} x", flush=True)
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[name for name in rows[0] if name != "over_sac"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
