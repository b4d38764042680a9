"""
One training run of a benchmark, a cell: its algorithm and settings, its environment, its evaluations and their CSV.

A cell goes on where it was killed. A row is written when its evaluation is made, before the next checkpoint; going on from a
checkpoint, the rows of later steps are dropped, since those steps are done again. So the CSV has every evaluation once.
"""

import contextlib
import copy
import csv
import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import stable_baselines3
import torch as th
from filelock import FileLock, Timeout
from gymnasium import spaces
from sb3_contrib import TQC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv

import sb3_qsm
from sb3_qsm import QSM
from sb3_qsm.common.checkpoint import CHECKPOINT_NAME, RunCheckpointCallback, read_info, resume

Row = dict[str, str]

ALGORITHMS: dict[str, type[OffPolicyAlgorithm]] = {
    "qsm": QSM,
    "sac": stable_baselines3.SAC,
    "td3": stable_baselines3.TD3,
    "tqc": TQC,
}
#: Pseudo-algorithm that draws its actions uniformly and learns nothing
RANDOM = "random"

#: Constructor arguments by preset, from the steps of the whole run and the size of an action. What stands before the first "-"
#: is the algorithm. Nothing here means the defaults of the algorithm's own library.
PRESETS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "qsm": lambda timesteps, n_actions: {},
    "qsm-paper": lambda timesteps, n_actions: QSM.paper_hyperparameters(timesteps),
    # FlowRL's QSM (arXiv 2603.27450), written out so that it stays what it is when the defaults move
    "qsm-flowrl": lambda timesteps, n_actions: {
        "n_steps": 1,
        "score_target": "noised",
        "policy_samples": 0.0,
        "prior_std": None,
        "diffusion_steps": 20,
        "noise_schedule": "cosine",
        "sampler": "ddpm_x0",
        "temperature": 0.1,
        "q_grad_clip": None,
        "gradient_critic": "target",
        "critic_reduction": "mean",
        "target_policy_noise": 0.0,
        "exploration_noise": 0.1,
        "exploration_initial_eps": 0.0,
        "policy_kwargs": {"critic_layer_norm": False},
    },
    "sac": lambda timesteps, n_actions: {},
    # SB3's TD3 explores only by the noise that it is given; this is the one of its documentation and of rl-zoo
    "td3": lambda timesteps, n_actions: {"action_noise": NormalActionNoise(np.zeros(n_actions), np.full(n_actions, 0.1))},
    "tqc": lambda timesteps, n_actions: {},
    RANDOM: lambda timesteps, n_actions: {},
}
#: How an evaluation acts that counts as the result. As SB3 and rl-zoo do it, but the paper's QSM as in the paper.
SAMPLED = frozenset({"qsm-paper", RANDOM})

#: A published number is clearly passed when each of this many evaluations in a row is above it by this factor
GOAL_EVALUATIONS, GOAL_FACTOR = 3, 1.1
#: Seconds to wait for a killed process to let go of its cell
LOCK_TIMEOUT = 60.0

# What must be the same in all rows of a cell
_IDENTITY = (
    *("algo", "setting", "preset", "kwargs", "env", "seed"),
    *("total_timesteps", "eval_freq", "eval_episodes", "acting"),
)
_METRICS = ("q_mean", "q_grad", "action_saturation", "critic_loss", "actor_loss")
_PACKAGES = ("stable_baselines3", "sb3_contrib", "torch", "gymnasium", "mujoco", "dm_control", "numpy")
COLUMNS = (
    *_IDENTITY,
    *("timesteps", "resumed_from", "train_seconds"),
    *("deterministic_mean", "deterministic_std", "sampled_mean", "sampled_std", "action_std"),
    *_METRICS,
    *("commit", "sb3_qsm", *_PACKAGES, "python", "cpu", "command"),
)


class CellError(ValueError):
    """A cell that cannot be run as it is described."""


