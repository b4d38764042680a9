"""The replay buffer of trajectories."""

import itertools
import pickle
import re
import signal
from copy import deepcopy

import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_qsm.ddiffpg.buffers import (
    EXPLORATION,
    FREE,
    MODE,
    UNASSIGNED,
    DictTrajectoryReplayBuffer,
    TrajectoryReplayBuffer,
)
from tests.test_run import BOX, DummyEnv

ACTIONS = spaces.Box(-1.0, 1.0, (2,), np.float32)


def make_buffer(buffer_size: int = 100, n_envs: int = 1, **kwargs) -> TrajectoryReplayBuffer:
    return TrajectoryReplayBuffer(buffer_size, BOX, ACTIONS, "cpu", n_envs, **kwargs)


def add_episode(buffer, length: int, success: bool, value: float = 0.0, env: int = 0, timeout: bool = False) -> None:
    """An episode of one of two environments; the other ones do nothing worth keeping and are not stored."""
    for step in range(length):
        done = step == length - 1
        info = {"TimeLimit.truncated": timeout and done, **({"success": success} if done else {})}
        obs = np.full((1, 3), value + 0.01 * step, dtype=np.float32)
        action = np.full((1, 2), value / 100, dtype=np.float32)
        buffer.add(obs, obs + 0.01, action, np.array([float(done and success)]), np.array([done]), [info])


def modes_of(buffer) -> dict[int, int]:
    return {trajectory.id: trajectory.mode for trajectory in buffer.trajectories.values()}


def test_trajectories_hold_their_transitions_in_order():
    buffer = make_buffer()
    add_episode(buffer, 5, True, 1.0)
    add_episode(buffer, 3, False, 2.0)
    add_episode(buffer, 1, True, 3.0)
    first, second, third = buffer.trajectories.values()
    assert [len(t.rows) for t in (first, second, third)] == [5, 3, 1]
    assert [t.success for t in (first, second, third)] == [True, False, True]
    assert [t.total_reward for t in (first, second, third)] == [1.0, 0.0, 1.0]
    np.testing.assert_allclose(first.positions[:, 0], [1.0, 1.01, 1.02, 1.03, 1.04, 1.05], atol=1e-6)
    np.testing.assert_allclose(buffer.observations[second.rows, 0, 0], [2.0, 2.01, 2.02], atol=1e-6)
    np.testing.assert_allclose(third.positions[:, 1], [3.0, 3.01], atol=1e-6)
    assert buffer.size() == 9
    assert buffer.successes() == [first, third]


def test_several_environments_do_not_mix():
    buffer = make_buffer(n_envs=3)
    lengths = [2, 3, 6]
    for step in range(6):
        obs = np.array([[env, step, 0.0] for env in range(3)], dtype=np.float32)
        dones = np.array([(step + 1) % length == 0 for length in lengths])
        infos = [{"is_success": env == 1} for env in range(3)]
        buffer.add(obs, obs + np.array([0, 1, 0]), np.zeros((3, 2)), np.ones(3), dones, infos)
    assert buffer.size() == 18
    lengths_found = {}
    for t in buffer.trajectories.values():
        (env,) = set(t.positions[:, 0])
        lengths_found.setdefault(int(env), []).append(len(t.rows))
        assert t.success == (env == 1)
        np.testing.assert_array_equal(np.diff(t.positions[:, 1]), 1.0)
    assert lengths_found == {0: [2, 2, 2], 1: [3, 3], 2: [6]}


def test_positions_are_thinned_out_evenly():
    buffer = make_buffer(1000, max_points=5)
    add_episode(buffer, 100, True)
    (t,) = buffer.successes()
    np.testing.assert_allclose(t.positions[:, 0], [0.0, 0.25, 0.5, 0.75, 1.0], atol=1e-6)
    assert t.positions.dtype == np.float64
    assert t.positions.flags.c_contiguous


