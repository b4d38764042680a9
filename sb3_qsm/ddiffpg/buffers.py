"""Replay buffers of whole trajectories with modes and target actions."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.type_aliases import DictReplayBufferSamples, ReplayBufferSamples
from stable_baselines3.common.vec_env import CloudpickleWrapper, VecNormalize

from sb3_qsm.common.signals import uninterrupted
from sb3_qsm.ddiffpg.distance import dtw_distance, half_way
from sb3_qsm.evaluation import success_of

#: Modes of a row that holds nothing, and of one whose trajectory has none yet
FREE, UNASSIGNED = -2, -1
#: Columns of the target actions
EXPLORATION, MODE = 0, 1

PositionFunction = Callable[[Any], npt.ArrayLike]
Rows = npt.NDArray[np.int64]


@dataclass
class Trajectory:
    """
    A finished episode in the buffer.

    :param id: Number that no other trajectory has
    :param rows: Where its transitions are, in their order
    :param positions: Positions that it passed, from the first to the last, shape ``(n, position_dim)``
    :param success: Whether the episode succeeded
    :param total_reward: Sum of its rewards
    :param mode: Mode that it belongs to, :data:`UNASSIGNED` before there is one
    """

    id: int
    rows: Rows
    positions: npt.NDArray[np.float64]
    success: bool
    total_reward: float
    mode: int = UNASSIGNED


class ModeBatch(NamedTuple):
    """
    A batch in groups: first the exploration's, then one for each mode.

    :param rows: Where the transitions are, shape ``(batch,)``
    :param sizes: Number of transitions of each group
    :param transitions: The transitions, group after group
    :param positions: Positions, shape ``(batch, position_dim)``
    :param next_positions: Positions one step later
    :param target_actions: What the actor shall learn in these states, scaled, shape ``(batch, action_dim)``
    """

    rows: Rows
    sizes: list[int]
    transitions: ReplayBufferSamples | DictReplayBufferSamples
    positions: th.Tensor
    next_positions: th.Tensor
    target_actions: th.Tensor


def position_function(position: PositionFunction | Sequence[int] | None, space: spaces.Space[Any]) -> PositionFunction:
    """
    What the user gave as a function of observations.

    :param position: Function from a batch of observations to positions, indices of a vector, or None for the whole vector, or
        for ``"achieved_goal"`` of a dictionary
    :param space: Observation space
    :return: Function from a batch of observations to positions, shape ``(batch, position_dim)``
    :raises ValueError: if observations are images or dictionaries and there is no function, or an index is out of range
    """
    if callable(position):
        return _Function(position)
    if position is None and isinstance(space, spaces.Dict) and "achieved_goal" in space.spaces:
        return _achieved_goal
    if not isinstance(space, spaces.Box) or is_image_space(space):
        kind = "images" if isinstance(space, spaces.Box) else f"{type(space).__name__} observations"
        raise ValueError(
            f"position must be a function from a batch of observations to positions of shape (batch, n) for {kind}, got "
            f"{position!r}: trajectories are compared by where they lead"
        )
    size = int(np.prod(space.shape))
    if position is None:
        position = range(size)
    if (
        not isinstance(position, (list, tuple, range, np.ndarray))
        or len(position) == 0
        or not all(isinstance(i, (int, np.integer)) and not isinstance(i, bool) and 0 <= i < size for i in position)
    ):
        raise ValueError(f"position must hold indices from 0 to {size - 1} of the observation, got {position!r}")
    return _Entries(tuple(position))


def _achieved_goal(observations: Any) -> npt.ArrayLike:
    return np.asarray(observations["achieved_goal"])


class _Function(CloudpickleWrapper):
    """A function of the user's, which may be one that the standard library cannot pickle."""

    def __call__(self, observations: Any) -> npt.ArrayLike:
        positions: npt.ArrayLike = self.var(observations)
        return positions


@dataclass(frozen=True)
class _Entries:
    """The given entries of flat observations; a class so that a buffer can be pickled."""

    indices: tuple[int, ...]

    def __call__(self, observations: Any) -> npt.ArrayLike:
        return np.asarray(observations).reshape(len(observations), -1)[:, self.indices]


