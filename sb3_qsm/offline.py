"""
Learning from data that is already there: datasets of Minari and replay buffers of Stable-Baselines3.

A model is pretrained on the data alone and then goes on in the environment with batches of both, as in RLPD
(arXiv 2302.02948).
"""

import dataclasses
import importlib
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.preprocessing import maybe_transpose
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.utils import configure_logger
from stable_baselines3.common.vec_env import VecNormalize
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_qsm.common.buffers import replay_buffer_for
from sb3_qsm.common.checks import check_integer, check_number
from sb3_qsm.common.off_policy import DiffusionOffPolicyAlgorithm
from sb3_qsm.common.signals import uninterrupted

SelfOffline = TypeVar("SelfOffline", bound="OfflineTraining")
#: Observations of many steps: an array, or one for each key
Observations = Any


class Stream(NamedTuple):
    """
    Steps of one environment in their order.

    :param observations: s, shape ``(n, *observation_shape)``, or a dictionary of such arrays
    :param next_observations: s', the same
    :param actions: Scaled actions in [-1, 1], shape ``(n, action_dim)``
    :param rewards: Rewards, shape ``(n,)``
    :param dones: 1 where an episode ended, shape ``(n,)``
    :param timeouts: 1 where it ended without having terminated, shape ``(n,)``
    """

    observations: Observations
    next_observations: Observations
    actions: np.ndarray[Any, Any]
    rewards: np.ndarray[Any, Any]
    dones: np.ndarray[Any, Any]
    timeouts: np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True)
class OfflineReplay:
    """
    Data and its part in the updates.

    :param buffer: The data
    :param share: Share of it in a batch
    :param behaviour: Weight of the behaviour term in the actor's loss
    :param behaviour_decay_steps: Environment step at which that weight has fallen linearly to zero; None for never
    """

    buffer: ReplayBuffer
    share: float
    behaviour: float
    behaviour_decay_steps: int | None = None