def test_memory_is_taken_from_the_oldest_failure_first():
    buffer = make_buffer(12)
    for i, success in enumerate([True, False, False]):
        add_episode(buffer, 4, success, float(i))
    add_episode(buffer, 3, True, 3.0)
    assert list(buffer.trajectories) == [0, 2, 3]
    assert buffer.size() == 11
    add_episode(buffer, 2, False, 4.0)
    assert list(buffer.trajectories) == [0, 3, 4]
    assert (buffer.row_modes == FREE).sum() == 12 - buffer.size()
    # What is left is whole
    for t in buffer.trajectories.values():
        np.testing.assert_allclose(buffer.observations[t.rows, 0, 0], t.id + 0.01 * np.arange(len(t.rows)), atol=1e-6)


def test_no_mode_is_lost_to_a_more_frequent_one():
    buffer = make_buffer(12, max_successes=4)
    add_episode(buffer, 2, True, 0.0)
    for i in range(1, 4):
        add_episode(buffer, 2, True, float(i))
    buffer.assign({0: 0, 1: 1, 2: 1, 3: 1}, [None, None])
    # One too many: the oldest of the larger mode goes, not the oldest of all, and not the new one
    add_episode(buffer, 2, True, 4.0)
    assert modes_of(buffer) == {0: 0, 2: 1, 3: 1, 4: UNASSIGNED}
    # Without failures and with memory short it is the same
    add_episode(buffer, 2, False, 5.0)
    add_episode(buffer, 4, False, 6.0)
    assert modes_of(buffer) == {0: 0, 2: 1, 3: 1, 4: UNASSIGNED, 6: UNASSIGNED}
    add_episode(buffer, 5, False, 7.0)
    assert set(modes_of(buffer)) == {0, 3, 4, 7}


def test_a_rare_way_outlasts_a_frequent_one_until_it_is_a_mode():
    """One rare success and 39 others between two clusterings, of which the buffer holds 50: more than half."""
    pytest.importorskip("dtaidistance")
    from sb3_qsm.ddiffpg.modes import TrajectoryDistances, cluster, medoid, squareform

    buffer, distances, rare = make_buffer(10_000, max_successes=50), TrajectoryDistances(), []
    rng = np.random.default_rng(0)
    for clustering in range(4):
        rare.append(buffer.next_id)
        for way in [-20.0, *[20.0] * 39]:
            add_episode(buffer, 4, True, way + rng.normal(0, 0.2))
        distances.keep(buffer.trajectories)
        successes = buffer.successes()
        assert len(successes) == min(50, 40 * (clustering + 1))
        labels = cluster(distances.condensed(successes))
        groups = [[t for t, label in zip(successes, labels, strict=True) if label == k] for k in range(labels.max() + 1)]
        parents = [None] * len(groups) if clustering == 0 else [min(k, 0) for k in range(len(groups))]
        buffer.assign({t.id: k for k, group in enumerate(groups) for t in group}, parents)
        middles = [medoid(squareform(distances.condensed(group))) for group in groups]
        buffer.representatives = [group[middle].positions for group, middle in zip(groups, middles, strict=True)]
        assert set(rare) <= buffer.trajectories.keys()
    assert len(groups) == 2
    # What the buffer works out itself is in no file, and worked out again
    again = pickle.loads(pickle.dumps(buffer))
    for one in (buffer, again):
        add_episode(one, 4, True, 20.0)
    assert again.trajectories.keys() == buffer.trajectories.keys()


def test_unfinished_episodes_are_forgotten():
    buffer = make_buffer(n_envs=2)
    obs = np.zeros((2, 3), dtype=np.float32)
    for _ in range(3):
        buffer.add(obs, obs, np.zeros((2, 2)), np.zeros(2), np.zeros(2, dtype=bool), [{}, {}])
    dones = np.array([True, False])
    buffer.add(obs, obs, np.zeros((2, 2)), np.zeros(2), dones, [{"success": True}, {}])
    assert buffer.size() == 8
    buffer.discard_unfinished()
    assert buffer.size() == 4
    assert len(buffer.trajectories) == 1
    batch = buffer.sample_groups(50, 0)
    assert set(batch.rows) == set(buffer.trajectories[0].rows)


