"""
Policies as graphs that act without this package.

The reverse process is unrolled, and what surrounds the network is folded in: the statistics of ``VecNormalize``, the
preprocessing of observations, the choice of the best of N, and the scaling of actions. A graph takes what the environment
returns and gives what it takes, in batches of any size.
"""

from __future__ import annotations

import copy
import importlib
import io
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

from sb3_qsm.common.checks import check_integer
from sb3_qsm.common.files import replacing
from sb3_qsm.common.policies import DiffusionPolicy, check_sampling_steps
from sb3_qsm.diffusion import SAMPLERS, ddim


def to_onnx(
    model: OffPolicyAlgorithm | DiffusionPolicy,
    path: str | os.PathLike[str],
    deterministic: bool = True,
    sampling_steps: int | None = None,
    vec_normalize: VecNormalize | None = None,
    opset_version: int | None = None,
) -> None:
    """
    Write the policy as an ONNX file. Its inputs are ``observation`` (for dictionaries ``observation.KEY`` for each key) and,
    unless it is deterministic, standard normal noise: ``latent`` of shape ``(batch, action_dim)`` and, if the sampler uses it,
    ``chain`` of shape ``(T, batch, action_dim)``, where ``chain[i]`` is used at step T - 1 - i. With ``best_of_n`` above 1
    they have that number of candidates as a dimension before the batch. The output is ``action``.

    :param model: Model, or its policy
    :param path: File to write
    :param deterministic: Whether the action shall depend on the observation alone, as in ``predict(..., deterministic=True)``
    :param sampling_steps: Number of DDIM steps, at most T; by default as the model acts
    :param vec_normalize: Statistics of observations; by default those of the model's environment, if it has any
    :param opset_version: Version of ONNX's operators; by default PyTorch's
    :raises TypeError: if the model has no diffusion policy, or ``vec_normalize`` is none
    :raises ValueError: if an argument is out of its range, or ``vec_normalize`` does not fit the model or is missing for
        one of :meth:`sb3_qsm.QSM.load_safe`
    :raises ImportError: if onnx or onnxscript is not installed
    :raises OSError: if the file cannot be written
    """
    if opset_version is not None:
        check_integer("opset_version", opset_version, 1)
    program = _export(model, deterministic, sampling_steps, vec_normalize)
    try:
        importlib.import_module("onnxscript")
    except ImportError as error:
        raise ImportError('Export to ONNX needs onnx and onnxscript: pip install "sb3-qsm[export]"') from error
    observation, *noise = program.example_inputs[0]
    names = [f"observation.{key}" for key in observation] if isinstance(observation, dict) else ["observation"]
    with warnings.catch_warnings():
        # PyTorch's of its own code, and that it skips the operators of torchvision where that is not installed
        warnings.simplefilter("ignore", FutureWarning)
        logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
        onnx_program = th.onnx.export(
            program,
            (),
            verbose=False,
            input_names=[*names, *("latent", "chain")[: len(noise)]],
            output_names=["action"],
            opset_version=opset_version,
            dynamo=True,
        )
    assert onnx_program is not None
    written = next(entry.version for entry in onnx_program.model_proto.opset_import if not entry.domain)
    if opset_version not in (None, written):
        raise ValueError(f"opset_version={opset_version} is not possible here: PyTorch wrote version {written}")
    with replacing(Path(path)) as file:
        file.write(onnx_program.model_proto.SerializeToString())


