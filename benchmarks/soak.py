"""
Train for a long time and watch the memory: once the replay buffer is full it must stay flat.

    python benchmarks/soak.py --timesteps 1000000 --out benchmarks/results/soak/soak.csv

Evaluation, logging, checkpoints and saved models are part of the run, since each of them could keep something. A row with the
resident memory is written every ``--every`` steps. The command fails if the memory after the buffer was full, as the median
of the last quarter of the rows against the first, has grown by more than ``--tolerance``. Linux only.
"""

import argparse
import csv
import gc
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import gymnasium as gym
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback
from stable_baselines3.common.monitor import Monitor

from sb3_qsm import QSM
from sb3_qsm.common.checkpoint import RunCheckpointCallback


class Memory(BaseCallback):
    """
    Write the resident memory of the process to a CSV.

    :param path: The CSV
    :param every: Environment steps between two rows
    """

    def __init__(self, path: Path, every: int) -> None:
        super().__init__()
        self.path = path
        self.every = every
        self.rows: list[tuple[int, float]] = []

    def _on_training_start(self) -> None:
        self.start = time.monotonic()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("w", newline="")
        self.writer = csv.writer(self.file)
        self.writer.writerow(["timesteps", "rss_mib", "python_objects", "buffer", "seconds"])

    def _on_step(self) -> bool:
        if self.num_timesteps % self.every == 0:
            objects = len(gc.get_objects())
            memory = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
            seconds = time.monotonic() - self.start
            buffer = self.model.replay_buffer.size()
            self.writer.writerow([self.num_timesteps, f"{memory:.2f}", objects, buffer, f"{seconds:.0f}"])
            self.file.flush()
            if buffer == self.model.replay_buffer.buffer_size:
                self.rows.append((self.num_timesteps, memory))
        return True

    def _on_training_end(self) -> None:
        self.file.close()


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="Pendulum-v1")
    parser.add_argument("--timesteps", type=int, default=1_000_000)
    parser.add_argument("--buffer-size", type=int, default=100_000)
    parser.add_argument("--train-freq", type=int, default=4)
    parser.add_argument("--every", type=int, default=1000, help="environment steps between two rows")
    parser.add_argument("--tolerance", type=float, default=2.0, help="growth in MiB that is allowed")
    parser.add_argument("--out", type=Path, required=True, help="the CSV")
    args = parser.parse_args()

    env = Monitor(gym.make(args.env))
    model = QSM(
        "MlpPolicy",
        env,
        buffer_size=args.buffer_size,
        train_freq=args.train_freq,
        batch_size=32,
        diffusion_steps=3,
        policy_kwargs={"net_arch": [32]},
        seed=0,
    )
    memory = Memory(args.out, args.every)
    with tempfile.TemporaryDirectory() as folder:
        callbacks: list[BaseCallback] = [
            memory,
            EvalCallback(Monitor(gym.make(args.env)), n_eval_episodes=1, eval_freq=10_000, log_path=folder, verbose=0),
            CheckpointCallback(args.timesteps // 10, folder),
            RunCheckpointCallback(args.timesteps // 10, folder),
        ]
        model.learn(args.timesteps, callback=callbacks)

    values = [value for _, value in memory.rows]
    quarter = len(values) // 4
    if quarter == 0:
        sys.exit("The buffer was full for too few rows to compare")
    growth = statistics.median(values[-quarter:]) - statistics.median(values[:quarter])
    steps = memory.rows[-1][0] - memory.rows[0][0]
    print(f"{growth:+.2f} MiB over {steps} steps with a full buffer, {values[-1]:.0f} MiB at the end")
    if growth > args.tolerance:
        sys.exit(f"The memory has grown by more than {args.tolerance:g} MiB")


if __name__ == "__main__":
    main()
