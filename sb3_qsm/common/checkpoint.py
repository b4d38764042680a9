"""
Checkpoints from which a killed run goes on.

SB3 saves a model, a replay buffer and ``VecNormalize`` statistics one by one; a run killed between two of the writes leaves
files that do not belong together. A checkpoint here is one file with everything in it, written under a temporary name, flushed
to the disk and renamed, so that the newest checkpoint is always whole.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import random
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EvalCallback, EventCallback
from stable_baselines3.common.monitor import get_monitor_files
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecNormalize
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_qsm.common.buffers import cut_off_episodes
from sb3_qsm.common.files import BAD_ZIP, own_errors, replacing

CHECKPOINT_NAME = "checkpoint.zip"
FORMAT = 1
_INFO = ("algorithm", "num_timesteps", "n_envs", "vec_normalize")
_BUFFER_ARGUMENTS = (
    "buffer_size",
    "n_steps",
    "n_sampled_goal",
    "goal_selection_strategy",
    "handle_timeout_termination",
    "max_successes",
    "max_points",
)
_MEMBERS = ("model.zip", "state.pkl", "replay_buffer.pkl")

AlgorithmT = TypeVar("AlgorithmT", bound=OffPolicyAlgorithm)

# SB3's buffers of which nothing beyond the rows already written matters; ours say so by ``rowwise``. Others are stored whole
_ROWWISE_BUFFERS = (ReplayBuffer, DictReplayBuffer, NStepReplayBuffer, HerReplayBuffer)
# What SB3's callbacks remember between calls (their settings, in contrast, are the new run's)
_CALLBACK_STATE = (
    "n_calls",
    "num_timesteps",
    "best_mean_reward",
    "last_mean_reward",
    "evaluations_results",
    "evaluations_timesteps",
    "evaluations_length",
    "evaluations_successes",
    "last_time_trigger",
    "last_best_mean_reward",
    "no_improvement_evals",
    "n_episodes",
)


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or of another run."""


def checkpoint_path(path: str | os.PathLike[str]) -> Path:
    """
    File of the checkpoint.

    :param path: A run's folder or the checkpoint itself
    :return: Path of the checkpoint
    :raises CheckpointError: if there is none
    """
    path = Path(path)
    found = path / CHECKPOINT_NAME if path.is_dir() else path
    if not found.is_file():
        raise CheckpointError(f"no checkpoint at {str(path)!r}: expected a folder that holds {CHECKPOINT_NAME}, or that file")
    return found