def to_torch_export(
    model: OffPolicyAlgorithm | DiffusionPolicy,
    path: str | os.PathLike[str],
    deterministic: bool = True,
    sampling_steps: int | None = None,
    vec_normalize: VecNormalize | None = None,
) -> None:
    """
    Write the policy as a program of ``torch.export``, which ``torch.export.load(path).module()`` makes a function again, with
    the inputs of :func:`to_onnx` in that order; a dictionary of observations is one argument.

    :param model: Model, or its policy
    :param path: File to write; PyTorch's suffix for such files is ``.pt2``
    :param deterministic: Whether the action shall depend on the observation alone, as in ``predict(..., deterministic=True)``
    :param sampling_steps: Number of DDIM steps, at most T; by default as the model acts
    :param vec_normalize: Statistics of observations; by default those of the model's environment, if it has any
    :raises TypeError: if the model has no diffusion policy, or ``vec_normalize`` is none
    :raises ValueError: if an argument is out of its range, or ``vec_normalize`` does not fit the model or is missing for
        one of :meth:`sb3_qsm.QSM.load_safe`
    """
    program = _export(model, deterministic, sampling_steps, vec_normalize)
    # Not straight to the file: PyTorch's writer ends the process when the disk is full
    buffer = io.BytesIO()
    th.export.save(program, buffer)
    with replacing(Path(path)) as file:
        file.write(buffer.getbuffer())


class PolicyGraph(nn.Module):
    """
    From the environment's observations to its actions, without random draws.

    :param policy: The policy, on the CPU and in evaluation mode
    :param vec_normalize: Statistics of observations, or None
    """

    latents: th.Tensor
    low: th.Tensor
    high: th.Tensor

    def __init__(self, policy: DiffusionPolicy, vec_normalize: VecNormalize | None = None) -> None:
        super().__init__()
        self.policy = policy
        self.action_shape: tuple[int, ...] = policy.actor.action_space.shape
        n, dim = policy.best_of_n, policy.actor.action_dim
        self.register_buffer("latents", policy.actor.draw_latents(1, deterministic=True, n=n)[0].view(n, 1, dim))
        for name in ("low", "high"):
            bound = th.as_tensor(getattr(policy.action_space, name))
            # In the space's own precision, so that an action at a bound is that bound
            self.register_buffer(name, bound if bound.dtype == th.float64 else bound.float())
        found: Any = vec_normalize.obs_rms if vec_normalize is not None and vec_normalize.norm_obs else {}
        self.clip = 0.0 if vec_normalize is None else vec_normalize.clip_obs
        self.statistics: dict[str | None, tuple[th.Tensor, th.Tensor]] = {
            key: (th.as_tensor(rms.mean), th.as_tensor(np.sqrt(rms.var + vec_normalize.epsilon)))  # type: ignore[union-attr]
            for key, rms in ({None: found} if isinstance(found, RunningMeanStd) else found).items()
        }

    def forward(self, observation: Any, latent: th.Tensor | None = None, chain: th.Tensor | None = None) -> th.Tensor:
        """
        :param observation: Observations, a tensor or a dictionary of tensors, the batch first
        :param latent: Latents a_T, shape ``(batch, action_dim)`` or ``(best_of_n, batch, action_dim)``; None to act
            deterministically
        :param chain: Noise of the chain, shape ``(T, *latent.shape)``, or None
        :return: Actions of the environment, shape ``(batch, *action_shape)``
        """
        if isinstance(observation, dict):
            observation = {key: self._normalize(key, value) for key, value in observation.items()}
        else:
            observation = self._normalize(None, observation)
        actor = self.policy.acting(deterministic=latent is None)
        features = actor.features(observation)
        if latent is None:
            latent = self.latents.expand(-1, features.shape[0], -1)
        latent = latent.reshape(-1, actor.action_dim)
        chain = None if chain is None else chain.reshape(actor.diffusion_steps, -1, actor.action_dim)
        if self.policy.best_of_n > 1:
            actions = self.policy._best_of_n(actor, observation, features, latent, chain)
        else:
            actions = actor.sample(features, latent, chain, actor.sampling_steps)
        actions = actions.reshape(-1, *self.action_shape)
        return (self.low + 0.5 * (actions + 1.0) * (self.high - self.low)).clamp(self.low, self.high)

    def _normalize(self, key: str | None, observation: th.Tensor) -> th.Tensor:
        if key not in self.statistics:
            return observation
        mean, std = self.statistics[key]
        # In double precision, as VecNormalize does it
        return ((observation.double() - mean) / std).clamp(-self.clip, self.clip).float()


