"""Saving, loading and resuming with modes and buffers."""

import io
import math
import re
import signal
import sys
import warnings

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.logger import Logger

from sb3_qsm import QSM, DDiffPG
from sb3_qsm.common.checkpoint import CheckpointError, RunCheckpointCallback
from sb3_qsm.ddiffpg.buffers import UNASSIGNED, TrajectoryReplayBuffer
from sb3_qsm.ddiffpg.policies import ModeActor, ModePolicy
from sb3_qsm.export import to_onnx, to_torch_export
from tests.ddiffpg.models import MAX_STEPS, SMALL, make_env, make_model, make_trained
from tests.test_resume import assert_same, learner_state

pytest.importorskip("dtaidistance")

OBSERVATIONS = np.random.default_rng(0).uniform(-1.0, 1.0, (5, 2)).astype(np.float32)


def assert_same_modes(first: DDiffPG, second: DDiffPG) -> None:
    assert len(first.modes) == len(second.modes) == 2
    for one, other in zip(first.modes, second.modes, strict=True):
        assert (one.size, one.mean_return) == (other.size, other.mean_return)
        assert one.success_rate == other.success_rate or (math.isnan(one.success_rate) and math.isnan(other.success_rate))
        np.testing.assert_array_equal(one.trajectory, other.trajectory)


def predictions(model) -> np.ndarray:
    return np.stack([model.predict(OBSERVATIONS, deterministic=True, mode=mode)[0] for mode in (None, 0, 1)])


def assert_same_updates(model: DDiffPG, loaded: DDiffPG) -> None:
    """The updates after loading, clustering included, are those without it."""
    model.replay_buffer.discard_unfinished()
    for one in (model, loaded):
        np.random.seed(4)
        th.manual_seed(4)
        one.set_logger(Logger(None, []))
        one.update_modes()
        one.train(gradient_steps=3, batch_size=16)
    assert_same(learner_state(model), learner_state(loaded))
    assert_same_modes(model, loaded)
    np.testing.assert_array_equal(model.replay_buffer.target_actions, loaded.replay_buffer.target_actions)


@pytest.mark.parametrize("kwargs", [{}, {"n_atoms": 5, "v_max": 2.0}], ids=["plain", "categorical"])
def test_save_load(tmp_path, kwargs):
    model = make_trained(**kwargs)
    model.set_mode(1)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = DDiffPG.load(tmp_path / "model", env=make_env(), device="cpu")
    assert_same(learner_state(model), learner_state(loaded))
    assert_same_modes(model, loaded)
    np.testing.assert_array_equal(predictions(model), predictions(loaded))
    assert loaded.mode == loaded.actor.mode == 1
    np.testing.assert_array_equal(*(m.predict(OBSERVATIONS, deterministic=True)[0] for m in (model, loaded)))

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # its modes are the model's
        loaded.load_replay_buffer(tmp_path / "buffer")
    assert_same_updates(model, loaded)
    loaded.learn(60, reset_num_timesteps=False)
    assert loaded.num_timesteps == 260


def test_fewer_steps_of_acting_are_saved(tmp_path):
    model = make_trained(policy_kwargs={"sampling_steps": 1})
    model.save(tmp_path / "model")
    loaded = DDiffPG.load(tmp_path / "model", env=make_env(), device="cpu")
    assert loaded.actor.sampling_steps == model.actor.sampling_steps == 1
    np.testing.assert_array_equal(predictions(model), predictions(loaded))
    loaded.actor.sampling_steps = None
    assert not np.allclose(predictions(model), predictions(loaded))


def side_of(positions: np.ndarray) -> bool:
    """Which of the two goals a trajectory came to."""
    return bool(positions[-1, 0] > positions[0, 0])


