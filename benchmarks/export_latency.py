"""
Time of one action at T = 1 to 20: the exported policy under onnxruntime beside ``predict``, in one process, interleaved, on
one thread.

    python benchmarks/export_latency.py --out benchmarks/results/export

The networks are QSM's default ones with the shapes of HalfCheetah-v5, untrained: the time does not depend on the weights.
"""

import argparse
import csv
import platform
import statistics
import tempfile
from pathlib import Path

import gymnasium as gym
import numpy as np
import onnxruntime
import torch as th
from speed import measure

from sb3_qsm import QSM
from sb3_qsm.export import to_onnx


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=list(range(1, 21)), help="values of T")
    parser.add_argument("--repetitions", type=int, default=50, help="actions in one timing")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--note", default="", help="written to every row, for instance what else the machine was doing")
    parser.add_argument("--out", type=Path, required=True, help="folder of the CSV")
    args = parser.parse_args()
    th.set_num_threads(1)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1

    env = gym.make("HalfCheetah-v5")
    rng = np.random.default_rng(0)
    observation = rng.normal(size=(1, 17))
    latent = rng.normal(size=(1, 6)).astype(np.float32)
    # All numbers of steps in turn, so that what else the machine does slows no single one
    subjects = {}
    for steps in args.steps:
        model = QSM("MlpPolicy", env, buffer_size=1, diffusion_steps=steps, device="cpu")
        chain = rng.normal(size=(steps, 1, 6)).astype(np.float32)
        feeds = {
            True: {"observation": observation},
            False: {"observation": observation, "latent": latent, "chain": chain},
        }
        with tempfile.TemporaryDirectory() as folder:
            for deterministic, feed in feeds.items():
                to_onnx(model, Path(folder) / "policy.onnx", deterministic)
                session = onnxruntime.InferenceSession(Path(folder) / "policy.onnx", options, ["CPUExecutionProvider"])
                subjects[steps, "onnxruntime", deterministic] = lambda run=session.run, feed=feed: run(None, feed)
                subjects[steps, "predict", deterministic] = lambda model=model, flag=deterministic: model.predict(
                    observation, deterministic=flag
                )
    rows = []
    for (steps, name, deterministic), times in measure(subjects, args.repetitions, args.rounds).items():
        low, median, high = statistics.quantiles(times, n=4)
        row = {
            "diffusion_steps": steps,
            "subject": name,
            "deterministic": deterministic,
            "median_ms": round(median, 4),
            "quartile_1_ms": round(low, 4),
            "quartile_3_ms": round(high, 4),
            "fastest_ms": round(min(times), 4),
            "torch": th.__version__,
            "onnxruntime": onnxruntime.__version__,
            "cpu": th.cpu.get_capabilities().get("cpu_name", platform.machine()),
            "note": args.note,
        }
        rows.append(row)
        print(f"T={steps:2} {name:12} deterministic={deterministic!s:5} {median:8.4f} ms", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "latency.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
