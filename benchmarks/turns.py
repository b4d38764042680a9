"""
Single gradient steps of settings of QSM beside SAC's, in turns, by the time that the thread runs.

    python benchmarks/turns.py --out FILE --setting '{"diffusion_steps": 5}' --setting '{"critic_reduction": "split"}'
    python benchmarks/turns.py --out FILE --setting '{"diffusion_steps": 5}' --compile --rounds 300

On a busy machine this is steadier than ``speed.py``, which times several steps at once: what slows one step slows the next of
another setting alike. Batch 256 and HalfCheetah-v5's shapes, as there. The ratio to SAC is the median of those of the rounds,
with the 95 % confidence interval of that median. Rows are appended. A row's section and subject are what it was measured with.
"""

import argparse
import csv
import functools
import json
import math
import statistics
from pathlib import Path
from typing import Any

import speed
from stable_baselines3 import SAC

from sb3_qsm import QSM


def median_interval(values: list[float]) -> tuple[float, float, float]:
    """
    :param values: Numbers
    :return: Their median, and the order statistics that enclose that of the distribution with a probability of about 95 %
    """
    ordered, n = sorted(values), len(values)
    half = 0.98 * math.sqrt(n)  # 1.96 standard deviations of a binomial variable with p = 1/2
    low, high = max(math.floor(n / 2 - half), 0), min(math.ceil(n / 2 + half), n - 1)
    return statistics.median(values), ordered[low], ordered[high]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", type=json.loads, action="append", required=True, help="arguments of QSM; can be repeated")
    parser.add_argument("--compile", action="store_true", help="compile the updates of all settings")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--core", type=int, default=0, help="core to stay on, where the system can pin a process")
    parser.add_argument("--out", type=Path, required=True, help="CSV to append to")
    args = parser.parse_args()
    speed.settle(args.core, "processor")

    models: dict[str, Any] = {"SAC": speed.make_model(SAC)}
    for setting in args.setting:
        models[json.dumps(setting)] = speed.make_model(QSM, compile=args.compile, **setting)
    times = speed.measure({name: functools.partial(model.train, 1, 256) for name, model in models.items()}, 1, args.rounds)

    rows = []
    for name, values in times.items():
        ratio, low, high = median_interval([sac / value for sac, value in zip(times["SAC"], values, strict=True)])
        print(f"{name:90} {statistics.median(values):8.2f} ms  {ratio:5.3f} [{low:5.3f}, {high:5.3f}]", flush=True)
        line = speed.row("compiled" if args.compile else "eager", name, "ms", statistics.median(values), ratio=ratio)
        rows.append({**line, "low": round(low, 3), "high": round(high, 3), "rounds": args.rounds})
    dropped = ("quartile_1", "quartile_3")
    fields = [name for name in rows[0] if name not in dropped]
    new = not args.out.exists()
    with args.out.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=fields, extrasaction="ignore")
        if new:
            writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