def test_a_buffer_full_of_one_unfinished_episode():
    buffer = make_buffer(4)
    with pytest.raises(ValueError, match="buffer_size must hold at least one whole episode of every environment, got 4"):
        add_episode(buffer, 6, True)


def test_time_outs_bootstrap_and_terminations_do_not():
    buffer = make_buffer()
    add_episode(buffer, 2, False, timeout=True)
    add_episode(buffer, 2, True)
    rows = np.concatenate([t.rows for t in buffer.trajectories.values()])
    assert buffer._get_samples(rows).dones.flatten().tolist() == [0.0, 0.0, 0.0, 1.0]


# Batches


def filled_buffer() -> TrajectoryReplayBuffer:
    """Two modes of different size, a failure in one of them, and an unfinished episode."""
    buffer = make_buffer(200)
    for i in range(6):
        add_episode(buffer, 10, i < 5, float(i))
    buffer.assign({0: 0, 1: 1, 2: 1, 3: 1, 4: 1, 5: 0}, [None, None])
    obs = np.full((1, 3), 6.0, dtype=np.float32)
    buffer.add(obs, obs, np.zeros((1, 2)), np.zeros(1), np.zeros(1, dtype=bool), [{}])
    return buffer


@pytest.mark.parametrize(("batch_size", "sizes"), [(60, [20, 20, 20]), (62, [22, 20, 20]), (3, [1, 1, 1]), (2, [2, 0, 0])])
def test_batches_have_all_modes_in_equal_parts(batch_size, sizes):
    buffer = filled_buffer()
    batch = buffer.sample_groups(batch_size, 2)
    assert batch.sizes == sizes
    assert len(batch.rows) == len(batch.transitions.actions) == len(batch.target_actions) == batch_size
    episodes = np.floor(batch.transitions.observations[:, 0].numpy() + 1e-4).astype(int)
    ends = np.cumsum(sizes)
    assert set(episodes[ends[0] : ends[1]]) <= {0, 5}
    assert set(episodes[ends[1] :]) <= {1, 2, 3, 4}
    np.testing.assert_allclose(batch.positions, batch.transitions.observations)
    np.testing.assert_allclose(batch.next_positions, batch.transitions.next_observations)


def test_the_first_group_is_everything():
    buffer = filled_buffer()
    batch = buffer.sample_groups(3000, 2)
    assert set(batch.rows[:1000]) == set(np.flatnonzero(buffer.row_modes != FREE))
    assert len(set(batch.rows[:1000])) == 61
    assert buffer.sample(10).actions.shape == (10, 2)


def test_batches_after_every_change():
    """Rows are looked for only when they have changed, and free ones are never drawn."""
    buffer = make_buffer(60)
    rng = np.random.default_rng(0)
    for i in range(60):
        add_episode(buffer, int(rng.integers(1, 9)), bool(rng.random() < 0.7), float(i))
        if i % 3 == 0:
            buffer.assign({id: id % 2 for id in buffer.trajectories}, [None, None])
        batch = buffer.sample_groups(9000, 2)
        ends = np.cumsum([0, *batch.sizes])
        everything, *modes = (set(batch.rows[start:end]) for start, end in itertools.pairwise(ends))
        assert everything == set(np.flatnonzero(buffer.row_modes != FREE))
        for mode, rows in enumerate(modes):
            assert rows == set(np.flatnonzero(buffer.row_modes == mode))
    assert buffer.full


def test_a_mode_without_trajectories_has_no_part():
    buffer = filled_buffer()
    batch = buffer.sample_groups(40, 3)
    assert batch.sizes == [20, 10, 10, 0]


