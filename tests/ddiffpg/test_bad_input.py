"""Wrong arguments and environments end in a message that says what is wrong."""

import copy
import importlib
import re
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.vec_env import DummyVecEnv
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer
from torch import nn

import sb3_qsm.ddiffpg.ddiffpg
from sb3_qsm import QSM, DDiffPG
from sb3_qsm.ddiffpg.buffers import DictTrajectoryReplayBuffer
from sb3_qsm.envs import NGoalPointEnv
from tests.ddiffpg.models import make_env, make_model, make_picture_env, make_point, make_trained
from tests.test_run import BOX, DummyEnv

pytest.importorskip("dtaidistance")

BAD_ARGUMENTS = [
    ({"clustering_freq": 0}, "clustering_freq must be an integer >= 1, got 0"),
    ({"cluster_threshold": 0.0}, "cluster_threshold must be a number > 0, got 0.0"),
    ({"min_silhouette": 2.0}, "min_silhouette must be a number >= -1 and <= 1, got 2.0"),
    ({"min_mode_size": 1.5}, "min_mode_size must be an integer >= 1, got 1.5"),
    ({"target_action_steps": 0}, "target_action_steps must be an integer >= 1, got 0"),
    ({"target_action_lr": 0}, "target_action_lr must be a number > 0, got 0"),
    ({"mode_embedding_dim": 0}, "mode_embedding_dim must be an integer >= 1, got 0"),
    ({"mode_dropout": 1.1}, "mode_dropout must be a number >= 0 and <= 1, got 1.1"),
    ({"intrinsic_reward_scale": -1}, "intrinsic_reward_scale must be a number >= 0, got -1"),
    ({"novelty_learning_rate": 0.0}, "novelty_learning_rate must be a number > 0, got 0.0"),
    ({"n_atoms": -1}, "n_atoms must be an integer >= 0, got -1"),
    ({"n_atoms": 1}, "n_atoms must be 0 for plain critics, or an integer >= 2, got 1"),
    ({"n_atoms": 51, "v_min": -20.0, "v_max": 0.0}, "v_max must be a number > 0, got 0.0"),
    ({"n_atoms": 51, "v_min": 2.0}, "v_max must be a number > 2, got 1.0"),
    ({"v_min": None}, "v_min must be a number, got None"),
    ({"sampler": "euler"}, "Unknown sampler 'euler'; known ones: ddim, ddpm, ddpm_x0"),
    ({"position": 0}, "position must hold indices from 0 to 1 of the observation, got 0"),
    ({"position": [0.0, 1.0]}, "position must hold indices from 0 to 1 of the observation, got [0.0, 1.0]"),
    ({"position": [True, False]}, "position must hold indices from 0 to 1 of the observation, got [True, False]"),
    (
        {"policy_kwargs": {"critic_activation_fn": nn.PReLU}},
        "critic_activation_fn must be one without parameters, got PReLU",
    ),
    (
        {"replay_buffer_class": DictTrajectoryReplayBuffer},
        "replay_buffer_class must be TrajectoryReplayBuffer for Box observations, got DictTrajectoryReplayBuffer",
    ),
    ({"position": [2]}, "position must hold indices from 0 to 1 of the observation, got [2]"),
    (
        {"replay_buffer_class": ReplayBuffer},
        "replay_buffer_class must be a subclass of TrajectoryReplayBuffer, got ReplayBuffer",
    ),
    (
        {"replay_buffer_class": HerReplayBuffer},
        "replay_buffer_class must be a subclass of TrajectoryReplayBuffer, got HerReplayBuffer",
    ),
    ({"replay_buffer_class": "her"}, "replay_buffer_class must be a subclass of TrajectoryReplayBuffer, got 'her'"),
    (
        {"n_atoms": 11, "v_min": 0.5, "v_max": 2.0},
        "v_min must be a number <= 0, where the exploration's returns begin, got 0.5",
    ),
    ({"v_min": -np.inf}, "v_min must be a finite number, got -inf"),
    ({"v_max": np.inf}, "v_max must be a finite number > 0, got inf"),
    ({"clustering_freq": 0.5}, "clustering_freq must be an integer >= 1, got 0.5"),
    ({"policy_kwargs": {"best_of_n": 2}}, "best_of_n must be 1, got 2: each mode has critics of its own"),
    ({"policy_kwargs": {"n_modes": 2}}, "policy_kwargs must not have n_modes: DDiffPG decides on that itself"),
]