@pytest.mark.parametrize("moment", ["other numbers", "before the modes", "later"])
def test_a_replay_buffer_of_another_moment(tmp_path, moment):
    """Its trajectories get the numbers that the model has for their ways."""
    if moment == "before the modes":
        early = make_model(clustering_freq=1000).learn(200)
        del early.replay_buffer.representatives  # as in files of before there was such a thing
        early.save_replay_buffer(tmp_path / "buffer")
    model = make_trained()
    model.save(tmp_path / "model")
    if moment == "later":
        model.learn(200, reset_num_timesteps=False)
    if moment != "before the modes":
        buffer = model.replay_buffer
        buffer.assign({id: 1 - one.mode for id, one in buffer.trajectories.items() if one.mode >= 0}, [1, 0])
        buffer.representatives.reverse()
        model.save_replay_buffer(tmp_path / "buffer")

    loaded = DDiffPG.load(tmp_path / "model", env=make_env(), device="cpu")
    sides = [side_of(mode.trajectory) for mode in loaded.modes]
    assert sorted(sides) == [False, True]
    with pytest.warns(UserWarning, match="The modes of the replay buffer are not those of the model"):
        loaded.load_replay_buffer(tmp_path / "buffer")
    buffer = loaded.replay_buffer
    successes = [trajectory for trajectory in buffer.successes() if trajectory.mode >= 0]
    assert len(successes) > 0.8 * len(buffer.successes()) > 5
    for trajectory in successes:
        assert sides[trajectory.mode] == side_of(trajectory.positions)
        np.testing.assert_array_equal(buffer.row_modes[trajectory.rows], trajectory.mode)
        np.testing.assert_array_equal(buffer.target_actions[trajectory.rows, 1], buffer.actions[trajectory.rows, 0])
    # The numbers stay when the successes are clustered again, and a buffer saved now is the model's own
    loaded.update_modes()
    assert [side_of(mode.trajectory) for mode in loaded.modes] == sides
    loaded.save_replay_buffer(tmp_path / "own")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded.load_replay_buffer(tmp_path / "own")


def test_a_success_far_from_all_modes_gets_none(tmp_path):
    model = make_trained()
    model.save(tmp_path / "model")
    buffer = model.replay_buffer
    far = buffer.successes()[0]
    far.positions = far.positions + 10.0
    buffer.representatives = []
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = DDiffPG.load(tmp_path / "model", env=make_env(), device="cpu")
    with pytest.warns(UserWarning, match="not those of the model"):
        loaded.load_replay_buffer(tmp_path / "buffer")
    assert loaded.replay_buffer.trajectories[far.id].mode == UNASSIGNED
    assert {one.mode for one in loaded.replay_buffer.successes()} == {UNASSIGNED, 0, 1}


def test_resume(tmp_path):
    kwargs = {"position": lambda observations: observations[:, :2]}
    model = make_model(**kwargs)
    model.learn(200, callback=RunCheckpointCallback(1000, tmp_path))
    before = learner_state(model)
    again = DDiffPG.resume(tmp_path, make_env())
    assert_same(learner_state(again), before)
    assert_same_modes(model, again)
    model.replay_buffer.discard_unfinished()
    assert again.replay_buffer.size() == model.replay_buffer.size() > 150
    for one in (model, again):
        np.random.seed(4)
        th.manual_seed(4)
        one.set_logger(Logger(None, []))
        one.train(gradient_steps=3, batch_size=16)
    assert_same(learner_state(again), learner_state(model))
    again.learn(50, reset_num_timesteps=False)
    assert again.num_timesteps == 250


def test_an_assigned_buffer_has_no_part_in_the_episodes_that_go_on():
    first, second = make_model(clustering_freq=10_000), make_model(clustering_freq=10_000, seed=1)
    first.learn(101)
    second.learn(101)
    assert first.replay_buffer._open[0]
    assert second.replay_buffer._open[0]
    second.replay_buffer = first.replay_buffer
    second.learn(40, reset_num_timesteps=False)
    for trajectory in second.replay_buffer.trajectories.values():
        steps = np.linalg.norm(np.diff(trajectory.positions, axis=0), axis=1)
        assert steps.max() < 0.61
    # With its own buffer the episode goes on
    buffer = second.replay_buffer
    rows = list(buffer._open[0])
    assert rows
    before = buffer.observations[rows].copy()
    second.learn(MAX_STEPS, reset_num_timesteps=False)
    assert any(set(rows) < set(trajectory.rows) for trajectory in buffer.trajectories.values())
    np.testing.assert_array_equal(buffer.observations[rows], before)


def test_another_size_of_the_buffer_is_refused_by_resume(tmp_path):
    make_model().learn(100, callback=RunCheckpointCallback(50, tmp_path))
    with pytest.raises(
        CheckpointError, match="the checkpoint's replay buffer has max_successes=500, the model's max_successes=3"
    ):
        DDiffPG.resume(tmp_path, make_env(), replay_buffer_kwargs={"max_successes": 3})