def _export(
    model: OffPolicyAlgorithm | DiffusionPolicy,
    deterministic: bool,
    sampling_steps: int | None,
    vec_normalize: VecNormalize | None,
) -> th.export.ExportedProgram:
    policy = model if isinstance(model, DiffusionPolicy) else getattr(model, "policy", None)
    if not isinstance(policy, DiffusionPolicy):
        raise TypeError(f"Only models with a DiffusionPolicy can be exported, got {type(model).__name__}")
    check_sampling_steps(sampling_steps, policy.actor.diffusion_steps)
    if vec_normalize is None and isinstance(model, OffPolicyAlgorithm):
        vec_normalize = model.get_vec_normalize_env()
        # As they were in the file: what is in them is looked at where they are used
        statistics: Any = vars(model).get("_loaded_statistics") or {}
        arguments = statistics.get("arguments")
        if vec_normalize is None and isinstance(arguments, dict) and arguments.get("norm_obs"):
            raise ValueError(
                "vec_normalize is needed: the model was trained with VecNormalize, whose statistics came with its file, but "
                "has no environment with them; pass load_vec_normalize(file, venv), or model.policy to export it without"
            )
    elif vec_normalize is not None and not isinstance(vec_normalize, VecNormalize):
        raise TypeError(f"vec_normalize must be a VecNormalize, got {type(vec_normalize).__name__}")
    if vec_normalize is not None and not vec_normalize.norm_obs:
        vec_normalize = None
    space: Any = policy.observation_space if vec_normalize is None else vec_normalize.venv.observation_space
    parts, expected = (_parts(found) for found in (space, policy.observation_space))
    if vec_normalize is not None and isinstance(vec_normalize.obs_rms, dict):
        # What is not normalised, such as images, SB3 may put in order outside of VecNormalize
        parts = {key: part if key in vec_normalize.obs_rms else expected.get(key, part) for key, part in parts.items()}
    if {key: part.shape for key, part in parts.items()} != {key: part.shape for key, part in expected.items()}:
        raise ValueError(f"vec_normalize does not fit: it has observations of {space}, the model {policy.observation_space}")

    # The model goes on as it was
    policy = copy.deepcopy(policy).cpu()
    policy.set_training_mode(False)
    policy.requires_grad_(False)
    actor = policy.actor
    actor.precision = "float32"
    if sampling_steps is not None:
        actor.sampling_steps = sampling_steps
    policy.acting(deterministic)  # takes over both
    # The size of this batch is any but 0 and 1, which would be taken for constants
    tensors = {key: th.as_tensor(np.zeros((2, *part.shape), part.dtype)) for key, part in parts.items()}
    inputs: list[Any] = [tensors if isinstance(space, spaces.Dict) else tensors[""]]
    batch = th.export.Dim("batch")
    dynamic: list[Any] = [{key: {0: batch} for key in tensors} if isinstance(space, spaces.Dict) else {0: batch}]
    if not deterministic:
        shape = (2, actor.action_dim) if policy.best_of_n == 1 else (policy.best_of_n, 2, actor.action_dim)
        inputs.append(th.zeros(shape))
        dynamic.append({len(shape) - 2: batch})
        if actor.sampling_steps is None and SAMPLERS[actor.sampler] is not ddim:
            inputs.append(th.zeros(actor.diffusion_steps, *shape))
            dynamic.append({len(shape) - 1: batch})
    return th.export.export(PolicyGraph(policy, vec_normalize), tuple(inputs), dynamic_shapes=tuple(dynamic))


def _parts(space: Any) -> dict[str, Any]:
    return dict(space.spaces) if isinstance(space, spaces.Dict) else {"": space}