class OfflineTraining(DiffusionOffPolicyAlgorithm):
    """What an algorithm needs to learn from a dataset. Its ``train`` takes its batches from :meth:`_sample_batch`."""

    _offline: OfflineReplay | None = None

    def load_offline(
        self,
        dataset: Any,
        share: float = 0.5,
        behaviour: float = 0.0,
        behaviour_decay_steps: int | None = None,
        update_statistics: bool = True,
    ) -> None:
        """
        Take a dataset for :meth:`pretrain`, and for a share of every batch in ``learn``. It replaces the one loaded before.
        The dataset is not saved with the model, nor with a checkpoint: load it again to go on with it.

        :param dataset: Dataset of Minari, the name of a local one, or a replay buffer of SB3
        :param share: Share of a batch that is taken from the dataset in ``learn``, at least one row unless it is 0; 0.5 is
            RLPD's (arXiv 2302.02948)
        :param behaviour: Weight of the behaviour term of :meth:`pretrain` in ``learn``, at its first step. There it clones all
            actions of a batch, those of the dataset and the agent's own replayed ones
        :param behaviour_decay_steps: Environment step at which that weight has fallen linearly to zero; by default it stays
        :param update_statistics: Whether the statistics of ``VecNormalize``, unless they are frozen, take the dataset in;
            False where they have done so before, as after ``load`` and ``resume``
        :raises TypeError: if ``dataset`` is of another kind
        :raises ValueError: if the dataset does not fit the spaces of the model, is empty or holds numbers that are not finite,
            or if another argument is out of its range. What was loaded before stays
        :raises ImportError: if ``dataset`` is a name and Minari is not installed
        """
        check_number("share", share, 0.0, high=1.0)
        check_number("behaviour", behaviour, 0.0, high=1.0)
        if behaviour_decay_steps is not None:
            check_integer("behaviour_decay_steps", behaviour_decay_steps, 1)
            if behaviour == 0:
                raise ValueError(f"behaviour_decay_steps needs a behaviour > 0 to let fade, got {behaviour_decay_steps}")
        stream = _join(self._streams(dataset))
        replay = OfflineReplay(self._make_buffer(stream), share, behaviour, behaviour_decay_steps)
        # A dataset whose statistics are lost, or counted twice when it is loaded again, would be worse than none
        with uninterrupted():
            self._offline = replay
            if self._vec_normalize_env is not None and update_statistics:
                _update_statistics(self._vec_normalize_env, stream)

    def pretrain(
        self: SelfOffline,
        gradient_steps: int,
        behaviour: float = 0.9,
        batch_size: int | None = None,
        log_interval: int = 1000,
    ) -> SelfOffline:
        r"""
        Train on the loaded dataset alone, without the environment. The actor's loss is a weighted sum of the noise-prediction
        loss on the dataset's actions and of Q-score matching,

        .. math:: w \| \epsilon_\theta(s, a_t, t) - \epsilon \|^2 + (1 - w) \| \epsilon_\theta(s, a_t, t) - \epsilon^* \|^2,

        so that at every noise level the score is the mean of the data's and of the one that the critic asks for. The first
        term keeps the actions where the critic has seen any, as the constraint of Diffusion Actor-Critic (arXiv 2405.20555)
        does. Schedules of the learning rate stand at their beginning.

        :param gradient_steps: Number of gradient steps
        :param behaviour: Weight w of the behaviour term: 1 is behaviour cloning, 0 leaves all to the critic
        :param batch_size: Size of each minibatch; by default the model's
        :param log_interval: Gradient steps between two entries of the log
        :return: The model
        :raises ValueError: if there is no dataset, or an argument is out of its range
        """
        if self._offline is None:
            raise ValueError("pretrain needs data: call load_offline first")
        check_number("behaviour", behaviour, 0.0, high=1.0)
        check_integer("gradient_steps", gradient_steps, 1)
        check_integer("log_interval", log_interval, 1)
        if batch_size is not None:
            check_integer("batch_size", batch_size, 1)
        if not self._custom_logger:
            self._logger = configure_logger(self.verbose, self.tensorboard_log, f"{type(self).__name__}_pretrain")
        replay, progress_remaining = self._offline, self._current_progress_remaining
        self._offline = OfflineReplay(replay.buffer, 1.0, behaviour)
        self._current_progress_remaining = 1.0
        try:
            for start in range(0, gradient_steps, log_interval):
                self.train(min(log_interval, gradient_steps - start), batch_size or self.batch_size)
                self.logger.dump(self._n_updates)
        finally:
            self._offline, self._current_progress_remaining = replay, progress_remaining
        return self

    def _sample_batch(self, batch_size: int) -> ReplayBufferSamples:
        """A minibatch of both buffers."""
        sizes = [(self.replay_buffer, batch_size)]
        if self._offline is not None:
            share = self._offline.share
            from_data = round(share * batch_size)
            if 0 < share < 1:
                from_data = max(1, min(from_data, batch_size - 1))
            sizes = [(self._offline.buffer, from_data), (self.replay_buffer, batch_size - from_data)]
        parts = []
        for buffer, size in sizes:
            if size > 0:
                given = buffer is self.replay_buffer and "gamma" in self.replay_buffer_kwargs
                if isinstance(buffer, NStepReplayBuffer) and not given:
                    buffer.gamma = self.gamma
                parts.append(buffer.sample(size, env=self._vec_normalize_env))  # type: ignore[union-attr]
        if len(parts) == 1 and not isinstance(self.replay_buffer, HerReplayBuffer):
            return parts[0]
        # The order tells where a row comes from (HerReplayBuffer puts those with their own goals first), and the actor's batch
        # goes by the order
        return _shuffle(parts[0] if len(parts) == 1 else _concatenate(parts, self.gamma))

    def _behaviour(self) -> float | None:
        """Weight of the behaviour term at the present step, None without a dataset."""
        if self._offline is None or self._offline.share == 0:
            return None
        weight, decay_steps = self._offline.behaviour, self._offline.behaviour_decay_steps
        if decay_steps is not None:
            weight *= max(0.0, 1.0 - self.num_timesteps / decay_steps)
        return weight

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_offline"]

    def _streams(self, dataset: Any) -> Iterator[Stream]:
        if isinstance(dataset, ReplayBuffer):
            return self._from_replay_buffer(dataset)
        if isinstance(dataset, str):
            try:
                minari = importlib.import_module("minari")
            except ImportError as error:
                raise ImportError('Datasets by their names need Minari: pip install "sb3-qsm[offline]"') from error
            dataset = minari.load_dataset(dataset)
        if not hasattr(dataset, "iterate_episodes"):
            raise TypeError(f"dataset must be one of Minari, a name, or a ReplayBuffer of SB3, got {type(dataset).__name__}")
        return self._from_episodes(dataset.iterate_episodes())

    def _from_episodes(self, episodes: Iterable[Any]) -> Iterator[Stream]:
        """Episodes of Minari, which have one observation more than steps."""
        for episode in episodes:
            if len(episode) == 0:
                continue
            observations = self._fit_observations(episode.observations)
            actions, rewards = np.asarray(episode.actions), np.asarray(episode.rewards)
            parts = observations.values() if isinstance(observations, dict) else [observations]
            lengths = sorted({len(part) for part in parts})
            if rewards.ndim == 0 or len(rewards) != len(actions) or lengths != [len(actions) + 1]:
                raise ValueError(
                    f"An episode of the dataset must have as many rewards as actions ({len(actions)}) and one observation "
                    f"more, got {rewards.size} and {', '.join(map(str, lengths))}"
                )
            _check_kind("actions", actions)
            _check_shape("actions", actions, self.action_space)
            rewards = _column("rewards", rewards, len(actions))
            terminations, truncations = (
                _column(name, np.asarray(getattr(episode, name)), len(actions)).astype(bool)
                for name in ("terminations", "truncations")
            )
            low, high = self.action_space.low, self.action_space.high  # type: ignore[attr-defined]
            # Actions as they were before a clipping to the bounds are not those that were taken
            if (actions < low - 1e-3 * (high - low)).any() or (actions > high + 1e-3 * (high - low)).any():
                raise ValueError(f"The dataset's actions are not within {self.action_space}")
            scaled = self.policy.scale_action(np.clip(actions, low, high))
            ends = terminations | truncations
            ends[-1] = True
            yield _stream(
                _each(observations, lambda value: value[:-1]),
                _each(observations, lambda value: value[1:]),
                scaled,
                rewards,
                ends,
                ends & ~terminations,
            )

    def _from_replay_buffer(self, buffer: ReplayBuffer) -> Iterator[Stream]:
        """The steps of a replay buffer of SB3, environment by environment, oldest first."""
        size = buffer.buffer_size
        space: Any = buffer.action_space
        own: Any = self.action_space
        # One with the bounds of what it holds may come from an environment that scales actions, as RescaleAction does
        scaled = isinstance(space, spaces.Box) and (space.low == -1).all() and (space.high == 1).all()
        if not isinstance(space, spaces.Box) or not (
            scaled or space.shape != own.shape or (np.allclose(space.low, own.low) and np.allclose(space.high, own.high))
        ):
            raise ValueError(f"The dataset's actions are those of {space}, the model has {own}")
        order = (np.arange(size) + buffer.pos) % size if buffer.full else np.arange(buffer.pos)
        if buffer.optimize_memory_usage and buffer.full:
            order = order[1:]  # the observation at `pos` has been overwritten by the newest next one
        for env in range(buffer.n_envs if len(order) else 0):
            actions = np.asarray(buffer.actions[order, env])
            if actions.shape[1:] != (math.prod(self.action_space.shape or ()),):
                raise ValueError(
                    f"The dataset's actions have the shape {actions.shape[1:]}, the model has {self.action_space}"
                )
            if (np.abs(actions) > 1.0 + 1e-3).any():
                raise ValueError("The dataset's actions are not scaled to [-1, 1], as those in replay buffers of SB3 are")
            nexts = (buffer.observations, (order + 1) % size)
            if not buffer.optimize_memory_usage:
                nexts = (buffer.next_observations, order)
            observations, next_observations = (
                self._fit_observations(_each(values, lambda value, rows=rows, env=env: value[rows, env]))
                for values, rows in ((buffer.observations, order), nexts)
            )
            dones, timeouts = (np.asarray(values[order, env], dtype=bool) for values in (buffer.dones, buffer.timeouts))
            # Where the record breaks off, nothing is known to have terminated: at its end, and where an environment was reset
            # between two calls of `learn`
            breaks = np.ones(len(order), dtype=bool)
            breaks[:-1] = _differ(
                _each(next_observations, lambda value: value[:-1]), _each(observations, lambda value: value[1:])
            )
            timeouts |= breaks & ~dones
            dones |= breaks
            rewards = np.asarray(buffer.rewards[order, env])
            yield _stream(observations, next_observations, np.clip(actions, -1.0, 1.0), rewards, dones, timeouts)

    def _fit_observations(self, values: Observations) -> Observations:
        """Observations in the shapes of the model, images with their channels first."""
        space = self.observation_space
        if isinstance(space, spaces.Dict) != isinstance(values, dict) or (
            isinstance(values, dict) and values.keys() != space.spaces.keys()  # type: ignore[attr-defined]
        ):
            found = ", ".join(sorted(values)) if isinstance(values, dict) else "one array"
            raise ValueError(f"The dataset's observations are {found}, the model has {space}")

        def fit(name: str, value: Any, part: spaces.Space[Any]) -> Any:
            value = np.asarray(value)
            if isinstance(part, spaces.Discrete) and value.shape[1:] == (1,):
                value = value[:, 0]  # as SB3's buffers have them
            if value.shape[1:] != part.shape and value.ndim == 4:
                value = maybe_transpose(value, part)
            _check_shape(name, value, part)
            _check_kind(name, value)
            if not np.issubdtype(part.dtype, np.floating):
                low, high = _integer_bounds(part)
                # The buffer of the model would cut off fractions, and wrap around what is too large
                whole = value.dtype.kind != "f" or (value == np.floor(value)).all()
                if not (whole and len(value) and (value.min(axis=0) >= low).all() and (value.max(axis=0) <= high).all()):
                    raise ValueError(f"The dataset's {name} are not all integers within {part}")
            return value

        if isinstance(space, spaces.Dict):
            return {key: fit(f"observations[{key!r}]", values[key], part) for key, part in space.spaces.items()}
        return fit("observations", values, space)

    def _make_buffer(self, stream: Stream) -> ReplayBuffer:
        """A full buffer of the kind that the model would make for itself."""
        kind, kwargs = replay_buffer_for(self.observation_space, self._resolve_n_steps(), self.gamma)
        n = len(stream.rewards)
        buffer = kind(n, self.observation_space, self.action_space, self.device, **kwargs)

        def fill(target: Any, values: Any) -> None:
            if isinstance(target, dict):
                for key, value in target.items():
                    fill(value, values[key])
            else:
                target[:] = values.reshape(target.shape)

        for name in Stream._fields:
            fill(getattr(buffer, name), getattr(stream, name))
        buffer.pos, buffer.full = 0, True
        return buffer

    def _resolve_n_steps(self) -> int:
        """Number of steps of the return."""
        raise NotImplementedError