def read_info(path: str | os.PathLike[str]) -> dict[str, Any]:
    """
    Check a checkpoint from its first to its last byte and read what it is of.

    :param path: A run's folder or the checkpoint itself
    :return: ``algorithm`` (class name), ``num_timesteps``, ``n_envs``, ``vec_normalize`` (bool), and ``log`` (its folder in
        ``tensorboard_log`` or None; not in files of older versions)
    :raises CheckpointError: if there is none, it is damaged, or no checkpoint of this package
    """
    found = checkpoint_path(path)
    with open(found, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
                info = json.loads(archive.read("info.json"))
                missing = [name for name in _MEMBERS if name not in archive.namelist()]
        except BAD_ZIP as error:
            raise CheckpointError(f"{str(found)!r} is not a checkpoint written by sb3_qsm, or is damaged: {error}") from error
    if damaged is not None:
        raise CheckpointError(f"{str(found)!r} is damaged: wrong checksum of {damaged}")
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        raise CheckpointError(f"{str(found)!r} is not a checkpoint of format {FORMAT} of sb3_qsm")
    missing += [name for name in _INFO if name not in info]
    if missing:
        raise CheckpointError(f"{str(found)!r} is not a checkpoint written by sb3_qsm: it has no {', '.join(missing)}")
    return info


def save_checkpoint(
    model: OffPolicyAlgorithm, path: str | os.PathLike[str], callback: BaseCallback | None = None
) -> dict[str, Any]:
    """
    Write everything that continuing ``model``'s training needs, atomically. The previous checkpoint is kept until the new one
    is whole and on the disk.

    :param model: Model, between two rollouts
    :param path: Folder that gets ``checkpoint.zip``; it is created if needed
    :param callback: Callback of the training, whose counters are stored too
    :return: What :func:`read_info` will give
    :raises OSError: if it cannot be written, for instance because the disk is full
    """
    folder = Path(path)
    assert model.env is not None, "Only a model with an environment can be continued"
    vec_normalize = model.get_vec_normalize_env()
    info = {
        "format": FORMAT,
        "algorithm": type(model).__name__,
        "num_timesteps": model.num_timesteps,
        "n_envs": model.env.num_envs,
        "vec_normalize": vec_normalize is not None,
        "log": _log_name(model),
    }
    state = {
        "global_rng": _global_rng_state(),
        "env_rng": _env_rng(model.env),
        # It draws the actions of the first steps
        "action_rng": model.action_space.np_random,
        "callbacks": _callback_states(callback),
        "monitor_files": {os.path.basename(file): os.path.getsize(file) for file in get_monitor_files(str(folder))},
        "monitor_elapsed": _monitor_elapsed(model.env),
        "normalize_stats": None if vec_normalize is None else _normalize_stats(vec_normalize),
    }
    model_bytes = io.BytesIO()
    model.save(model_bytes)

    # Not compressed: the buffer is noise to a compressor and much larger than the rest
    target = folder / CHECKPOINT_NAME
    with replacing(target) as file, own_errors(), zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("info.json", json.dumps(info))
        archive.writestr("model.zip", model_bytes.getbuffer())
        archive.writestr("state.pkl", pickle.dumps(state))
        with archive.open("replay_buffer.pkl", "w", force_zip64=True) as member:
            pickle.dump(_buffer_state(model.replay_buffer), member, protocol=5)
    return info


def resume(
    algorithm: type[AlgorithmT],
    path: str | os.PathLike[str],
    env: GymEnv,
    device: th.device | str = "auto",
    **kwargs: Any,
) -> AlgorithmT:
    """
    Model, replay buffer, ``VecNormalize`` statistics (into ``env``), random number generators and counters of a checkpoint.
    Continue with ``model.learn(total_timesteps - model.num_timesteps, reset_num_timesteps=False)``.

    The environments start new episodes, since most environments cannot be saved; what the replay buffer holds of the
    interrupted ones is marked as cut off there (with ``HerReplayBuffer`` it is not replayed).

    :param algorithm: Class of the model
    :param path: A run's folder or the checkpoint itself
    :param env: Environment like the one of the interrupted run, with ``VecNormalize`` around it if it had that
    :param device: Device of the networks
    :param kwargs: Further arguments of ``load``, such as ``tensorboard_log``
    :return: The model
    :raises CheckpointError: if the checkpoint is missing, damaged, of another algorithm or does not fit ``env``
    """
    found = checkpoint_path(path)
    info = read_info(found)
    if info["algorithm"] != algorithm.__name__:
        raise CheckpointError(f"{str(found)!r} is a checkpoint of {info['algorithm']}, not of {algorithm.__name__}")
    with zipfile.ZipFile(found) as archive:
        state = pickle.loads(archive.read("state.pkl"))
        try:
            model = algorithm.load(io.BytesIO(archive.read("model.zip")), env=env, device=device, **kwargs)
        except ValueError as error:
            raise CheckpointError(f"{str(found)!r} does not fit the environment: {error}") from error
        assert model.env is not None
        if model.env.num_envs != info["n_envs"]:
            raise CheckpointError(f"{str(found)!r} is of a run with n_envs={info['n_envs']}, env has {model.env.num_envs}")
        vec_normalize = model.get_vec_normalize_env()
        if (vec_normalize is not None) != info["vec_normalize"]:
            has, lacks = ("the checkpoint", "env") if info["vec_normalize"] else ("env", "the checkpoint")
            raise CheckpointError(f"{str(found)!r} does not fit the environment: {has} has VecNormalize, {lacks} has not")
        if vec_normalize is not None:
            there, here = (_normalized(stats) for stats in (state["normalize_stats"], vars(vec_normalize)))
            if there != here:
                raise CheckpointError(
                    f"{str(found)!r} does not fit the environment: VecNormalize has statistics of {here} in env, of {there} "
                    "in the checkpoint"
                )
        with archive.open("replay_buffer.pkl") as member:
            _restore_buffer(model.replay_buffer, pickle.load(member))
    if vec_normalize is not None:
        vars(vec_normalize).update(state["normalize_stats"])
    _restore_env_rng(model.env, state["env_rng"])
    _restore_global_rng(state["global_rng"])
    if "action_rng" in state:  # not in files of older versions
        model.action_space._np_random = state["action_rng"]
    return model


class RunCheckpointCallback(BaseCallback):
    """
    Write a checkpoint at the start of the training, every ``save_freq`` environment steps and at the end, between two
    rollouts, where model, buffer and counters belong together. When the training goes on from a checkpoint in ``folder`` (that
    is, after :func:`resume`), the other callbacks get back their counters, and the monitor files in ``folder`` lose the
    episodes that were finished after it, since they will be played again.

    :param save_freq: Environment steps between two checkpoints, over all environments together
    :param folder: Folder that gets ``checkpoint.zip``
    :param verbose: Verbosity level: 0 for no output, 2 for a line with each checkpoint
    :raises ValueError: if ``save_freq`` is not positive
    :raises CheckpointError: when the training starts, if ``folder`` holds the checkpoint of another one
    """

    def __init__(self, save_freq: int, folder: str | os.PathLike[str], verbose: int = 0) -> None:
        super().__init__(verbose)
        if isinstance(save_freq, bool) or not isinstance(save_freq, int) or save_freq < 1:
            raise ValueError(f"save_freq must be an integer >= 1, got {save_freq!r}")
        self.save_freq = save_freq
        self.folder = Path(folder)
        self._saved_at: int | None = None

    def _on_training_start(self) -> None:
        assert isinstance(self.model, OffPolicyAlgorithm), "Only off-policy algorithms can be continued from a checkpoint"
        if (self.folder / CHECKPOINT_NAME).is_file():
            found = read_info(self.folder)
            there = f"{found['algorithm']} at step {found['num_timesteps']}"
            here = f"{type(self.model).__name__} at step {self.model.num_timesteps}"
            if there != here:
                raise CheckpointError(
                    f"{str(self.folder)!r} holds a checkpoint of {there}, this is {here}: "
                    "resume from it or take another folder"
                )
            if not self.locals["reset_num_timesteps"]:
                self._restore_surroundings()
                self._saved_at = self.model.num_timesteps

    def _restore_surroundings(self) -> None:
        with zipfile.ZipFile(self.folder / CHECKPOINT_NAME) as archive:
            state = pickle.loads(archive.read("state.pkl"))
        _restore_callback_states(self.locals.get("callback"), state["callbacks"])
        for name, size in state["monitor_files"].items():
            file = self.folder / name
            if file.is_file() and file.stat().st_size > size:
                os.truncate(file, size)
        _restore_monitor_elapsed(self.training_env, state["monitor_elapsed"])

    def _on_rollout_start(self) -> None:
        # The step callbacks run before the transition is stored and learned from, so this is the first whole state after them
        if self._saved_at is None or self.model.num_timesteps // self.save_freq > self._saved_at // self.save_freq:
            self._save()

    def _on_training_end(self) -> None:
        if self._saved_at != self.model.num_timesteps:
            self._save()

    def _save(self) -> None:
        assert isinstance(self.model, OffPolicyAlgorithm)
        save_checkpoint(self.model, self.folder, self.locals.get("callback"))
        self._saved_at = self.model.num_timesteps
        if self.verbose >= 2:
            print(f"Saved the checkpoint of step {self._saved_at} to {self.folder / CHECKPOINT_NAME}")

    def _on_step(self) -> bool:
        return True


def _log_name(model: OffPolicyAlgorithm) -> str | None:
    """Name of the folder in ``tensorboard_log`` that the training logs into, as far as it is there."""
    folder = getattr(getattr(model, "_logger", None), "dir", None)
    if folder is None or model.tensorboard_log is None:
        return None
    path = Path(folder)
    return path.name if path.parent == Path(model.tensorboard_log) else None


def _global_rng_state() -> dict[str, Any]:
    """The generators that SB3, its buffers and torch draw from are the global ones."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": th.get_rng_state(),
        "cuda": th.cuda.get_rng_state_all() if th.cuda.is_available() else [],
    }


def _restore_global_rng(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    th.set_rng_state(state["torch"])
    # A run may go on on a machine with fewer GPUs
    if len(state["cuda"]) == th.cuda.device_count():
        th.cuda.set_rng_state_all(state["cuda"])


def _env_rng(env: VecEnv) -> list[Any] | None:
    """Generators of the environments, which draw their next start states, or None where an environment has none to give."""
    return _attributes(env, "np_random")


def _restore_env_rng(env: VecEnv, generators: list[Any] | None) -> None:
    if generators is None:
        return
    # Seeds given before the first reset would start the generators anew at that reset
    base = env
    while isinstance(base, VecEnvWrapper):
        base = base.venv
    base._reset_seeds()
    for index, generator in enumerate(generators):
        env.set_attr("np_random", generator, indices=index)


def _monitor_elapsed(env: VecEnv) -> list[float] | None:
    """Seconds that the Monitor of each environment has counted."""
    starts = _attributes(env, "t_start")
    return None if starts is None else [time.time() - start for start in starts]


def _attributes(env: VecEnv, name: str) -> list[Any] | None:
    """An attribute of all environments, or None where one has it not."""
    try:
        # Asked first: an environment in a process of its own would end with the error
        return env.get_attr(name) if env.has_attr(name) else None
    except (AttributeError, NotImplementedError, TypeError):
        return None


def _restore_monitor_elapsed(env: VecEnv, elapsed: list[float] | None) -> None:
    if elapsed is None:
        return
    for index, seconds in enumerate(elapsed):
        # Monitor is seldom the outermost wrapper, and set_attr only reaches that one
        with contextlib.suppress(AttributeError):
            env.env_method("set_wrapper_attr", "t_start", time.time() - seconds, indices=index)


def _normalize_stats(vec_normalize: VecNormalize) -> dict[str, Any]:
    return {name: value for name, value in vars(vec_normalize).items() if name in ("obs_rms", "ret_rms")}


def _normalized(stats: dict[str, Any]) -> str:
    """Of which observations there are statistics."""
    found = stats.get("obs_rms")
    if isinstance(found, dict):
        return ", ".join(map(repr, sorted(found)))
    return "no observations" if found is None else "the observations"


def _callbacks(callback: BaseCallback | None) -> Iterator[BaseCallback]:
    """``callback`` and everything below it, parents first."""
    if callback is None:
        return
    yield callback
    children: list[BaseCallback | None] = []
    if isinstance(callback, CallbackList):
        children += callback.callbacks
    if isinstance(callback, EventCallback):
        children.append(callback.callback)
    if isinstance(callback, EvalCallback):
        children.append(callback.callback_on_new_best)
    for child in children:
        yield from _callbacks(child)


def _callback_states(callback: BaseCallback | None) -> list[tuple[str, dict[str, Any]]]:
    states = []
    for found in _callbacks(callback):
        state = {name: value for name, value in vars(found).items() if name in _CALLBACK_STATE}
        if isinstance(found, EvalCallback):
            state["eval_env_rng"] = _env_rng(found.eval_env)
        states.append((type(found).__name__, state))
    return states


def _restore_callback_states(callback: BaseCallback | None, states: list[tuple[str, dict[str, Any]]]) -> None:
    """Give each callback the state of the next one of its class; callbacks that are new start from nothing."""
    remaining = list(states)
    for found in _callbacks(callback):
        for index, (name, state) in enumerate(remaining):
            if name == type(found).__name__:
                state = dict(state)
                generators = state.pop("eval_env_rng", None)
                if isinstance(found, EvalCallback) and generators is not None and len(generators) == found.eval_env.num_envs:
                    _restore_env_rng(found.eval_env, generators)
                vars(found).update(state)
                del remaining[index]
                break


def _buffer_state(buffer: ReplayBuffer | None) -> dict[str, Any]:
    """State of a replay buffer, without the rows that were never written."""
    assert buffer is not None
    getstate = getattr(buffer, "__getstate__", None)
    state: dict[str, Any] = dict(getstate() if getstate is not None else vars(buffer))
    rowwise = type(buffer) in _ROWWISE_BUFFERS or getattr(buffer, "rowwise", False)
    if not rowwise or buffer.full:
        return state
    # One row more: with optimize_memory_usage the last next observation is there
    rows = min(buffer.pos + 1, buffer.buffer_size)

    def written(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: written(item) for key, item in value.items()}
        if isinstance(value, np.ndarray) and value.ndim > 0 and len(value) == buffer.buffer_size:
            return value[:rows]
        return value

    return {name: written(value) for name, value in state.items()}


def _restore_buffer(buffer: ReplayBuffer | None, state: dict[str, Any]) -> None:
    """Fill a buffer made by the same arguments; what is cut off by the environments' reset is marked so."""
    assert buffer is not None
    for name in _BUFFER_ARGUMENTS:
        there, here = state.get(name), getattr(buffer, name, None)
        if there != here:
            raise CheckpointError(f"the checkpoint's replay buffer has {name}={there}, the model's {name}={here}")

    def fill(target: Any, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(target, dict):
            return {key: fill(target.get(key), item) for key, item in value.items()}
        if isinstance(value, np.ndarray) and isinstance(target, np.ndarray) and len(value) < len(target):
            target[: len(value)] = value
            return target
        return value

    for name, value in state.items():
        # Device and spaces are those of the model just made
        if name not in ("device", "observation_space", "action_space", "env"):
            setattr(buffer, name, fill(getattr(buffer, name, None), value))
    cut_off_episodes(buffer)