@dataclass(frozen=True)
class Cell:
    """
    One training run.

    :param env: Environment
    :param seed: Seed of the training
    :param timesteps: Environment steps of the training
    :param preset: Key of ``PRESETS``
    :param setting: Name of the setting; with the algorithm's name it names the cell
    :param kwargs: Constructor arguments besides those of the preset
    :param eval_freq: Environment steps between evaluations
    :param eval_episodes: Episodes of an evaluation, for each of the two ways to act
    :param checkpoint_freq: Environment steps between checkpoints
    :param goal: Published return; the training stops when it is clearly passed
    :raises CellError: if an argument is out of its range
    """

    env: str
    seed: int
    timesteps: int
    preset: str = "qsm"
    setting: str = "default"
    kwargs: dict[str, Any] = field(default_factory=dict, hash=False)
    eval_freq: int = 5000
    eval_episodes: int = 10
    checkpoint_freq: int = field(default=10_000, compare=False)
    goal: float | None = None

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise CellError(f"unknown preset {self.preset!r}; known ones: {', '.join(sorted(PRESETS))}")
        lows = {"seed": 0, "timesteps": 0 if self.algo == RANDOM else 1}
        for name in ("seed", "timesteps", "eval_freq", "eval_episodes", "checkpoint_freq"):
            low = lows.get(name, 1)
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise CellError(f"{name} of {self.name} on {self.env} must be an integer >= {low}, got {value!r}")
        if self.goal is not None and not (isinstance(self.goal, (int, float)) and self.goal > 0):
            raise CellError(f"goal of {self.name} on {self.env} must be a number above 0, got {self.goal!r}")

    @property
    def algo(self) -> str:
        """Name of the algorithm."""
        return self.preset.split("-")[0]

    @property
    def name(self) -> str:
        """Algorithm and setting."""
        return self.algo if self.setting == "default" else f"{self.algo}-{self.setting}"

    @property
    def acting(self) -> str:
        """How the evaluation acts that counts: "deterministic" or "sampled"."""
        return "sampled" if self.preset in SAMPLED else "deterministic"

    @property
    def steps(self) -> list[int]:
        """Environment steps at which it is evaluated."""
        if self.algo == RANDOM:
            return [0]
        return sorted({*range(self.eval_freq, self.timesteps + 1, self.eval_freq), self.timesteps})

    def path(self, folder: Path) -> Path:
        """
        File of the evaluations.

        :param folder: Folder of the results
        :return: Path of the CSV
        """
        return folder / f"{self.name}-{self.env.replace('/', '_')}-seed{self.seed}-{self.timesteps}.csv"

    def identity(self) -> Row:
        """Columns that say which cell a row is of."""
        return {
            "algo": self.algo,
            "setting": self.setting,
            "preset": self.preset,
            "kwargs": json.dumps(self.kwargs, sort_keys=True),
            "env": self.env,
            "seed": str(self.seed),
            "total_timesteps": str(self.timesteps),
            "eval_freq": str(self.eval_freq),
            "eval_episodes": str(self.eval_episodes),
            "acting": self.acting,
        }

    def passed(self, rows: list[Row]) -> bool:
        """
        Whether the published return is clearly passed.

        :param rows: Evaluations
        :return: Whether it is, in the last of them
        """
        last = [float(row[f"{self.acting}_mean"]) for row in rows[-GOAL_EVALUATIONS:]]
        return self.goal is not None and len(last) == GOAL_EVALUATIONS and min(last) > GOAL_FACTOR * self.goal

    def finished(self, rows: list[Row]) -> bool:
        """
        Whether nothing is left to do.

        :param rows: Evaluations
        :return: Whether the last evaluation is there, or the published return is clearly passed
        """
        return bool(rows) and (int(rows[-1]["timesteps"]) >= self.timesteps or self.passed(rows))


def make_env(env_id: str) -> gym.Env[Any, Any]:
    """
    Make an environment with flat observations in single precision. The networks compute in single precision, so nothing is
    lost, and replay buffer and checkpoint are half as large.

    :param env_id: Environment, of Gymnasium or, as ``dm_control/DOMAIN-TASK-v0``, of the DeepMind control suite
    :return: The environment
    """
    register(env_id)
    env = gym.make(env_id)
    if isinstance(env.observation_space, spaces.Dict):
        env = gym.wrappers.FlattenObservation(env)
    space = env.observation_space
    if isinstance(space, spaces.Box) and space.dtype == np.float64:
        single = spaces.Box(space.low.astype(np.float32), space.high.astype(np.float32), dtype=np.float32)
        env = gym.wrappers.TransformObservation(env, lambda observation: observation.astype(np.float32), single)
    return env


def register(env_id: str) -> None:
    """
    Make an environment known to Gymnasium.

    :param env_id: Environment, ``MODULE:NAME`` if it is registered when that module is imported
    :raises CellError: if there is no such environment
    """
    module, _, name = env_id.rpartition(":")
    if name.startswith("dm_control/"):
        module = "shimmy"
    try:
        if module:
            gym.register_envs(importlib.import_module(module))
        gym.spec(name)
    except (ImportError, gym.error.Error) as error:
        raise CellError(f"unknown environment {env_id!r}: {error}") from error