def _check_kind(name: str, value: np.ndarray[Any, Any]) -> None:
    if value.dtype.kind not in "biuf":
        raise ValueError(f"The dataset's {name} must be numbers, got {value.dtype}")


def _column(name: str, value: np.ndarray[Any, Any], n: int) -> np.ndarray[Any, Any]:
    """Numbers of n steps, which may be a column of a matrix."""
    _check_kind(name, value)
    if value.shape not in ((n,), (n, 1)):
        raise ValueError(f"The dataset's {name} must have the shape ({n},) in an episode of {n} steps, got {value.shape}")
    return value.reshape(n)


def _integer_bounds(space: spaces.Space[Any]) -> tuple[Any, Any]:
    """Smallest and largest values of a space of integers."""
    if isinstance(space, spaces.Box):
        return space.low, space.high
    if isinstance(space, spaces.MultiDiscrete):
        return space.start, space.start + space.nvec - 1
    if isinstance(space, spaces.Discrete):
        return space.start, space.start + space.n - 1
    return 0, 1


def _check_shape(name: str, value: np.ndarray[Any, Any], space: spaces.Space[Any]) -> None:
    if value.shape[1:] != space.shape:
        raise ValueError(f"The dataset's {name} have shape {value.shape[1:]}, the model has {space}")