def test_from_one_to_two_environments(tmp_path):
    model = make_trained()
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = DDiffPG.load(tmp_path / "model", env=make_env(2))
    loaded.load_replay_buffer(tmp_path / "buffer")
    loaded.learn(100, reset_num_timesteps=False)
    assert len(loaded.modes) == 2
    lengths = [len(trajectory.rows) for trajectory in loaded.replay_buffer.trajectories.values()]
    assert max(lengths) <= 8


def test_policy_and_actor_alone(tmp_path):
    model = make_trained()
    expected = predictions(model)
    model.policy.save(tmp_path / "policy")
    policy = ModePolicy.load(tmp_path / "policy")
    model.actor.save(tmp_path / "actor")
    actor = ModeActor.load(tmp_path / "actor")
    for i, mode in enumerate((None, 0, 1)):
        policy.actor.mode = actor.mode = mode
        np.testing.assert_allclose(policy.predict(OBSERVATIONS, deterministic=True)[0], expected[i], atol=1e-6)
        model.set_mode(mode)
        model.policy.save(tmp_path / "policy")
        model.actor.save(tmp_path / "actor")
        assert ModePolicy.load(tmp_path / "policy").actor.mode == ModeActor.load(tmp_path / "actor").mode == mode
        np.testing.assert_allclose(actor.predict(OBSERVATIONS, deterministic=True)[0], expected[i], atol=1e-6)


def test_algorithms_are_told_apart(tmp_path):
    make_model().save(tmp_path / "ddiffpg")
    with pytest.raises(ValueError, match=r"was not saved by QSM but by sb3_qsm\.ddiffpg"):
        QSM.load(tmp_path / "ddiffpg")
    QSM("MlpPolicy", "Pendulum-v1", policy_kwargs={"net_arch": [8]}, buffer_size=10).save(tmp_path / "qsm")
    with pytest.raises(ValueError, match=r"was not saved by DDiffPG but by sb3_qsm\.common"):
        DDiffPG.load(tmp_path / "qsm")


def test_safe_file(tmp_path):
    pytest.importorskip("safetensors")
    model = make_trained(position=[0, 1])
    model.set_mode(1)
    file = io.BytesIO()
    model.save_safe(file)
    file.seek(0)
    loaded = DDiffPG.load_safe(file, env=make_env(), device="cpu")
    assert_same(learner_state(model), learner_state(loaded))
    assert_same_modes(model, loaded)
    assert loaded.mode == 1
    np.testing.assert_array_equal(predictions(model), predictions(loaded))
    model.save_replay_buffer(tmp_path / "buffer")
    loaded.load_replay_buffer(tmp_path / "buffer")
    assert_same_updates(model, loaded)
    loaded.learn(50, reset_num_timesteps=False)

    # Other forms of the same
    model = make_model(position=np.array([0, 1]), replay_buffer_class=TrajectoryReplayBuffer, clustering_freq=1e3)
    other = io.BytesIO()
    model.save_safe(other)
    other.seek(0)
    loaded = DDiffPG.load_safe(other, env=make_env(), device="cpu")
    assert (loaded.position, loaded.replay_buffer_class, loaded.clustering_freq) == ([0, 1], TrajectoryReplayBuffer, 1000)
    with pytest.raises(ValueError, match="position="):
        make_model(position=lambda observations: observations).save_safe(io.BytesIO())
    file.seek(0)
    with pytest.raises(ValueError, match="it is one of 'DDiffPG'"):
        QSM.load_safe(file)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("sizes", [-1, 2], "state.sizes must be an integer >= 1, got -1"),
        ("sizes", [1], "state must have a size, a mean return, a trajectory and a list of"),
        ("clustered_at", -1, "state.clustered_at must be an integer >= 0, got -1"),
        ("mode", 2, "mode must be None or an integer from 0 to 1, got 2"),
        ("trajectories", [np.zeros((3, 2)), np.full((3, 2), np.nan)], "state.trajectories must be finite"),
        ("trajectories", [np.zeros((3, 2)), np.zeros((1, 2))], "of shape (n, position_dim)"),
        ("trajectories", [np.zeros((3, 5)), np.zeros((3, 5))], "trajectories of modes must have 2 columns, got 5"),
    ],
)
def test_hostile_state(monkeypatch, name, value, message):
    pytest.importorskip("safetensors")
    model = make_trained()
    state = {**model._safe_state(), name: value}
    monkeypatch.setattr(model, "_safe_state", lambda: state)
    # What is written is read at once, with the checks of loading
    with pytest.raises(ValueError, match=re.escape(message)):
        model.save_safe(io.BytesIO())