class RandomPolicy:
    """
    Uniformly random actions, with the ``predict`` that SB3's ``evaluate_policy`` wants.

    :param action_space: Space of the actions
    """

    def __init__(self, action_space: gym.Space[Any]) -> None:
        self.action_space = action_space

    def predict(self, observation: np.ndarray[Any, Any], **_: Any) -> tuple[np.ndarray[Any, Any], None]:
        """
        Draw actions.

        :param observation: Observations, of which only the number counts
        :return: An action for each, and no state
        """
        return np.stack([self.action_space.sample() for _ in observation]), None


class Evaluator:
    """
    Evaluations on environments of their own, the episodes of one side by side. Each starts from the same seeds, so that it
    depends on the policy alone.

    :param cell: What is evaluated
    """

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        # Apart from the training's seeds, and from those of other cells' evaluations
        self.seed = 10_000 * (cell.seed + 1)
        # Without a seed it would draw one from the training's generator
        self.env: VecEnv = make_vec_env(partial(make_env, cell.env), min(cell.eval_episodes, 10), self.seed)

    def __call__(self, model: Any, acting: str) -> Row:
        """
        Evaluate.

        :param model: What acts
        :param acting: ``"deterministic"`` or ``"sampled"``
        :return: Mean and standard deviation of the returns
        """
        self.env.seed(self.seed)
        returns, _ = evaluate_policy(
            model, self.env, self.cell.eval_episodes, deterministic=acting == "deterministic", return_episode_rewards=True
        )
        return {f"{acting}_mean": f"{np.mean(returns):.3f}", f"{acting}_std": f"{np.std(returns):.3f}"}


class EvaluateToCsv(BaseCallback):
    """
    Evaluate at the steps of the cell, sampled and deterministic, and write the row.

    :param cell: The run
    :param path: CSV file
    :param rows: Evaluations made before the checkpoint that the run goes on from
    :param origin: Columns of this process: versions, hardware, command
    """

    def __init__(self, cell: Cell, path: Path, rows: list[Row], origin: Row) -> None:
        super().__init__()
        self.cell, self.path, self.rows, self.origin = cell, path, rows, origin
        self.evaluate = Evaluator(cell)
        self.steps = set(cell.steps)

    def _on_training_start(self) -> None:
        self.origin = {**self.origin, "resumed_from": str(self.model.num_timesteps)}
        self.train_seconds = float(self.rows[-1]["train_seconds"]) if self.rows else 0.0
        self.started = time.perf_counter()

    def _on_step(self) -> bool:
        if self.num_timesteps not in self.steps:
            return True
        self.train_seconds += time.perf_counter() - self.started
        row = {**self.origin, "timesteps": str(self.num_timesteps), "train_seconds": f"{self.train_seconds:.1f}"}
        # The evaluation must not change the run: its sampled actions come from a saved and restored generator
        states = th.get_rng_state(), np.random.get_state()
        th.manual_seed(self.evaluate.seed)
        for acting in ("sampled", "deterministic"):
            row |= self.evaluate(self.model, acting)
        th.set_rng_state(states[0])
        np.random.set_state(states[1])
        if isinstance(self.model, QSM):
            row["action_std"] = f"{self.model._action_std():.4f}"
        for key in _METRICS:
            value = self.model.logger.name_to_value.get(f"train/{key}")
            if value is not None:
                row[key] = f"{value:.5f}"
        self.rows.append(row)
        write_rows(self.path, self.rows)
        _print_progress(self.cell, row)
        self.started = time.perf_counter()
        return not self.cell.passed(self.rows)

    def _on_training_end(self) -> None:
        self.evaluate.env.close()


def train(cell: Cell, path: Path, command: str, save: bool = False) -> None:
    """
    Do what is left of a cell: nothing if it is finished, else go on from its checkpoint, if it has one. The checkpoint is
    beside the CSV and is deleted in the end.

    :param cell: The run
    :param path: CSV file
    :param command: Command that runs this cell again
    :param save: Save the trained model beside the CSV
    :raises CellError: if the CSV is of another run, or another process is training the cell
    """
    th.set_num_threads(1)
    folder = path.with_suffix(".checkpoint")
    # Its training may have died between the last row and the end of the model's file
    unsaved = save and (folder / CHECKPOINT_NAME).is_file() and not path.with_suffix(".zip").is_file()
    if cell.finished(read_rows(path, cell)) and not unsaved:
        print(f"{path} is finished", flush=True)
        if folder.is_dir():
            # Killed after its last row
            with contextlib.suppress(Timeout), FileLock(folder / ".lock").acquire(timeout=0):
                shutil.rmtree(folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder / ".lock").acquire(timeout=LOCK_TIMEOUT)
    except Timeout as error:
        raise CellError(f"another process is training {path}") from error
    with lock:
        rows = read_rows(path, cell)
        if unsaved or not cell.finished(rows):
            origin = {**cell.identity(), **_origin(), "command": command}
            if cell.algo == RANDOM:
                _evaluate_random(cell, path, origin)
            else:
                _train(cell, path, rows, origin, save)
        shutil.rmtree(folder)