def _each(values: Observations, function: Any) -> Observations:
    """The function of an array, or of each array of a dictionary."""
    return {key: function(value) for key, value in values.items()} if isinstance(values, dict) else function(values)


def _stream(*columns: Any) -> Stream:
    """Steps whose numbers are all finite in single precision, in which they are learned from."""
    for name, values in zip(Stream._fields, columns, strict=True):
        for value in values.values() if isinstance(values, dict) else [values]:
            if value.dtype.kind in "biu":
                continue
            with np.errstate(over="ignore"):
                finite = np.isfinite(value.astype(np.float32, copy=False))
            if not finite.all():
                raise ValueError(f"The dataset's {name} are not all finite in single precision")
    return Stream(*columns)


def _differ(first: Observations, second: Observations) -> Any:
    """In which rows two records of observations are not the same."""
    if isinstance(first, dict):
        return np.any([_differ(value, second[key]) for key, value in first.items()], axis=0)
    return (first != second).reshape(len(first), -1).any(axis=1)


def _shuffle(batch: ReplayBufferSamples) -> ReplayBufferSamples:
    """The same rows in a random order."""
    order = th.randperm(len(batch.actions), device=batch.actions.device)

    def take(value: Any) -> Any:
        if value is None:
            return None
        return {key: item[order] for key, item in value.items()} if isinstance(value, dict) else value[order]

    return type(batch)(*map(take, batch))


