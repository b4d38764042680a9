"""
Which of several ways to succeed QSM, DDiffPG, SAC and TD3 find and keep.

    python benchmarks/modes.py run                              # everything that is left, one after the other
    python benchmarks/modes.py run --task point --algo ddiffpg --seed 0
    python benchmarks/modes.py report

A run trains one agent on one thread, goes on from its checkpoint when it was killed, and writes its evaluations to a CSV in
the end; the paths of its sampled episodes, and the ways of those that it collected, go to others. A run that has its CSV is
done. Several processes can share the folder: each takes the runs that no other one holds. The report makes a table of all
evaluations and pictures of the paths and the learning curves.
"""

import argparse
import copy
import csv
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import stable_baselines3
import torch as th
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv

import sb3_qsm.envs  # noqa: F401  registers the environments
from sb3_qsm import QSM, DDiffPG
from sb3_qsm.common.checkpoint import CHECKPOINT_NAME, RunCheckpointCallback, resume
from sb3_qsm.evaluation import Episode, ModeCounts, count_modes
from sb3_qsm.plots import first_two, plot_trajectories

RESULTS = Path(__file__).parent / "results" / "modes"
SEEDS = (0, 1, 2)
EPISODES, MODE_EPISODES = 100, 50


@dataclass(frozen=True)
class Task:
    """
    A task with several ways to succeed.

    :param env: Environment
    :param n_modes: Number of ways
    :param timesteps: Length of a training
    :param routes: Whether the ways are routes, which can be blocked
    :param arguments: Constructor arguments for every algorithm
    :param own: Further ones of some
    :param env_kwargs: Arguments of the environment
    :param n_envs: Number of environments that collect
    """

    env: str
    n_modes: int
    timesteps: int
    routes: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)
    own: dict[str, dict[str, Any]] = field(default_factory=dict)
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    n_envs: int = 1

    def make_env(self, **kwargs: Any) -> gym.Env[Any, Any]:
        """
        :param kwargs: Further arguments of the environment
        :return: An environment to look at
        """
        return gym.make(self.env, **{**self.env_kwargs, **kwargs})

    def make_vec_env(self, seed: int) -> VecEnv:
        """
        :param seed: Seed of the first environment
        :return: Environments to train in
        """
        return make_vec_env(self.env, self.n_envs, seed=seed, env_kwargs=self.env_kwargs)