def _train(cell: Cell, path: Path, rows: list[Row], origin: Row, save: bool) -> None:
    folder = path.with_suffix(".checkpoint")
    env = make_vec_env(partial(make_env, cell.env), seed=cell.seed)
    resumed = (folder / CHECKPOINT_NAME).is_file()
    note, identity = folder / "cell.json", json.dumps(cell.identity(), sort_keys=True)
    if resumed and note.is_file() and note.read_text() != identity:
        raise CellError(f"{folder} is the checkpoint of another run ({note.read_text()}): delete it, or choose another --out")
    note.write_text(identity)
    if resumed:
        step = read_info(folder)["num_timesteps"]
        rows = [row for row in rows if int(row["timesteps"]) <= step]
        if [int(row["timesteps"]) for row in rows] != [expected for expected in cell.steps if expected <= step]:
            print(f"{path} lacks rows of before its checkpoint: it starts anew", flush=True)
            (folder / CHECKPOINT_NAME).unlink()
            resumed = False
    if resumed:
        model = resume(ALGORITHMS[cell.algo], folder, env, device="cpu")
    else:
        rows = []
        preset = PRESETS[cell.preset](cell.timesteps, int(np.prod(env.action_space.shape)))
        # SB3 writes to the policy's arguments
        kwargs = {**preset, **copy.deepcopy(cell.kwargs)}
        model = ALGORITHMS[cell.algo]("MlpPolicy", env, seed=cell.seed, device="cpu", **kwargs)
    callbacks: list[BaseCallback] = [
        EvaluateToCsv(cell, path, rows, origin),
        RunCheckpointCallback(cell.checkpoint_freq, folder),
    ]
    left = cell.timesteps - model.num_timesteps
    model.learn(left, callback=callbacks, log_interval=10**9, reset_num_timesteps=not resumed)
    if save:
        model.save(path.with_suffix(".zip"))


def _evaluate_random(cell: Cell, path: Path, origin: Row) -> None:
    evaluate = Evaluator(cell)
    policy = RandomPolicy(evaluate.env.action_space)
    policy.action_space.seed(evaluate.seed)
    row = {**origin, "timesteps": "0", "resumed_from": "0", **evaluate(policy, "sampled")}
    write_rows(path, [row])
    _print_progress(cell, row)


def _print_progress(cell: Cell, row: Row) -> None:
    mean, std = (float(row[f"{cell.acting}_{what}"]) for what in ("mean", "std"))
    print(
        f"{cell.name} {cell.env} seed {cell.seed}: return {mean:.1f} ± {std:.1f} "
        f"after {int(row['timesteps']):,} of {cell.timesteps:,} steps",
        flush=True,
    )


def read_rows(path: Path, cell: Cell) -> list[Row]:
    """
    Read the evaluations of a cell.

    :param path: CSV file
    :param cell: The run
    :return: Rows, none if there is no such file
    :raises CellError: if they are of another run
    """
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        for column, value in cell.identity().items():
            if row.get(column) != value:
                raise CellError(
                    f"{path} is of a run with {column} = {row.get(column)}, not {value}: take another folder or another name "
                    "of the setting, or delete the file"
                )
    return rows


def write_rows(path: Path, rows: list[Row]) -> None:
    """
    Replace the evaluations of a cell, atomically.

    :param path: CSV file
    :param rows: Rows
    """
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _origin() -> Row:
    """Versions and hardware."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = ""
    return {
        "commit": _commit(),
        "sb3_qsm": sb3_qsm.__version__,
        **versions,
        "python": platform.python_version(),
        "cpu": th.cpu.get_capabilities().get("cpu_name", platform.machine()),
    }


def _commit() -> str:
    """Commit of the package that runs, marked when its code or the benchmarks' was changed since; empty outside of git."""
    if shutil.which("git") is None:
        return ""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        folder = Path(sb3_qsm.__file__).parent
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/sb3_qsm", ":/benchmarks/*.py")
    return git("rev-parse", "--short=7", "HEAD") + ("-dirty" if changed else "")