# Target actions


def test_target_actions_start_as_the_actions_and_are_kept_by_group():
    buffer = filled_buffer()
    batch = buffer.sample_groups(60, 2)
    np.testing.assert_array_equal(batch.target_actions, batch.transitions.actions)
    buffer.set_target_actions(batch, np.full((60, 2), 0.5, dtype=np.float32))
    assert (buffer.target_actions[batch.rows[:20], EXPLORATION] == 0.5).all()
    assert (buffer.target_actions[batch.rows[20:], MODE] == 0.5).all()
    only_explored = sorted(set(batch.rows[:20]) - set(batch.rows[20:]))
    np.testing.assert_array_equal(buffer.target_actions[only_explored, MODE], buffer.actions[only_explored, 0])


def test_target_actions_follow_the_modes():
    buffer = filled_buffer()
    buffer.target_actions[:, MODE] = 0.25
    buffer.target_actions[:, EXPLORATION] = -0.25
    executed = buffer.actions[:, 0].copy()

    def targets(number: int) -> set[float]:
        return set(buffer.target_actions[buffer.trajectories[number].rows, MODE].flatten())

    # 0 goes on, 1 is split into a continuation and a copy, 4 comes from the exploration, 3 goes from one mode to the other
    buffer.assign({0: 0, 1: 1, 2: 2, 3: 0, 4: 3, 5: 0}, [0, 1, 1, None])
    assert [targets(i) for i in (0, 1, 2, 5)] == [{0.25}] * 4
    assert targets(4) == {-0.25}
    assert targets(3) == set(executed[buffer.trajectories[3].rows].flatten())
    assert modes_of(buffer) == {0: 0, 1: 1, 2: 2, 3: 0, 4: 3, 5: 0}
    for number, mode in modes_of(buffer).items():
        assert (buffer.row_modes[buffer.trajectories[number].rows] == mode).all()


# Observations and positions


def test_dictionaries_and_normalisation():
    space = spaces.Dict({"achieved_goal": spaces.Box(-1.0, 1.0, (2,)), "other": BOX})
    buffer = DictTrajectoryReplayBuffer(50, space, ACTIONS, "cpu", 2)
    env = VecNormalize(DummyVecEnv([lambda: DummyEnv(space, ACTIONS)]))
    env.obs_rms["achieved_goal"].mean[:] = 1.0
    for step in range(3):
        obs = {key: np.full((2, *box.shape), 0.1 * step, dtype=np.float32) for key, box in space.spaces.items()}
        dones = np.array([step == 2, False])
        buffer.add(obs, obs, np.zeros((2, 2)), np.ones(2), dones, [{"success": True}, {}])
    batch = buffer.sample_groups(8, 0, env)
    assert batch.transitions.observations["other"].shape == (8, 3)
    # Positions are those of the environment, observations are normalised
    assert batch.positions.min() >= 0.0
    assert batch.transitions.observations["achieved_goal"].max() < -0.7
    np.testing.assert_allclose(buffer.trajectories[0].positions[:, 0], [0.0, 0.1, 0.2, 0.2], atol=1e-6)


@pytest.mark.parametrize(
    ("position", "dim"), [(None, 3), ([0], 1), ((2, 0), 2), (lambda observations: observations[:, :2] ** 2, 2)]
)
def test_positions(position, dim):
    buffer = make_buffer(position=position)
    add_episode(buffer, 2, True, 3.0)
    assert buffer.positions.shape == (100, dim)
    expected = 9.0 if callable(position) else 3.0
    assert buffer.trajectories[0].positions[0].tolist() == pytest.approx([expected] * dim)


def test_making_a_buffer_does_not_draw_from_the_space():
    space = deepcopy(BOX)
    space.seed(3)
    expected = deepcopy(space).sample()
    TrajectoryReplayBuffer(10, space, ACTIONS)
    np.testing.assert_array_equal(space.sample(), expected)


