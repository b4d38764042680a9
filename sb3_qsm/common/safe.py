"""
Models in files that can be opened without trust.

SB3's ``load`` unpickles what a file holds, and a pickle runs any code. A safe file is one `safetensors
<https://github.com/huggingface/safetensors>`_ file: the tensors of the policy and of the optimizers and the arrays of the
configuration, and in its metadata the version of the format, the configuration as JSON and a checksum of all bytes. It is no
archive: there are no names of members, no compression, and no second place where a reader could look for the same thing.

The checksum finds damage. It protects from nobody, since whoever writes a file can compute it. What a file says is therefore
checked as if it were hostile: it names classes by their key in a table, never by where to import them from, and the networks
that it describes are first laid out without memory and compared with the tensors that are there.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import hashlib
import inspect
import io
import json
import math
import os
import reprlib
import types
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.noise import (
    NormalActionNoise,
    OrnsteinUhlenbeckActionNoise,
    VectorizedActionNoise,
)
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.save_util import open_path, recursive_getattr
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, NatureCNN
from stable_baselines3.common.type_aliases import GymEnv, Schedule, TrainFreq
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule, check_for_correct_spaces
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from stable_baselines3.her.goal_selection_strategy import GoalSelectionStrategy
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer
from torch import nn

from sb3_qsm.common.buffers import DictNStepReplayBuffer
from sb3_qsm.common.checks import check_integer, check_number, whole
from sb3_qsm.common.files import replacing

FORMAT = 1
SUFFIX = "safetensors"

#: Classes that a file may name. One of your own is allowed by an entry here, where the file is written and where it is read
CLASSES: dict[str, type] = {
    found.__name__: found
    for found in (
        *(nn.CELU, nn.ELU, nn.GELU, nn.Hardswish, nn.Identity, nn.LeakyReLU, nn.Mish, nn.ReLU, nn.ReLU6, nn.SELU),
        *(nn.Sigmoid, nn.SiLU, nn.Softplus, nn.Softsign, nn.Tanh),
        *(FlattenExtractor, NatureCNN, CombinedExtractor),
        *(th.optim.Adadelta, th.optim.Adagrad, th.optim.Adam, th.optim.Adamax, th.optim.AdamW, th.optim.NAdam),
        *(th.optim.RAdam, th.optim.RMSprop, th.optim.SGD),
        *(ReplayBuffer, DictReplayBuffer, NStepReplayBuffer, DictNStepReplayBuffer, HerReplayBuffer),
    )
}
_NOISE = {"mean": ("_mu", np.ndarray), "sigma": ("_sigma", np.ndarray), "dtype": ("_dtype", np.dtype)}
_OU_NOISE = {"theta": ("_theta", float), "dt": ("_dt", float), "initial_noise": ("initial_noise", np.ndarray | None)}
#: Objects that a file may describe: the class, and for each argument of its constructor the attribute with it and its type
OBJECTS: dict[str, tuple[Callable[..., Any], dict[str, tuple[str, Any]]]] = {
    "ConstantSchedule": (ConstantSchedule, {"val": ("val", float)}),
    "LinearSchedule": (LinearSchedule, {name: (name, float) for name in ("start", "end", "end_fraction")}),
    "FloatSchedule": (FloatSchedule, {"value_schedule": ("value_schedule", Schedule)}),
    "NormalActionNoise": (NormalActionNoise, _NOISE),
    "OrnsteinUhlenbeckActionNoise": (OrnsteinUhlenbeckActionNoise, {**_NOISE, **_OU_NOISE}),
    "VectorizedActionNoise": (
        VectorizedActionNoise,
        {"base_noise": ("base_noise", NormalActionNoise | OrnsteinUhlenbeckActionNoise), "n_envs": ("n_envs", int)},
    ),
    "Box": (spaces.Box, {"low": ("low", np.ndarray), "high": ("high", np.ndarray), "dtype": ("dtype", np.dtype)}),
    "Discrete": (spaces.Discrete, {"n": ("n", int), "start": ("start", int), "dtype": ("dtype", np.dtype)}),
    "MultiDiscrete": (
        spaces.MultiDiscrete,
        {"nvec": ("nvec", np.ndarray), "dtype": ("dtype", np.dtype), "start": ("start", np.ndarray)},
    ),
    "MultiBinary": (spaces.MultiBinary, {"n": ("n", int | tuple[int, ...])}),
    "Dict": (spaces.Dict, {"spaces": ("spaces", dict[str, spaces.Space[Any]])}),
}

# Integers that every JSON reader keeps, and what would take long before it is compared with the tensors
_MAX_INTEGER = 2**53
_LIMITS = {"best_of_n": 10_000, "diffusion_steps": 10_000, "n_critics": 100, "n_envs": 2**16, "buffer_size": 2**27}
_MAX_ITEMS = 2**12
_MAX_LAYERS = 64
_LAYERS = ("net_arch", "pi", "qf", "time_arch")
# Laying out a model draws an observation
_MAX_BITS = 2**20
_NO_CHECKSUM = "0" * 64
_COUNTERS = ("num_timesteps", "_total_timesteps", "_num_timesteps_at_start", "_n_updates", "_episode_num")
# Arguments that may be whole floats
_STEPS = ("learning_starts", "exploration_decay_steps", "clustering_freq")
_CONFIG = {
    "algorithm": str,
    "policy": str,
    "observation_space": spaces.Space,
    "action_space": spaces.Box,
    "n_envs": int,
    "arguments": dict[str, Any],
    "counters": dict[str, int],
    "progress_remaining": float,
    "episodes": list[dict[str, float]],
    "successes": list[float],
    "learning_rates": dict[str, list[float]],
    "vec_normalize": dict[str, Any] | None,
    "state": dict[str, Any],
}
# Arguments of the constructor that are no part of the model, or have a place of their own. The log folder is the writer's
_LEFT_OUT = ("self", "policy", "env", "tensorboard_log", "device", "_init_setup_model")
_CLIPS = ("clip_obs", "clip_reward")
_VEC_NORMALIZE = [name for name in inspect.signature(VecNormalize).parameters if name != "venv"]
# What a model that is only laid out does without
_LAID_OUT = {
    "action_noise": None,
    "buffer_size": 1,
    "compile": False,
    "n_steps": 1,
    "optimize_memory_usage": False,
    "precision": "float32",
    "replay_buffer_class": None,
    "replay_buffer_kwargs": None,
    "seed": None,
    "tensorboard_log": None,
    "verbose": 0,
}

AlgorithmT = TypeVar("AlgorithmT", bound=OffPolicyAlgorithm)
SafePath = str | os.PathLike[str] | io.BufferedIOBase
Tensors = dict[str, th.Tensor]


def save_safe(model: OffPolicyAlgorithm, path: SafePath) -> None:
    """
    Write a model to a file that :func:`load_safe` opens without running code: networks, optimizers, hyperparameters, counters,
    and the statistics of ``VecNormalize`` if its environment has that. As with ``save``, the replay buffer is not in it;
    neither is the folder of TensorBoard's logs.

    :param model: The model
    :param path: File to write (``.safetensors`` is added to a name without suffix) or a binary stream
    :raises ValueError: if something of the model cannot be expressed, such as a function as schedule or a class that is not in
        :data:`CLASSES`, or is not finite; the message names it. Nothing is written then
    :raises OSError: if the file cannot be written, for instance because the disk is full; what was there is still there
    :raises ImportError: if safetensors is not installed
    """
    safetensors_torch = _import_safetensors()
    algorithm = type(model)
    tensors = {name: recursive_getattr(model, name) for name in model._get_torch_save_params()[1]}
    learning_rates = {}
    for name, state in model.get_parameters().items():
        if isinstance(recursive_getattr(model, name), th.optim.Optimizer):
            learning_rates[name] = [group["lr"] for group in state["param_groups"]]
            # An entry that is None is as good as none
            entries = {f"{i}.{key}": value for i, slots in state["state"].items() for key, value in slots.items()}
            state = {key: value for key, value in entries.items() if value is not None}
        tensors.update({f"{name}.{key}": value for key, value in state.items()})
    for name, tensor in tensors.items():
        if not isinstance(tensor, th.Tensor):
            raise ValueError(f"{name} must be a tensor to be saved safely, got {tensor!r}")
    policies = [name for name, policy in algorithm.policy_aliases.items() if policy is model.policy_class]
    if not policies:
        raise ValueError(f"policy must be one of {', '.join(algorithm.policy_aliases)}, got {model.policy_class.__name__}")
    attributes = {"stats_window_size": "_stats_window_size"}
    state_of = getattr(model, "_safe_state", None)
    config = {
        "algorithm": algorithm.__name__,
        "policy": policies[0],
        "observation_space": model.observation_space,
        "action_space": model.action_space,
        "n_envs": model.n_envs,
        "arguments": {name: _plain(name, getattr(model, attributes.get(name, name))) for name in _argument_names(algorithm)},
        # SB3 takes 1e6 for a number of steps
        "counters": {name: whole(getattr(model, name)) for name in _COUNTERS},
        "progress_remaining": model._current_progress_remaining,
        "episodes": [{key: info[key] for key in "rlt" if key in info} for info in model.ep_info_buffer or ()],
        "successes": [float(success) for success in model.ep_success_buffer or ()],
        "learning_rates": learning_rates,
        "vec_normalize": _vec_normalize_state(model.get_vec_normalize_env()) or getattr(model, "_loaded_statistics", None),
        "state": {} if state_of is None else state_of(),
    }
    encoded = {name: _encode(value, name, tensors) for name, value in config.items()}
    metadata = {"format": FORMAT, "sha256": _NO_CHECKSUM, "config": encoded}
    # Copies: the file format has no tensors that share memory, as those of a shared features extractor do
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    unsigned: bytes = safetensors_torch.save(copies, {"sb3_qsm": json.dumps(metadata, allow_nan=False)})
    content = unsigned.replace(_NO_CHECKSUM.encode(), hashlib.sha256(unsigned).hexdigest().encode(), 1)

    # What is written can be read
    with _refusing("The model cannot be saved safely"):
        config, copies = _parse(content)
        laid_out = _lay_out(algorithm, config, copies, {})
    _check_options(model, laid_out)
    if isinstance(path, io.BufferedIOBase):
        path.write(content)
        return
    target = Path(path)
    with replacing(target if target.suffix else target.with_name(f"{target.name}.{SUFFIX}")) as file:
        file.write(content)


def load_safe(
    algorithm: type[AlgorithmT],
    path: SafePath,
    env: GymEnv | None = None,
    device: th.device | str = "auto",
    **kwargs: Any,
) -> AlgorithmT:
    """
    Read a model that :func:`save_safe` wrote. Nothing is unpickled, and nothing that the file names is imported. With the same
    generators, environment and replay buffer, a training goes on as after ``load``, bit for bit.

    :param algorithm: Class of the model
    :param path: File or a binary stream
    :param env: Environment to go on with; it is reset before training. None to predict only
    :param device: Device of the networks
    :param kwargs: Arguments of the constructor that replace those in the file, such as ``buffer_size`` or ``tensorboard_log``
    :return: The model
    :raises ValueError: if the file was not written by :func:`save_safe`, is damaged, is of another algorithm or a newer
        format, says anything that is not allowed, or does not fit ``env``
    :raises TypeError: if an argument in ``kwargs`` is not one of the constructor
    :raises ImportError: if safetensors is not installed
    """
    for name in kwargs:
        if name not in (*_argument_names(algorithm), "tensorboard_log"):
            raise TypeError(f"{algorithm.__name__} has no argument {name!r} that could replace one of the file")
    file, config, tensors = _read(path)
    with _refusing(f"{file} holds no model of {algorithm.__name__}"):
        _lay_out(algorithm, config, tensors, kwargs)
    with _refusing(f"The model in {file} does not fit"):
        arguments = {**config["arguments"], **kwargs}
        model = algorithm(config["policy"], env, device=device, _init_setup_model=False, **arguments)  # type: ignore[call-arg,arg-type]
        if model.env is None:
            model.n_envs = config["n_envs"]
        else:
            check_for_correct_spaces(model.env, config["observation_space"], config["action_space"])
        model.observation_space, model.action_space = config["observation_space"], config["action_space"]
        for name, value in config["counters"].items():
            setattr(model, name, value)
        _set_state(model, config)
        model._current_progress_remaining = config["progress_remaining"]
        model.ep_info_buffer = collections.deque(config["episodes"], maxlen=model._stats_window_size)
        model.ep_success_buffer = collections.deque(config["successes"], maxlen=model._stats_window_size)
        model._setup_model()
        model.set_parameters(_parameters(model, config, tensors, kwargs), exact_match=True, device=device)
        for name in model._get_torch_save_params()[1]:
            recursive_getattr(model, name).data.copy_(tensors[name])
    statistics = config["vec_normalize"]
    if statistics is not None:
        # For `save_safe` where no environment has any
        vars(model)["_loaded_statistics"] = statistics
        here = _vec_normalize_state(model.get_vec_normalize_env())
        if model.env is not None and (here is None or (_count(statistics) >= 1 > _count(here))):
            warnings.warn(
                f"{file} holds statistics of VecNormalize, which the environment lacks: wrap it by load_vec_normalize",
                stacklevel=3,
            )
    return model


def _count(statistics: dict[str, Any]) -> float:
    """Number of observations behind the statistics of observations, of rewards if there are none; a fraction at first."""
    found: Any = statistics.get("obs_rms")
    if isinstance(found, dict) and "count" not in found:
        found = next(iter(found.values()), None)
    found = found or statistics.get("ret_rms")
    count = found.get("count") if isinstance(found, dict) else None
    return float(count) if isinstance(count, (int, float)) else 0.0


def load_vec_normalize(path: SafePath, venv: VecEnv) -> VecNormalize:
    """
    Read the statistics of ``VecNormalize`` from a file that :func:`save_safe` wrote, as ``VecNormalize.load`` does from a
    pickle.

    :param path: File or a binary stream
    :param venv: Environments to wrap
    :return: The environments in ``VecNormalize``
    :raises ValueError: if the file is none of :func:`save_safe`, or holds no statistics, or they do not fit ``venv``
    :raises ImportError: if safetensors is not installed
    """
    file, config, _ = _read(path)
    state = config["vec_normalize"]
    if state is None:
        raise ValueError(f"{file} holds a model that was trained without VecNormalize")
    with _refusing(f"The statistics in {file} do not fit"):
        hints: dict[str, Any] = dict.fromkeys(("gamma", "epsilon"), float)
        hints |= dict.fromkeys(_CLIPS, float | None)
        hints |= {**dict.fromkeys(("training", "norm_obs", "norm_reward"), bool), "norm_obs_keys": list[str] | None}
        arguments = _fields(state["arguments"], hints, "vec_normalize")
        for name in (*_CLIPS, "epsilon"):
            if name in _CLIPS and arguments[name] is None:
                arguments[name] = math.inf
            else:
                check_number(name, arguments[name], 0.0, strict=name in _CLIPS)
        check_number("gamma", arguments["gamma"], 0.0, high=1.0)
        env = VecNormalize(venv, **arguments)
        for name in ("obs_rms", "ret_rms"):
            made: Any = getattr(env, name, None)
            found = state[name] if isinstance(made, dict) else {"": state[name]}
            for key, statistics in (made if isinstance(made, dict) else {"": made} if made is not None else {}).items():
                values = _fields(found[key], {"mean": np.ndarray, "var": np.ndarray, "count": float}, name)
                if not values["mean"].shape == values["var"].shape == statistics.mean.shape:
                    raise ValueError(f"{name} must be of shape {statistics.mean.shape}, got {values['mean'].shape}")
                check_number(f"{name}.count", values["count"], 0.0)
                for part, low in (("mean", -np.inf), ("var", 0.0)):
                    array = values[part]
                    if array.dtype != np.float64 or not np.isfinite(array).all() or (array < low).any():
                        sign = " and not negative" if part == "var" else ""
                        raise ValueError(f"{name}.{part} must be finite{sign}, of float64, got {reprlib.repr(array)}")
                vars(statistics).update(values)
    return env


def has_vec_normalize(path: SafePath) -> bool:
    """
    Whether a file holds statistics for :func:`load_vec_normalize`.

    :param path: File that :func:`save_safe` wrote
    :return: Whether the model was trained with ``VecNormalize``
    :raises ValueError: if the file is none of :func:`save_safe`
    :raises ImportError: if safetensors is not installed
    """
    return _read(path)[1]["vec_normalize"] is not None


def _vec_normalize_state(env: VecNormalize | None) -> dict[str, Any] | None:
    if env is None:
        return None

    def statistics(found: Any) -> Any:
        if isinstance(found, dict):
            return {key: statistics(value) for key, value in found.items()}
        if isinstance(found, RunningMeanStd):
            return {"mean": np.asarray(found.mean), "var": np.asarray(found.var), "count": found.count}
        return found

    # An infinite bound switches clipping off, and has no place in JSON
    arguments = {name: getattr(env, name) for name in _VEC_NORMALIZE}
    arguments |= {name: None for name in _CLIPS if arguments[name] == math.inf}
    if arguments["norm_obs_keys"] is not None:
        arguments["norm_obs_keys"] = list(arguments["norm_obs_keys"])
    return {"arguments": arguments, "obs_rms": statistics(getattr(env, "obs_rms", None)), "ret_rms": statistics(env.ret_rms)}


def _import_safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError('Safe models need safetensors: pip install "sb3-qsm[safe]"') from error
    return safetensors.torch


def _read(path: SafePath) -> tuple[str, dict[str, Any], Tensors]:
    """Read a file to its last byte, check the checksum and decode the configuration: name, configuration, tensors."""
    _import_safetensors()
    source = path if isinstance(path, io.BufferedIOBase) else Path(path)
    if isinstance(source, Path) and source.is_dir():
        source = source.with_name(f"{source.name}.{SUFFIX}")
    file: Any = open_path(source, "r", verbose=0, suffix=SUFFIX)
    name = "The stream" if isinstance(path, io.BufferedIOBase) else repr(os.fspath(path))
    try:
        content = file.read()
    finally:
        if file is not path:
            file.close()
    if content[:4] == b"PK\x03\x04":
        raise ValueError(f"{name} is a zip file, as `save` writes; safe are only files written by `save_safe`")
    with _refusing(f"{name} was not written by `save_safe`, or is truncated or damaged"):
        return name, *_parse(content)


def _parse(content: bytes) -> tuple[dict[str, Any], Tensors]:
    """Check the bytes of a file: configuration, tensors."""
    # It checks the header, which therefore is JSON without surprises
    tensors: Tensors = _import_safetensors().load(content)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    metadata = json.loads(header["__metadata__"]["sb3_qsm"])
    if metadata["format"] != FORMAT:
        raise ValueError(f"its format is {reprlib.repr(metadata['format'])}, this release reads {FORMAT} only")
    unsigned = content.replace(metadata["sha256"].encode(), _NO_CHECKSUM.encode(), 1)
    if hashlib.sha256(unsigned).hexdigest() != metadata["sha256"]:
        raise ValueError("its checksum is wrong")
    config: dict[str, Any] = _decode(metadata["config"], "", tensors)
    _fields(config, _CONFIG, "config")
    _fields(config["counters"], dict.fromkeys(_COUNTERS, int), "counters")
    for counter, value in config["counters"].items():
        check_integer(f"counters.{counter}", value, 0)
    for optimizer, rates in config["learning_rates"].items():
        for rate in rates:
            check_number(f"learning_rates.{reprlib.repr(optimizer)}", rate, 0.0)
    # Below zero it is after more steps than were asked for
    check_number("progress_remaining", config["progress_remaining"], -_MAX_INTEGER, high=1.0)
    for key, item in config["state"].items():
        if isinstance(item, list) and len(item) > len(tensors):
            raise ValueError(f"state.{reprlib.repr(key)} must be of networks that are there, got {reprlib.repr(item)}")
    return config, tensors


def _lay_out(
    algorithm: type[OffPolicyAlgorithm], config: dict[str, Any], tensors: Tensors, changes: dict[str, Any]
) -> OffPolicyAlgorithm:
    """Lay out the model that a file describes, without memory for its networks, and compare it with the tensors there."""
    if config["algorithm"] != algorithm.__name__:
        raise ValueError(f"it is one of {reprlib.repr(config['algorithm'])}")
    policy_class: Any = algorithm.policy_aliases.get(config["policy"])
    if policy_class is None:
        raise ValueError(f"policy must be one of {', '.join(algorithm.policy_aliases)}, got {config['policy']!r}")
    bounds = config["action_space"]
    if not (np.isfinite(bounds.low).all() and np.isfinite(bounds.high).all()):
        raise ValueError(f"action_space must be bounded, got {reprlib.repr(bounds)}")
    # SB3's hints name VecEnv without importing it
    hints = typing.get_type_hints(algorithm.__init__, localns={"VecEnv": VecEnv})
    # What is missing is newer than the file, and takes its default
    _fields(config["arguments"], {name: hints[name] for name in _argument_names(algorithm)}, "", partial=True)
    hints = {**_constructor_hints(policy_class), "use_sde": bool}
    _fields(config["arguments"].get("policy_kwargs") or {}, hints, "policy_kwargs", partial=True)

    # The sizes of networks can be anything before they are compared, so that the tensors are of the device without memory
    meta = th.device("meta")
    # Without the average of the actor a policy leaves out that of the file, and begins one at the actor
    arguments = {**config["arguments"], **{name: value for name, value in changes.items() if name != "actor_ema"}}
    arguments |= {name: value for name, value in _LAID_OUT.items() if name in arguments}
    laid_out: Any = type("LaidOut", (policy_class,), {"device": meta})
    model: Any = algorithm(laid_out, None, device="cpu", _init_setup_model=False, **arguments)  # type: ignore[call-arg,arg-type]
    model.device = meta
    model.n_envs = 1
    # Laying out may draw a sample, and the generators of the spaces are part of the model
    model.observation_space, model.action_space = copy.deepcopy((config["observation_space"], config["action_space"]))
    _set_state(model, config)
    with meta:
        model._setup_model()

    layout = {name: recursive_getattr(model, name) for name in model._get_torch_save_params()[1]}
    rates = {}
    for name, state in model.get_parameters().items():
        optimizer = recursive_getattr(model, name)
        if isinstance(optimizer, th.optim.Optimizer):
            rates[name] = [float(group["lr"]) for group in optimizer.param_groups]
            layout.update(_optimizer_layout(name, optimizer, tensors))
        else:
            layout.update({f"{name}.{key}": value for key, value in state.items()})
    found = {name: len(values) for name, values in config["learning_rates"].items()}
    if found != {name: len(values) for name, values in rates.items()}:
        raise ValueError(f"learning_rates must be as many as in {rates}, got {reprlib.repr(config['learning_rates'])}")
    for name, expected in layout.items():
        if name not in tensors:
            raise ValueError(f"the tensor {name!r} is missing")
        if (tensors[name].shape, tensors[name].dtype) != (expected.shape, expected.dtype):
            shape, dtype = tuple(tensors[name].shape), tensors[name].dtype
            raise ValueError(f"the tensor {name!r} must be {tuple(expected.shape)} {expected.dtype}, got {shape} {dtype}")
        if not tensors[name].isfinite().all():
            raise ValueError(f"the tensor {name!r} must be finite")
    for name in tensors:
        if name not in layout:
            raise ValueError(f"the tensor {reprlib.repr(name)} belongs to nothing")
    return typing.cast(OffPolicyAlgorithm, model)


def _set_state(model: Any, config: dict[str, Any]) -> None:
    """Give an algorithm that has more to remember than its arguments and its tensors what the file says of it."""
    _fields(config["state"], getattr(model, "safe_state", {}), "state")
    if config["state"]:
        model._set_safe_state(**config["state"])


def _optimizer_layout(name: str, optimizer: th.optim.Optimizer, tensors: Tensors) -> Tensors:
    """What an optimizer keeps for its parameters, found by a step of another one of its kind."""
    trial_parameter = nn.Parameter(th.zeros(2))
    trial_parameter.grad = th.zeros(2)
    known = inspect.signature(type(optimizer)).parameters
    options = {key: value for key, value in optimizer.param_groups[0].items() if key in known and key != "params"}
    trial: Any = type(optimizer)([trial_parameter], **options)
    trial.step()
    slots = {key: value for key, value in trial.state[trial_parameter].items() if value is not None}
    layout = {}
    for index, parameter in enumerate(parameter for group in optimizer.param_groups for parameter in group["params"]):
        # A parameter has no state before its first step
        if any(f"{name}.{index}.{key}" in tensors for key in slots):
            for key, value in slots.items():
                layout[f"{name}.{index}.{key}"] = value if value.dim() == 0 else parameter
    return layout


def _check_options(model: OffPolicyAlgorithm, laid_out: OffPolicyAlgorithm) -> None:
    """Refuse options of an optimizer, except its learning rate, that were changed by hand: the file has the arguments only."""
    for name, state in model.get_parameters().items():
        if isinstance(recursive_getattr(model, name), th.optim.Optimizer):
            for group, made in zip(state["param_groups"], recursive_getattr(laid_out, name).param_groups, strict=True):
                changed = [key for key in group if key not in ("params", "lr") and group[key] != made.get(key)]
                if changed:
                    raise ValueError(
                        f"{name}: {changed[0]} was changed after the model was made, which cannot be saved safely"
                    )


def _parameters(
    model: OffPolicyAlgorithm, config: dict[str, Any], tensors: Tensors, changes: dict[str, Any]
) -> dict[str, Any]:
    """The tensors as ``set_parameters`` takes them."""
    parameters: dict[str, Any] = {}
    for name, state in model.get_parameters().items():
        own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        parameters[name] = own
        if isinstance(recursive_getattr(model, name), th.optim.Optimizer):
            slots: dict[int, Tensors] = {}
            for key, value in own.items():
                index, _, slot = key.partition(".")
                slots.setdefault(int(index), {})[slot] = value
            rates = config["learning_rates"][name]
            if f"{name.removesuffix('_optimizer')}_learning_rate" in changes:
                # At once, not first at the next update
                rates = [group["lr"] for group in state["param_groups"]]
            groups = zip(state["param_groups"], rates, strict=True)
            parameters[name] = {"state": slots, "param_groups": [{**group, "lr": rate} for group, rate in groups]}
    return parameters


def _constructor_hints(cls: type) -> dict[str, Any]:
    """Types of the arguments of a class, with those that it hands on to its bases."""
    hints: dict[str, Any] = {}
    for base in cls.__mro__:
        if "__init__" in vars(base):
            hints = {**typing.get_type_hints(vars(base)["__init__"]), **hints}
            parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
                break
    return hints


def _argument_names(algorithm: type[OffPolicyAlgorithm]) -> list[str]:
    return [name for name in inspect.signature(algorithm).parameters if name not in _LEFT_OUT]


def _plain(name: str, value: Any) -> Any:
    """An argument in the form that a file has for it, where the constructor takes others too."""
    if name in _STEPS:
        return whole(value)
    if name == "position" and isinstance(value, (range, np.ndarray)):
        return [int(index) for index in value]
    return value


def _encode(value: Any, name: str, tensors: Tensors) -> Any:
    """A value as JSON; what JSON has no form for is a dictionary with a key that begins with @, and arrays are tensors."""
    if isinstance(value, (np.number, np.bool_)):
        value = value.item()
    elif isinstance(value, GoalSelectionStrategy):
        value = value.name.lower()
    elif isinstance(value, TrainFreq):
        value = (value.frequency, value.unit.value)
    match value:
        case None | bool() | str():
            return value
        case int() if abs(value) <= _MAX_INTEGER:
            return value
        case float() if math.isfinite(value):
            return value
        case list() if len(value) <= _MAX_ITEMS:
            return [_encode(item, f"{name}[{index}]", tensors) for index, item in enumerate(value)]
        case tuple() if len(value) <= _MAX_ITEMS:
            return {"@tuple": _encode(list(value), name, tensors)}
        case dict() if all(isinstance(key, str) and not key.startswith("@") for key in value):
            return {key: _encode(item, _join(name, key), tensors) for key, item in value.items()}
        case np.ndarray() if value.dtype.kind in "biuf":
            key = f"arrays.{len(tensors)}"
            tensors[key] = th.from_numpy(value.astype(value.dtype.newbyteorder("=")))
            return {"@array": key}
        case np.random.Generator() if isinstance(value.bit_generator, np.random.PCG64):
            state: Any = value.bit_generator.state
            return {"@generator": [*state["state"].values(), state["has_uint32"], state["uinteger"]]}
    for key, (kind, fields) in OBJECTS.items():
        if type(value) is kind:
            arguments = {}
            for argument, (attribute, hint) in fields.items():
                found = getattr(value, attribute)
                found = np.dtype(found).name if hint is np.dtype else found
                arguments[argument] = _encode(found, f"{name}.{argument}", tensors)
            if isinstance(value, spaces.Space):
                arguments["@random"] = _encode(value._np_random, f"{name}._np_random", tensors)
            return {"@object": key, **arguments}
    for key, kind in CLASSES.items():
        if value is kind:
            return {"@class": key}
    raise ValueError(f"{name}={reprlib.repr(value)} cannot be saved safely: it is no finite number, string, array, list or "
                     f"dictionary, nor one of {', '.join([*OBJECTS, *CLASSES])}")  # fmt: skip


def _decode(data: Any, name: str, tensors: Tensors) -> Any:
    """The value that :func:`_encode` made this of; the arrays are taken out of the tensors."""

    def refuse(allowed: str) -> typing.NoReturn:
        raise ValueError(f"{name} must be {allowed}, got {reprlib.repr(data)}")

    match data:
        case None | bool() | str():
            return data
        case int():
            limit = _LIMITS.get(name.rpartition(".")[2], _MAX_INTEGER)
            return data if abs(data) <= limit else refuse(f"at most {limit:,}")
        case float():
            return data if math.isfinite(data) else refuse("finite")
        case list():
            most = _MAX_LAYERS if name.rpartition(".")[2] in _LAYERS else _MAX_ITEMS
            if len(data) > most:
                refuse(f"a list of at most {most:,}")
            return [_decode(item, f"{name}[{index}]", tensors) for index, item in enumerate(data)]
        case {"@tuple": list() as items, **rest} if not rest:
            return tuple(_decode(items, name, tensors))
        case {"@array": str() as key, **rest} if not rest and key.startswith("arrays.") and key in tensors:
            return tensors.pop(key).numpy()
        case {"@generator": [int() as state, int() as inc, bool() | int() as has, int() as uinteger], **rest} if not rest:
            bits = np.random.PCG64(0)
            if not (0 <= state < 2**128 and 0 <= inc < 2**128 and 0 <= has <= 1 and 0 <= uinteger < 2**32):
                refuse("the state of a generator")
            numbers: Any = {"state": state, "inc": inc}
            bits.state = {"bit_generator": "PCG64", "state": numbers, "has_uint32": int(has), "uinteger": uinteger}
            return np.random.Generator(bits)
        case {"@class": str() as key, **rest} if not rest and key in CLASSES:
            return CLASSES[key]
        case {"@object": str() as key, **arguments} if key in OBJECTS:
            kind, fields = OBJECTS[key]
            random = _decode(arguments.pop("@random", None), name, tensors)
            decoded: dict[str, Any] = {
                str(argument): _decode(item, _join(name, str(argument)), tensors) for argument, item in arguments.items()
            }
            for argument, (_, hint) in fields.items():
                if hint is np.dtype and isinstance(decoded.get(argument), str):
                    decoded[argument] = np.dtype(decoded[argument])
            _fields(decoded, {argument: hint for argument, (_, hint) in fields.items()}, name)
            if kind is spaces.MultiBinary and np.prod(decoded["n"], dtype=float) > _MAX_BITS:
                refuse(f"of at most {_MAX_BITS:,} bits")
            if kind is spaces.Dict:
                # A plain dictionary would be sorted
                decoded["spaces"] = collections.OrderedDict(decoded["spaces"])
            made = kind(**decoded)
            if isinstance(made, spaces.Space):
                if not isinstance(random, np.random.Generator | None):
                    refuse("a space with a generator")
                made._np_random = random  # type: ignore[assignment]
            return made
        case dict() if not any(key.startswith("@") for key in data):
            return {key: _decode(item, _join(name, key), tensors) for key, item in data.items()}
    return refuse("something that `save_safe` writes")


def _fields(values: Any, hints: Mapping[str, Any], name: str, partial: bool = False) -> dict[str, Any]:
    """Refuse a dictionary whose keys are not the expected ones or whose values are not of the expected types."""
    if not isinstance(values, dict):
        raise ValueError(f"{name} must be a dictionary, got {reprlib.repr(values)}")
    for key in [*values, *(() if partial else hints)]:
        if key not in values or key not in hints:
            what = "is missing" if key in hints else "is not known"
            raise ValueError(f"{_join(name, reprlib.repr(key))} {what}; known are {', '.join(sorted(hints))}")
        if not _fits(values[key], hints[key]):
            raise ValueError(f"{_join(name, key)} must be of type {hints[key]}, got {reprlib.repr(values[key])}")
    return values


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of the type of a hint, as far as the constructors here use them."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if hint in (int, bool, str):
        return type(value) is hint
    if hint is float:
        return type(value) in (int, float)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, option) for option in options)
    if origin is type:
        return isinstance(value, type) and issubclass(value, options[0])
    if origin is collections.abc.Callable:
        return callable(value) and not isinstance(value, type)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(item, options[1]) for item in value.values())
    if origin is tuple and options[-1] is not Ellipsis:
        return isinstance(value, tuple) and len(value) == len(options) and all(map(_fits, value, options))
    if origin in (list, tuple, Sequence):
        return isinstance(value, list if origin is list else (list, tuple)) and all(_fits(item, options[0]) for item in value)
    return isinstance(value, origin or hint)


def _join(name: str, key: str) -> str:
    # Names of a file end up in messages
    key = key if key.isprintable() and len(key) <= 100 else reprlib.repr(key)
    return f"{name}.{key}" if name else key


@contextlib.contextmanager
def _refusing(message: str) -> Iterator[None]:
    """
    Whatever goes wrong becomes a ``ValueError``.

    What a hostile file can provoke in the constructors of spaces, networks, optimizers and buffers has no common type:
    overflows, assertions, ``MemoryError``, errors of torch.
    """
    try:
        yield
    except ImportError:
        # An extra that is missing here says nothing about the file
        raise
    except Exception as error:
        raise ValueError(f"{message}: {error or type(error).__name__}") from error