class Curve(BaseCallback):
    """
    Write which ways the episodes took that ended since the last row.

    :param path: CSV
    :param freq: Steps for a row
    """

    def __init__(self, path: Path, freq: int) -> None:
        super().__init__()
        self.path, self.freq = path, freq
        self.ways: list[str] = []

    def _on_training_start(self) -> None:
        rows = list(csv.DictReader(self.path.open())) if self.path.exists() else []
        # What came after the checkpoint is played again
        self._write([row for row in rows if int(row["timesteps"]) <= self.num_timesteps], "w")
        self.next = (self.num_timesteps // self.freq + 1) * self.freq

    def _on_step(self) -> bool:
        for done, info in zip(self.locals["dones"], self.locals["infos"], strict=True):
            if done:
                self.ways.append(str(info.get("route", info["goal"])) if info["success"] else "")
        if self.num_timesteps >= self.next:
            self.next += self.freq
            counts = {way: self.ways.count(way) for way in sorted(set(self.ways)) if way}
            row = {
                "timesteps": self.num_timesteps,
                "episodes": len(self.ways),
                "counts": json.dumps(counts),
                "n_modes": len(self.model.modes) if isinstance(self.model, DDiffPG) else "",
            }
            self._write([row], "a")
            self.ways = []
        return True

    def _write(self, rows: list[dict[str, Any]], mode: str) -> None:
        with self.path.open(mode, newline="") as file:
            writer = csv.DictWriter(file, ("timesteps", "episodes", "counts", "n_modes"), lineterminator="\n")
            if mode == "w":
                writer.writeheader()
            writer.writerows(rows)


# The ascent is the dearest part of DDiffPG's update: 5 steps of it are half
ASCENT = {"target_action_steps": 5}
# The gradient at the noised action follows the nearest hill of the critic; see the page on modes
NOISED = {"score_target": "noised"}
SMALL = {"policy_kwargs": {"net_arch": [128, 128]}}
MAZE = {"ddiffpg": {"position": [0, 1], **ASCENT}, "qsm": NOISED}
TASKS = {
    "point": Task(
        "sb3_qsm/NGoalPoint-v0",
        4,
        20_000,
        # Every goal is found a few times before one of them is preferred
        arguments={"learning_starts": 3000},
        own={
            "ddiffpg": {"exploration_decay_steps": 6000, **ASCENT},
            "qsm": {"n_steps": 1, "exploration_initial_eps": 1.0, "exploration_decay_steps": 20_000, **NOISED},
        },
    ),
    "two-routes": Task("sb3_qsm/PointMaze_TwoRoutes-v0", 2, 30_000, True, SMALL, MAZE),
    "four-goals": Task("sb3_qsm/PointMaze_FourGoals-v0", 4, 40_000, False, SMALL, MAZE),
    # The official setting is 256 environments and 3 million steps: here the goals are one cell from the start, and an action
    # is held for a quarter of a second
    "ant-two-goals": Task(
        "sb3_qsm/AntMaze_TwoGoals-v0",
        2,
        300_000,
        arguments=SMALL,
        own={"ddiffpg": {"position": [0, 1], **ASCENT}},
        env_kwargs={
            "maze_map": [[1, 1, 1, 1, 1], [1, "g", "r", "g", 1], [1, 1, 1, 1, 1]],
            "action_repeat": 5,
            "max_episode_steps": 100,
        },
        n_envs=4,
    ),
}
ALGORITHMS: dict[str, type[OffPolicyAlgorithm]] = {
    "ddiffpg": DDiffPG,
    "qsm": QSM,
    "sac": stable_baselines3.SAC,
    "td3": stable_baselines3.TD3,
}
COLUMNS = ("task", "algo", "seed", "timesteps", "evaluation", "episodes", "success_rate", "mean_return", "entropy", "counts")


def make_model(task: Task, algo: str, seed: int) -> OffPolicyAlgorithm:
    """
    :param task: Task
    :param algo: Name of the algorithm
    :param seed: Seed
    :return: A new model
    """
    env = task.make_vec_env(seed)
    # SB3 writes to the policy's arguments
    arguments = copy.deepcopy({**task.arguments, **task.own.get(algo, {})})
    if algo == "td3":
        n_actions = int(np.prod(env.action_space.shape))
        arguments["action_noise"] = NormalActionNoise(np.zeros(n_actions), np.full(n_actions, 0.1))
    return ALGORITHMS[algo]("MlpPolicy", env, seed=seed, device="cpu", **arguments)


def evaluate(model: OffPolicyAlgorithm, task: Task) -> Iterator[tuple[str, ModeCounts]]:
    """
    :param model: Trained model
    :param task: Its task
    :return: What was evaluated, and what was counted
    """
    env = task.make_env()
    choices: list[int | None] = [None, *range(len(model.modes))] if isinstance(model, DDiffPG) else [None]
    for mode in choices:
        if isinstance(model, DDiffPG):
            model.set_mode(mode)
        name = "any" if mode is None else f"mode {mode}"
        yield name, count_modes(model, env, EPISODES if mode is None else MODE_EPISODES, seed=1000)
        if mode is None:
            yield "any, deterministic", count_modes(model, env, EPISODES, deterministic=True, seed=1000)
    for route in range(task.n_modes) if task.routes else ():
        blocked = task.make_env(blocked=[route])
        for mode in choices:
            if isinstance(model, DDiffPG):
                model.set_mode(mode)
            name = "any" if mode is None else f"mode {mode}"
            yield f"{name}, route {route} blocked", count_modes(model, blocked, MODE_EPISODES, seed=1000)


def run(task_name: str, algo: str, seed: int, out: Path, timesteps: int | None) -> None:
    """
    Do what is left of a run.

    :param task_name: Name of the task
    :param algo: Name of the algorithm
    :param seed: Seed
    :param out: Folder of the CSVs
    :param timesteps: Length of the training; by default the task's
    """
    task, path = TASKS[task_name], out / f"{task_name}_{algo}_{seed}.csv"
    timesteps = task.timesteps if timesteps is None else timesteps
    folder = path.with_suffix(".checkpoint")
    if _finished(path, timesteps):
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder / ".lock").acquire(timeout=0)
    except Timeout:
        print(f"another process is at {path.name}", flush=True)
        return
    with lock:
        if _finished(path, timesteps):
            return
        resumed = (folder / CHECKPOINT_NAME).is_file()
        if resumed:
            model = resume(ALGORITHMS[algo], folder, task.make_vec_env(seed), device="cpu")
        else:
            model = make_model(task, algo, seed)
        print(f"{path.name}: from step {model.num_timesteps} to {timesteps}", flush=True)
        curve = Curve(folder / "curve.csv", max(timesteps // 40, 1))
        callbacks = [RunCheckpointCallback(10_000, folder), curve]
        model.learn(timesteps - model.num_timesteps, callbacks, log_interval=10**9, reset_num_timesteps=not resumed)
        rows, paths = [], []
        for evaluation, counts in evaluate(model, task):
            if evaluation == "any":
                for number, episode in enumerate(counts.episodes):
                    for x, y in map(first_two, episode.observations):
                        paths.append(
                            [number, "" if episode.mode is None else episode.mode, round(float(x), 3), round(float(y), 3)]
                        )
            rows.append(
                {
                    "task": task_name,
                    "algo": algo,
                    "seed": seed,
                    "timesteps": model.num_timesteps,
                    "evaluation": evaluation,
                    "episodes": len(counts.episodes),
                    "success_rate": round(counts.success_rate, 4),
                    "mean_return": round(counts.mean_return, 4),
                    "entropy": round(counts.relative_entropy(task.n_modes), 4),
                    "counts": json.dumps({str(mode): count for mode, count in sorted(counts.counts.items())}),
                }
            )
            print(f"  {evaluation}: success {counts.success_rate:.2f}, {rows[-1]['counts']}", flush=True)
        with path.with_name(f"{path.stem}_paths.csv").open("w", newline="") as file:
            writer_of_paths = csv.writer(file, lineterminator="\n")
            writer_of_paths.writerow(["episode", "mode", "x", "y"])
            writer_of_paths.writerows(paths)
        temporary = folder / path.name
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        if isinstance(model, DDiffPG):
            model.set_mode(None)
        model.save(path.with_suffix(".zip"))
        shutil.copyfile(curve.path, path.with_name(f"{path.stem}_curve.csv"))
        os.replace(temporary, path)
        shutil.rmtree(folder)


def _finished(path: Path, timesteps: int) -> bool:
    """Whether a run has its CSV; one of another length is not to be taken for it."""
    if not path.exists():
        return False
    found = int(next(csv.DictReader(path.open()))["timesteps"])
    if found < timesteps:
        raise SystemExit(f"{path} is of a run of {found} steps, not {timesteps}: delete it, or choose another --out")
    return True


def read_paths(path: Path) -> ModeCounts:
    """
    :param path: CSV of paths that :func:`run` wrote
    :return: Its episodes, without their returns
    """
    modes: dict[str, str] = {}
    points: dict[str, list[Any]] = {}
    for row in csv.DictReader(path.open()):
        modes[row["episode"]] = row["mode"]
        points.setdefault(row["episode"], []).append(np.array([float(row["x"]), float(row["y"])]))
    return ModeCounts(
        [
            Episode(points[episode], int(mode) if mode else None, bool(mode), total_reward=float("nan"))
            for episode, mode in modes.items()
        ]
    )


def find(task_name: str, out: Path, kind: str) -> tuple[dict[tuple[str, int], Path], list[int], list[str]]:
    """
    :param task_name: Name of the task
    :param out: Folder of the CSVs
    :param kind: ``"paths"`` or ``"curve"``
    :return: CSVs of that kind by algorithm and seed; the seeds, the rows of a picture; the algorithms, its columns
    """
    found = {
        (algo, seed): path
        for algo in ALGORITHMS
        for seed in SEEDS
        if (path := out / f"{task_name}_{algo}_{seed}_{kind}.csv").exists()
    }
    algos = [algo for algo in ALGORITHMS if any(algo == other for other, _ in found)]
    return found, sorted({seed for _, seed in found}), algos


def draw(task_name: str, out: Path) -> Path | None:
    """
    Draw the paths of a task: a row for each seed, a column for each algorithm.

    :param task_name: Name of the task
    :param out: Folder of the CSVs
    :return: The picture, None if there is no finished run
    """
    found, seeds, algos = find(task_name, out, "paths")
    if not found:
        return None
    figure = Figure(figsize=(4.3 * len(algos), 3.2 * len(seeds)), layout="compressed")
    grid = figure.subplots(len(seeds), len(algos), squeeze=False)
    env = TASKS[task_name].make_env()
    for i, seed in enumerate(seeds):
        for j, algo in enumerate(algos):
            axes = grid[i, j]
            if (algo, seed) not in found:
                axes.set_axis_off()
                continue
            counts = read_paths(found[algo, seed])
            plot_trajectories(counts, env, axes=axes)
            axes.set_title(f"{ALGORITHMS[algo].__name__}, seed {seed}: success {counts.success_rate:.2f}", fontsize=10)
    env.close()
    picture = out / f"{task_name}.png"
    figure.savefig(picture, dpi=110)
    return picture


def draw_curves(task_name: str, out: Path) -> Path | None:
    """
    Draw the share of the episodes collected that took each way.

    :param task_name: Name of the task
    :param out: Folder of the CSVs
    :return: The picture, None if there is no curve
    """
    found, seeds, algos = find(task_name, out, "curve")
    if not found:
        return None
    figure = Figure(figsize=(3.6 * len(algos), 2.6 * len(seeds)), layout="constrained")
    grid = figure.subplots(len(seeds), len(algos), squeeze=False, sharex=True, sharey=True)
    for axes in grid.flat:
        axes.set_visible(False)
    for (algo, seed), path in found.items():
        axes = grid[seeds.index(seed), algos.index(algo)]
        axes.set_visible(True)
        rows = list(csv.DictReader(path.open()))
        steps = [int(row["timesteps"]) / 1000 for row in rows]
        for way in range(TASKS[task_name].n_modes):
            shares = [json.loads(row["counts"]).get(str(way), 0) / max(int(row["episodes"]), 1) for row in rows]
            axes.plot(steps, shares, label=f"{'route' if TASKS[task_name].routes else 'goal'} {way}")
        axes.set_title(f"{ALGORITHMS[algo].__name__}, seed {seed}", fontsize=10)
        axes.set_ylim(0, 1)
        axes.grid(alpha=0.3)
    for axes in grid[-1]:
        axes.set_xlabel("thousand steps")
    for axes in grid[:, 0]:
        axes.set_ylabel("share of episodes")
    next(axes for axes in grid.flat if axes.get_visible()).legend(fontsize=8)
    picture = out / f"{task_name}_curves.png"
    figure.savefig(picture, dpi=110)
    return picture


def report(out: Path) -> str:
    """
    :param out: Folder of the CSVs
    :return: Table of all evaluations, in Markdown
    """
    files = [path for path in sorted(out.glob("*.csv")) if not path.stem.endswith(("_paths", "_curve"))]
    rows = [row for path in files for row in csv.DictReader(path.open())]
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}"]
    lines += [f"| {' | '.join(row[column] for column in COLUMNS)} |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "report"])
    parser.add_argument("--task", choices=list(TASKS), nargs="+", default=list(TASKS))
    parser.add_argument("--algo", choices=list(ALGORITHMS), nargs="+", default=list(ALGORITHMS))
    parser.add_argument("--seed", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--timesteps", type=int, help="length of a training; by default the task's")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSVs")
    args = parser.parse_args()
    if args.command == "report":
        images = ""
        for task in args.task:
            paths, curves = draw(task, args.out), draw_curves(task, args.out)
            images += "" if paths is None else f"![Paths of sampled episodes]({paths.name})\n\n"
            images += "" if curves is None else f"![Ways of the episodes collected]({curves.name})\n\n"
        (args.out / "README.md").write_text(f"# Modes\n\n`python benchmarks/modes.py run`\n\n{images}{report(args.out)}")
        return
    th.set_num_threads(1)
    for seed in args.seed:
        for task in args.task:
            for algo in args.algo:
                run(task, algo, seed, args.out, args.timesteps)


if __name__ == "__main__":
    main()