def test_safe_file_before_any_mode():
    pytest.importorskip("safetensors")
    file = io.BytesIO()
    make_model().save_safe(file)
    file.seek(0)
    loaded = DDiffPG.load_safe(file, **{name: SMALL[name] for name in ("buffer_size",)})
    assert loaded.modes == []
    file.seek(0)
    # No schedule sets it before an update
    loaded = DDiffPG.load_safe(file, novelty_learning_rate=0.5)
    assert loaded.novelty_optimizer.param_groups[0]["lr"] == 0.5


def test_learning_rate_of_the_novelty(tmp_path):
    make_model().learn(20).save(tmp_path / "model")
    model = DDiffPG.load(tmp_path / "model", env=make_env(), novelty_learning_rate=0.05)
    for rate in (0.05, 0.01):
        model.novelty_learning_rate = rate
        model.learn(5, reset_num_timesteps=False)
        assert model.novelty_optimizer.param_groups[0]["lr"] == rate


def test_interrupt_at_any_moment_of_a_clustering(tmp_path):
    """Whatever Ctrl-C interrupts, the model that is left can be saved, loaded, used and trained."""
    make_model(clustering_freq=10**6).learn(200).save(tmp_path / "model")
    model = make_model(clustering_freq=10**6).learn(200)
    model.save_replay_buffer(tmp_path / "buffer")
    calls, due, found = 0, 0, set()

    def count(*_) -> None:
        nonlocal calls
        calls += 1
        if calls == due:
            signal.raise_signal(signal.SIGINT)

    def update(model: DDiffPG) -> None:
        sys.setprofile(count)
        try:
            model.update_modes()
        finally:
            sys.setprofile(None)

    # Which xdist's workers ignore
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        # The first time modules are imported
        model.update_modes()
        assert len(model.modes) == 2
        model = DDiffPG.load(tmp_path / "model", env=make_env(), device="cpu")
        model.load_replay_buffer(tmp_path / "buffer")
        update(model)
        for moment in np.linspace(1, calls - 5, 60).astype(int):
            due = moment
            model = DDiffPG.load(tmp_path / "model", env=make_env(), device="cpu")
            model.load_replay_buffer(tmp_path / "buffer")
            calls = 0
            with pytest.raises(KeyboardInterrupt):
                update(model)
            file = io.BytesIO()
            model.save(file)
            file.seek(0)
            loaded = DDiffPG.load(file)
            found.add(len(loaded.modes))
            assert len(loaded.modes) == loaded.policy.n_modes == len(loaded.policy.mode_critics)
            assert loaded.predict(OBSERVATIONS, deterministic=True)[0].shape == (5, 2)
    finally:
        sys.setprofile(None)
        signal.signal(signal.SIGINT, handler)
    assert found == {0, 2}
    model.learn(30, reset_num_timesteps=False)


@pytest.mark.parametrize("mode", [None, 0, 1])
def test_export_of_a_mode(tmp_path, mode):
    ort = pytest.importorskip("onnxruntime", reason="needs pip install 'sb3-qsm[export]'")
    # With the cosine schedule a chain that has hardly been trained enlarges rounding
    model = make_trained(noise_schedule="linear")
    model.set_mode(mode)
    to_onnx(model, tmp_path / "policy.onnx")
    to_torch_export(model, tmp_path / "policy.pt2")
    session, program = ort.InferenceSession(tmp_path / "policy.onnx"), th.export.load(tmp_path / "policy.pt2").module()
    for n in (1, 5):
        expected, _ = model.predict(OBSERVATIONS[:n], deterministic=True)
        np.testing.assert_allclose(session.run(None, {"observation": OBSERVATIONS[:n]})[0], expected, atol=1e-5)
        np.testing.assert_allclose(program(th.as_tensor(OBSERVATIONS[:n])).numpy(), expected, atol=1e-5)
    others = [model.predict(OBSERVATIONS, deterministic=True, mode=other)[0] for other in (0, 1) if other != mode]
    assert all(np.abs(model.predict(OBSERVATIONS, deterministic=True)[0] - other).max() > 1e-3 for other in others)