def _join(streams: Iterator[Stream]) -> Stream:
    parts = list(streams)
    if not parts:
        raise ValueError("The dataset is empty")

    def join(values: list[Any]) -> Any:
        if isinstance(values[0], dict):
            return {key: join([value[key] for value in values]) for key in values[0]}
        return np.concatenate(values)

    return Stream(*(join(list(column)) for column in zip(*parts, strict=True)))


def _update_statistics(env: VecNormalize, stream: Stream) -> None:
    """Let ``VecNormalize`` see the dataset."""
    if not env.training:
        return
    if env.norm_obs:
        if isinstance(env.obs_rms, dict):
            for key, rms in env.obs_rms.items():
                # In single precision the sum of a million rows has few correct digits
                rms.update(stream.observations[key].astype(np.float64))
        else:
            env.obs_rms.update(stream.observations.astype(np.float64))
    returns = np.zeros(len(stream.rewards))
    running = 0.0
    for i, (reward, done) in enumerate(zip(stream.rewards, stream.dones, strict=True)):
        running = running * env.gamma + reward
        returns[i] = running
        running *= 1.0 - done
    env.ret_rms.update(returns)


def _concatenate(parts: list[ReplayBufferSamples], gamma: float) -> ReplayBufferSamples:
    """One batch of several; where a buffer gives no discounts they are gamma."""

    def join(values: list[Any]) -> Any:
        if isinstance(values[0], dict):
            return {key: join([value[key] for value in values]) for key in values[0]}
        return th.cat(values)

    if any(part.discounts is not None for part in parts):
        parts = [
            part if part.discounts is not None else part._replace(discounts=th.full_like(part.rewards, gamma))
            for part in parts
        ]
    names = [name for name in type(parts[0])._fields if getattr(parts[0], name) is not None]
    return type(parts[0])(**{name: join([getattr(part, name) for part in parts]) for name in names})
