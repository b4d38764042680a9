"""Replay buffers that Stable-Baselines3 lacks."""

import copy
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.type_aliases import DictReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer


class _Rows(dict[str, np.ndarray[Any, Any]]):
    """Arrays of one length that are indexed together."""

    def __getitem__(self, index: Any) -> Any:
        return {key: value[index] for key, value in self.items()}


class DictNStepReplayBuffer(NStepReplayBuffer, DictReplayBuffer):
    """
    SB3's n-step returns for dictionaries of observations. Samples are those of ``NStepReplayBuffer`` for every key.

    :param args: Arguments of ``DictReplayBuffer``
    :param n_steps: Number of steps to accumulate rewards for n-step returns
    :param gamma: Discount factor
    :param kwargs: Arguments of ``DictReplayBuffer``
    """

    #: For checkpoints: nothing beyond the rows already written matters
    rowwise = True

    def _get_samples(  # type: ignore[override]
        self, batch_inds: np.ndarray[Any, Any], env: VecNormalize | None = None
    ) -> DictReplayBufferSamples:
        rows = copy.copy(self)
        rows.observations, rows.next_observations = _Rows(self.observations), _Rows(self.next_observations)
        return DictReplayBufferSamples(*NStepReplayBuffer._get_samples(rows, batch_inds, env))  # type: ignore[arg-type]

    def to_torch(self, array: Any, copy: bool = True) -> Any:
        """
        :param array: Array, or a dictionary of arrays
        :param copy: Whether to copy the data
        :return: Tensor, or a dictionary of tensors
        """
        if isinstance(array, dict):
            return {key: self.to_torch(value, copy) for key, value in array.items()}
        tensor: th.Tensor = super().to_torch(array, copy)
        return tensor


def replay_buffer_for(
    observation_space: spaces.Space[Any], n_steps: int, gamma: float
) -> tuple[type[ReplayBuffer], dict[str, Any]]:
    """
    :param observation_space: Observation space
    :param n_steps: Steps of the return
    :param gamma: Discount factor
    :return: Class of the replay buffer, and its arguments besides those that all have
    """
    is_dict = isinstance(observation_space, spaces.Dict)
    if n_steps > 1:
        return DictNStepReplayBuffer if is_dict else NStepReplayBuffer, {"n_steps": n_steps, "gamma": gamma}
    return DictReplayBuffer if is_dict else ReplayBuffer, {}


def cut_off_episodes(buffer: ReplayBuffer, n_envs: int | None = None) -> None:
    """
    Mark where the episodes that go on break off because the environments are reset, so that no n-step return and no trajectory
    runs on into the next ones.

    :param buffer: Replay buffer, changed in place
    :param n_envs: Number of environments from now on; by default as many as before
    """
    if isinstance(buffer, HerReplayBuffer):
        # Unfinished episodes are never sampled: leave them so, and let the next ones begin behind them
        buffer._current_ep_start[:] = buffer.pos
    elif hasattr(buffer, "discard_unfinished"):
        buffer.discard_unfinished(n_envs)
    elif buffer.full or buffer.pos > 0:
        last = buffer.pos - 1
        # A buffer of the user's own may have neither attribute
        if getattr(buffer, "handle_timeout_termination", False) or isinstance(buffer, NStepReplayBuffer):
            # As at a time limit: the value is bootstrapped
            buffer.timeouts[last] = np.logical_or(buffer.timeouts[last], np.logical_not(buffer.dones[last]))
            buffer.dones[last] = 1.0
        elif getattr(buffer, "optimize_memory_usage", False):
            # The row of its next observation will be overwritten by the next episode's first, as SB3 does in that case
            buffer.dones[last] = 1.0