IMAGES = spaces.Box(0, 255, (3, 36, 36), np.uint8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_buffer(position=[3]), "position must hold indices from 0 to 2 of the observation, got [3]"),
        (lambda: make_buffer(position=[]), "position must hold indices from 0 to 2 of the observation, got []"),
        (lambda: make_buffer(position="xy"), "position must hold indices from 0 to 2 of the observation, got 'xy'"),
        (
            lambda: TrajectoryReplayBuffer(10, IMAGES, ACTIONS),
            "position must be a function from a batch of observations to positions of shape (batch, n) for images, got None",
        ),
        (
            lambda: TrajectoryReplayBuffer(10, IMAGES, ACTIONS, position=[0, 1]),
            "position must be a function from a batch of observations to positions of shape (batch, n) for images, got [0, 1]",
        ),
        (
            lambda: DictTrajectoryReplayBuffer(10, spaces.Dict({"a": BOX}), ACTIONS),
            "position must be a function from a batch of observations to positions of shape (batch, n) for Dict observations",
        ),
        (
            lambda: make_buffer(position=lambda observations: observations[0]),
            "position must return finite numbers of shape (batch, n), here (1, n), got shape (3,)",
        ),
        (
            lambda: make_buffer(position=lambda observations: observations * np.nan),
            "position must return finite numbers of shape (batch, n), here (1, n), got shape (1, 3) with a number that is not",
        ),
        (lambda: make_buffer(optimize_memory_usage=True), "optimize_memory_usage must be False"),
        (lambda: make_buffer(max_successes=0), "max_successes must be an integer >= 1, got 0"),
        (lambda: make_buffer(max_points=1.5), "max_points must be an integer >= 2, got 1.5"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        make()


def test_no_success_flag():
    buffer = make_buffer()
    obs = np.zeros((1, 3), dtype=np.float32)
    message = "must have 'success' or 'is_success', True if the episode succeeded; there: 'lives'"
    with pytest.raises(ValueError, match=message):
        buffer.add(obs, obs, np.zeros((1, 2)), np.zeros(1), np.ones(1, dtype=bool), [{"lives": 3}])


def test_reset_forgets_everything():
    buffer = filled_buffer()
    buffer.reset()
    assert (buffer.size(), buffer.trajectories, buffer.successes()) == (0, {}, [])
    add_episode(buffer, 4, True, 1.0)
    assert buffer.size() == 4
    assert buffer.sample_groups(6, 0).sizes == [6]


def test_interrupt_while_a_step_is_stored(monkeypatch):
    """Ctrl-C waits until the buffer knows again which rows are whose."""
    buffer = make_buffer(20)
    for value in range(6):
        add_episode(buffer, 4, False, float(value))
    normal = ReplayBuffer.add

    def interrupted(self, *args):
        signal.raise_signal(signal.SIGINT)
        normal(self, *args)

    # Which xdist's workers ignore
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    size, pos = buffer.size(), buffer.pos
    try:
        monkeypatch.setattr(ReplayBuffer, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            add_episode(buffer, 4, False, 9.0)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert (buffer.pos, buffer.full) == (pos, True)
    rows = np.concatenate([trajectory.rows for trajectory in buffer.trajectories.values()])
    assert len(set(rows.tolist())) == len(rows) == buffer.size() - 1 <= size
    assert buffer._open[0][0] not in rows


def test_pickled_with_everything():
    buffer = filled_buffer()
    again = pickle.loads(pickle.dumps(buffer))
    assert modes_of(again) == modes_of(buffer)
    for name in ("observations", "actions", "rewards", "row_modes", "target_actions", "positions", "next_positions"):
        np.testing.assert_array_equal(getattr(again, name), getattr(buffer, name))
    np.random.seed(0)
    first = buffer.sample_groups(30, 2)
    np.random.seed(0)
    np.testing.assert_array_equal(first.rows, again.sample_groups(30, 2).rows)