@pytest.mark.parametrize(("kwargs", "message"), BAD_ARGUMENTS, ids=[message[:40] for _, message in BAD_ARGUMENTS])
def test_argument(kwargs, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make_model(**kwargs)


def test_pictures_without_a_position():
    with pytest.raises(ValueError, match=r"^position must be a function .* for images, got None: trajectories are compared"):
        make_model(make_picture_env(), "CnnPolicy")


def test_no_success_flag():
    model = make_model(DummyVecEnv([lambda: DummyEnv(BOX, BOX)]))
    message = r"^the info at the end of an episode must have 'success' or 'is_success', True if the episode succeeded; there: "
    with pytest.raises(ValueError, match=message):
        model.learn(20)
    # Nothing of that step was stored
    assert model.replay_buffer.size() == 9


def test_mode_out_of_range():
    model = make_model()
    for call in (model.set_mode, lambda mode: model.predict(np.zeros(2), mode=mode)):
        with pytest.raises(ValueError, match="mode must be None, got 0: no mode is known yet, since no episode has succeeded"):
            call(0)
    model = make_trained()
    for call in (model.set_mode, lambda mode: model.predict(np.zeros(2, dtype=np.float32), mode=mode)):
        for wrong in (2, -1, 0.5, True, "left"):
            with pytest.raises(ValueError, match=f"^mode must be None or an integer from 0 to 1, got {wrong!r}$"):
                call(wrong)
        call(np.int64(1))
    assert model.mode == 1


def test_mode_before_the_first_clustering():
    model = make_model(clustering_freq=1e3).learn(200)
    assert model.replay_buffer.successes()
    message = r"^mode must be None, got 0: no mode is known yet, since successes are clustered every clustering_freq=1000"
    with pytest.raises(ValueError, match=message):
        model.set_mode(0)
    model.update_modes()
    model.set_mode(0)


def test_no_success_yet():
    env = gym.wrappers.TimeLimit(NGoalPointEnv(2, step_size=0.2, reward_type="sparse"), 2)
    model = make_model(DummyVecEnv([lambda: env])).learn(150)
    assert model.modes == []
    assert model._n_updates == 26


def test_returns_outside_of_the_atoms():
    env = gym.wrappers.TransformReward(make_point(), lambda reward: 10.0 * reward)
    model = make_model(DummyVecEnv([lambda: env]), n_atoms=11, v_max=5.0)
    with pytest.raises(
        ValueError, match="v_min=0 and v_max=5 must contain all discounted returns, got 10 at environment step"
    ):
        model.learn(200)


def test_returns_below_the_atoms():
    env = gym.wrappers.TransformReward(make_point(), lambda reward: reward - 1.0)
    model = make_model(DummyVecEnv([lambda: env]), n_atoms=11, v_min=-0.5)
    with pytest.raises(ValueError, match="v_min=-0.5 and v_max=1 must contain all discounted returns, got -1"):
        model.learn(200)


def test_replay_buffer_of_another_kind(tmp_path):
    model = make_trained()
    own = model.replay_buffer
    options = {"buffer_size": 20, "policy_kwargs": {"net_arch": [8]}}
    QSM("MlpPolicy", make_env(), **options).save_replay_buffer(tmp_path / "qsm")
    with pytest.raises(ValueError, match="must be a TrajectoryReplayBuffer, got a NStepReplayBuffer"):
        model.load_replay_buffer(tmp_path / "qsm")
    make_model(position=[0]).save_replay_buffer(tmp_path / "other")
    with pytest.raises(ValueError, match="positions must have 2 entries, got 1: see the argument position"):
        model.load_replay_buffer(tmp_path / "other")
    make_model(position=[1, 0]).save_replay_buffer(tmp_path / "swapped")
    with pytest.raises(ValueError, match=r"position must be the model's, \(0, 1\), got \(1, 0\)"):
        model.load_replay_buffer(tmp_path / "swapped")
    assert model.replay_buffer is own
    # The episode goes on
    assert model._last_obs is not None
    model.learn(20, reset_num_timesteps=False)


@pytest.mark.parametrize("there", [None, "plain"])
def test_replay_buffer_in_the_place_of_its_own(there, tmp_path):
    model = make_trained()
    model.save_replay_buffer(tmp_path / "own")
    own = model.replay_buffer
    model.replay_buffer = None if there is None else ReplayBuffer(100, model.observation_space, model.action_space)
    message = "^The replay buffer must be a TrajectoryReplayBuffer, got a (NoneType|ReplayBuffer)$"
    steps = model.num_timesteps
    with pytest.raises(ValueError, match=message):
        model.learn(20, reset_num_timesteps=False)
    with pytest.raises(ValueError, match=message):
        model.update_modes()
    assert model.num_timesteps == steps
    model.load_replay_buffer(tmp_path / "own")
    assert model.replay_buffer.trajectories.keys() == own.trajectories.keys()
    model.learn(20, reset_num_timesteps=False)
    assert len(model.modes) == 2


def test_position_function_of_the_wrong_shape():
    with pytest.raises(
        ValueError, match=r"^position must return finite numbers of shape \(batch, n\), here \(1, n\), got shape"
    ):
        make_model(position=lambda observations: observations[0])


@pytest.mark.parametrize("reward", [0.1, 0.3, 5.3, -0.3])
def test_returns_that_are_a_bound_but_for_rounding(reward):
    env = gym.wrappers.TransformReward(make_point(), lambda given: reward * given)
    bounds = {"v_min": 0.0, "v_max": reward} if reward > 0 else {"v_min": reward, "v_max": 1.0}
    model = make_model(DummyVecEnv([lambda: env]), n_atoms=11, **bounds).learn(60)
    assert sum(trajectory.success for trajectory in model.replay_buffer.trajectories.values()) >= 3


def test_compiled_part_of_the_distances_is_missing(monkeypatch):
    """Before the training: the clustering would come thousands of steps later."""
    dtw = importlib.import_module("dtaidistance.dtw")
    monkeypatch.setattr(dtw, "dtw_cc", None)
    with pytest.raises(ImportError, match=r'DDiffPG needs pip install "sb3-qsm\[ddiffpg\]".*compiled'):
        DDiffPG("MlpPolicy", make_point())


def test_parameters_of_another_number_of_modes(tmp_path):
    trained, other = make_trained(), make_model(seed=1)
    trained.save(tmp_path / "model")
    before = copy.deepcopy(other.get_parameters())
    message = r"^The parameters must be of a model with as many modes \(0\), got 2: load takes over the modes too$"
    for parameters in (trained.get_parameters(), tmp_path / "model.zip"):
        with pytest.raises(ValueError, match=message):
            other.set_parameters(parameters)
    for name, tensor in other.get_parameters()["policy"].items():
        assert th.equal(tensor, before["policy"][name]), name
    again = DDiffPG.load(tmp_path / "model")
    again.set_parameters(tmp_path / "model.zip")
    again.set_parameters(trained.get_parameters())


def test_target_actions_that_are_not_finite_are_not_stored(monkeypatch):
    model = make_trained()
    before = model.replay_buffer.target_actions.copy()

    def overflow(min_q, actions, *args):
        return th.full_like(actions, float("nan"))

    monkeypatch.setattr(sb3_qsm.ddiffpg.ddiffpg, "ascend_actions", overflow)
    with pytest.raises(ValueError, match="target_actions is nan"):
        model.train(1, 16)
    np.testing.assert_array_equal(model.replay_buffer.target_actions, before)


@pytest.mark.parametrize("module", ["dtaidistance", "scipy.cluster"])
def test_missing_package(module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r'DDiffPG needs pip install "sb3-qsm\[ddiffpg\]"'):
        DDiffPG("MlpPolicy", make_point())