class TrajectoryReplayBuffer(ReplayBuffer):
    """
    Transitions by trajectory. A transition has two target actions, for the exploration and for the mode of its trajectory.
    When memory is short, whole trajectories go: the oldest failure, then the oldest success of the mode that has most of them,
    so that no mode is lost because another one is taken more often. A success since the last clustering counts as one of the
    mode that it is near.

    :param buffer_size: Largest number of transitions
    :param observation_space: Observation space
    :param action_space: Action space
    :param device: PyTorch device of the batches
    :param n_envs: Number of environments
    :param optimize_memory_usage: Must be False
    :param handle_timeout_termination: Whether time-outs bootstrap
    :param position: As in :func:`position_function`
    :param max_successes: Largest number of successful trajectories; all of them are compared with one another
    :param max_points: Trajectories are compared by this many positions at most, evenly spaced
    :raises ValueError: if an argument is out of its range
    """

    #: Only rows below ``pos``, or all when ``full``, hold anything, see :mod:`sb3_qsm.common.checkpoint`
    rowwise = True

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        device: th.device | str = "auto",
        n_envs: int = 1,
        optimize_memory_usage: bool = False,
        handle_timeout_termination: bool = True,
        position: PositionFunction | Sequence[int] | None = None,
        max_successes: int = 500,
        max_points: int = 100,
    ) -> None:
        if optimize_memory_usage:
            raise ValueError("optimize_memory_usage must be False: trajectories are not stored one after the other")
        for name, value, lowest in (("max_successes", max_successes, 1), ("max_points", max_points, 2)):
            if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
                raise ValueError(f"{name} must be an integer >= {lowest}, got {value!r}")
        self.position = position_function(position, observation_space)
        # Rows are dealt out one by one, whichever environment they come from
        super().__init__(
            buffer_size,
            observation_space,
            action_space,
            device,
            1,
            False,
            handle_timeout_termination=handle_timeout_termination,
        )
        self.max_successes = max_successes
        self.max_points = max_points
        #: Finished episodes by their id, from the oldest to the newest
        self.trajectories: dict[int, Trajectory] = {}
        self.next_id = 0
        #: Positions of the trajectories that stood for the modes when the modes were assigned
        self.representatives: list[npt.NDArray[np.float64]] = []
        self.row_modes = np.full(self.buffer_size, FREE)
        # Trajectories with smaller ids were there when the modes were assigned
        self._assigned_id = 0
        # Rows of the modes, looked for when they are sampled: a buffer may have a million
        self._mode_rows: dict[int, Rows] = {}
        # Modes that the successes since then are near, by their ids
        self._near: dict[int, int] = {}
        self.target_actions = np.zeros((self.buffer_size, 2, self.action_dim), dtype=np.float32)
        # Drawn from a copy: the environment's own space draws what it would have drawn
        example = copy.deepcopy(observation_space).sample()
        one = {key: value[None] for key, value in example.items()} if isinstance(example, dict) else np.asarray(example)[None]
        self.positions = np.zeros((self.buffer_size, self._positions(one).shape[1]), dtype=np.float32)
        # Zeros take no memory before they are written
        self.next_positions = np.zeros_like(self.positions)
        self._free: list[int] = []
        self._open: list[list[int]] = [[] for _ in range(n_envs)]

    # What can be looked for again is in no file, also in none of before it was kept
    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_mode_rows", "_near")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({"_assigned_id": 0, **state}, _mode_rows={}, _near={})

    def size(self) -> int:
        """Number of transitions."""
        return (self.buffer_size if self.full else self.pos) - len(self._free)

    def add(
        self,
        obs: Any,
        next_obs: Any,
        action: npt.NDArray[Any],
        reward: npt.NDArray[Any],
        done: npt.NDArray[Any],
        infos: list[dict[str, Any]],
    ) -> None:
        """
        Store a step of every environment.

        :param obs: Observations
        :param next_obs: Observations one step later; at the end of an episode the last one, not the next episode's first
        :param action: Scaled actions
        :param reward: Rewards
        :param done: Whether the episodes ended
        :param infos: Their infos, with ``"success"`` or ``"is_success"`` at the end of an episode
        :raises ValueError: if the success is missing there, or the buffer is full of unfinished episodes
        """
        positions, next_positions = self._positions(obs), self._positions(next_obs)
        # Ctrl-C half way would leave a buffer that has lost count of its rows
        with uninterrupted():
            for i, info in enumerate(infos):
                row = self._take_row()
                high_water = self.pos, self.full
                self.pos = row
                one = slice(i, i + 1)
                super().add(rows_of(obs, one), rows_of(next_obs, one), action[one], reward[one], done[one], [info])
                self.pos, self.full = high_water
                self.positions[row], self.next_positions[row] = positions[i], next_positions[i]
                self.target_actions[row] = self.actions[row, 0]
                self.row_modes[row] = UNASSIGNED
                self._open[i].append(row)
                if done[i]:
                    self._finish(i, success_of(info))

    def _positions(self, observations: Any) -> npt.NDArray[np.float32]:
        positions = np.asarray(self.position(observations), dtype=np.float32)
        n = len(next(iter(observations.values())) if isinstance(observations, dict) else observations)
        if positions.ndim != 2 or len(positions) != n or not np.isfinite(positions).all():
            raise ValueError(
                f"position must return finite numbers of shape (batch, n), here ({n}, n), got shape {positions.shape}"
                f"{'' if np.isfinite(positions).all() else ' with a number that is not finite'}"
            )
        return positions

    def _take_row(self) -> int:
        if not self._free and self.full:
            self._evict(None)
        if self._free:
            return self._free.pop()
        row = self.pos
        self.pos += 1
        if self.pos == self.buffer_size:
            self.pos, self.full = 0, True
        return row

    def _evict(self, success: bool | None) -> None:
        """Remove the trajectory that is missed least, or the success that is."""
        failed = next((trajectory for trajectory in self.trajectories.values() if not trajectory.success), None)
        if failed is not None and success is not True:
            self._remove(failed)
            return
        successes = [trajectory for trajectory in self.trajectories.values() if trajectory.success]
        if not successes:
            raise ValueError(f"buffer_size must hold at least one whole episode of every environment, got {self.buffer_size}")
        # What has no mode may be the first of a new one, so it goes only where there is more of it than of any mode
        modes = [self._mode_near(trajectory) for trajectory in successes]
        largest = max(set(modes), key=lambda mode: (modes.count(mode), mode != UNASSIGNED))
        self._remove(successes[modes.index(largest)])

    def _mode_near(self, trajectory: Trajectory) -> int:
        """Mode of a trajectory. Of one that no clustering has seen, that which it is near, if it is near one."""
        if trajectory.mode != UNASSIGNED or trajectory.id < self._assigned_id or not self.representatives:
            return trajectory.mode
        if trajectory.id not in self._near:
            distances = [dtw_distance(trajectory.positions, positions) for positions in self.representatives]
            near = min(distances) <= half_way(self.representatives)
            self._near[trajectory.id] = int(np.argmin(distances)) if near else UNASSIGNED
        return self._near[trajectory.id]

    def _remove(self, trajectory: Trajectory) -> None:
        del self.trajectories[trajectory.id]
        self._near.pop(trajectory.id, None)
        self.row_modes[trajectory.rows] = FREE
        self._free.extend(trajectory.rows.tolist())
        if trajectory.mode != UNASSIGNED:
            self._mode_rows.pop(trajectory.mode, None)

    def _finish(self, env: int, success: bool) -> None:
        rows = np.array(self._open[env], dtype=np.int64)
        self._open[env] = []
        path = np.concatenate([self.positions[rows], self.next_positions[rows[-1:]]])
        points = np.unique(np.linspace(0, len(path) - 1, min(len(path), self.max_points)).round().astype(int))
        total_reward = float(self.rewards[rows].sum())
        trajectory = Trajectory(self.next_id, rows, path[points].astype(np.float64), success, total_reward)
        self.trajectories[self.next_id] = trajectory
        self.next_id += 1
        if success and sum(other.success for other in self.trajectories.values()) > self.max_successes:
            self._evict(True)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.trajectories.clear()
        self.representatives = []
        self._mode_rows, self._near = {}, {}
        self.row_modes[:] = FREE
        self._free, self._open = [], [[] for _ in self._open]

    def discard_unfinished(self, n_envs: int | None = None) -> None:
        """
        Forget the episodes that will not go on because the environments are reset.

        :param n_envs: Number of environments from now on; by default as many as before
        """
        for rows in self._open:
            self.row_modes[rows] = FREE
            self._free.extend(rows)
        self._open = [[] for _ in range(len(self._open) if n_envs is None else n_envs)]

    def successes(self) -> list[Trajectory]:
        """Successful trajectories, oldest first."""
        return [trajectory for trajectory in self.trajectories.values() if trajectory.success]

    def visited_positions(self) -> npt.NDArray[np.float32]:
        """All positions, shape ``(size, position_dim)``."""
        visited: npt.NDArray[np.float32] = self.positions[self.row_modes != FREE]
        return visited

    def assign(self, modes: dict[int, int], parents: Sequence[int | None]) -> None:
        """
        Give trajectories their modes. The target actions of one whose mode goes on, or was copied, stay; in a mode that begins
        with the exploration's critic they are the exploration's; else they are the actions that were executed.

        :param modes: Mode of each trajectory, by its id
        :param parents: Old mode that each mode continues or was copied from, None for the exploration
        """
        for trajectory in self.trajectories.values():
            mode = modes.get(trajectory.id, UNASSIGNED)
            rows = trajectory.rows
            parent = parents[mode] if mode != UNASSIGNED else None
            if parent is None:
                self.target_actions[rows, MODE] = self.target_actions[rows, EXPLORATION]
            elif parent != trajectory.mode:
                self.target_actions[rows, MODE] = self.actions[rows, 0]
            trajectory.mode = mode
            self.row_modes[rows] = mode
        self._mode_rows, self._near, self._assigned_id = {}, {}, self.next_id

    def sample(  # type: ignore[override]
        self, batch_size: int, env: VecNormalize | None = None
    ) -> ReplayBufferSamples | DictReplayBufferSamples:
        """
        Draw transitions from the whole buffer.

        :param batch_size: Number of transitions
        :param env: Environment that normalises observations and rewards
        :return: The transitions
        """
        return self.sample_groups(batch_size, 0, env).transitions

    def sample_groups(self, batch_size: int, n_modes: int, env: VecNormalize | None = None) -> ModeBatch:
        """
        Draw a batch that has all modes in equal parts: the first group from everything there is, unfinished episodes too, the
        others from the trajectories of a mode. What is left over by the division goes to the first group, and the share of a
        mode without trajectories too.

        :param batch_size: Number of transitions
        :param n_modes: Number of modes
        :param env: Environment that normalises observations and rewards
        :return: The batch
        """
        pools = [self._rows_of(mode) for mode in range(n_modes)]
        sizes = [batch_size // (n_modes + 1) if len(pool) else 0 for pool in pools]
        sizes.insert(0, batch_size - sum(sizes))
        everything = self._draw_rows(sizes[0])
        groups = [pool[np.random.randint(len(pool), size=size)] for pool, size in zip(pools, sizes[1:], strict=True) if size]
        rows = np.concatenate([everything, *groups])
        columns = np.where(np.arange(batch_size) < sizes[0], EXPLORATION, MODE)
        return ModeBatch(
            rows,
            sizes,
            self._get_samples(rows, env),
            self.to_torch(self.positions[rows]),
            self.to_torch(self.next_positions[rows]),
            self.to_torch(self.target_actions[rows, columns]),
        )

    def _draw_rows(self, size: int) -> Rows:
        """Draw from all rows that hold a transition, without a look at each of them."""
        drawn = np.random.randint(self.size(), size=size)
        # The number of free rows before the one that is the n-th among the others
        before = np.sort(self._free) - np.arange(len(self._free))
        rows: Rows = drawn + np.searchsorted(before, drawn, side="right")
        return rows

    def _rows_of(self, mode: int) -> Rows:
        if mode not in self._mode_rows:
            row_modes = self.row_modes if self.full else self.row_modes[: self.pos]
            self._mode_rows[mode] = np.flatnonzero(row_modes == mode)
        return self._mode_rows[mode]

    def set_target_actions(self, batch: ModeBatch, target_actions: npt.NDArray[np.float32]) -> None:
        """
        Write target actions back.

        :param batch: Batch that they belong to
        :param target_actions: Scaled actions, shape ``(batch, action_dim)``
        """
        columns = np.where(np.arange(len(batch.rows)) < batch.sizes[0], EXPLORATION, MODE)
        self.target_actions[batch.rows, columns] = target_actions


def rows_of(observations: Any, part: slice) -> Any:
    """
    :param observations: Batch of observations, or a dictionary of them
    :param part: Rows
    :return: These rows
    """
    if isinstance(observations, dict):
        return {key: value[part] for key, value in observations.items()}
    return observations[part]


class DictTrajectoryReplayBuffer(TrajectoryReplayBuffer, DictReplayBuffer):  # type: ignore[misc]
    """:class:`TrajectoryReplayBuffer` for dictionaries of observations."""
