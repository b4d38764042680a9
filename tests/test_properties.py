"""Any spaces, any hyperparameters: build, train, save, load, act."""

import importlib.util
import io
import warnings

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_qsm import QSM, DDiffPG
from sb3_qsm.common.performance import check_precision
from sb3_qsm.diffusion import NOISE_SCHEDULES, SAMPLERS
from sb3_qsm.qsm.targets import CRITIC_REDUCTIONS, SCORE_TARGETS
from tests.envs import SpacesEnv

PRECISIONS = ["float32"]
try:
    check_precision(th.device("cpu"), "bf16")
    PRECISIONS.append("bf16")
except ValueError:
    pass  # refused where the processor would emulate it
SAFE = importlib.util.find_spec("safetensors") is not None

SHAPES = st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple)


@st.composite
def boxes(draw, shapes, dtypes, limit):
    """Boxes with other bounds in each component."""
    shape, dtype = draw(shapes), np.dtype(draw(st.sampled_from(dtypes)))
    size = int(np.prod(shape))
    integer = dtype.kind in "iu"
    limit = min(limit, np.iinfo(dtype).max) if integer else limit
    least = max(-limit, np.iinfo(dtype).min) if integer else -limit
    numbers = st.integers(int(least), int(limit) - 1) if integer else st.floats(-limit, limit, width=32)
    low = np.array([draw(numbers) for _ in range(size)], dtype).reshape(shape)
    if integer:
        return spaces.Box(low, np.full(shape, limit, dtype), dtype=dtype)
    # At least as wide as float32 can tell from the bounds
    width = np.array([draw(st.floats(2**-10, limit, width=32)) for _ in range(size)], dtype).reshape(shape)
    return spaces.Box(low, low + np.maximum(width, np.abs(low) * 1e-3).astype(dtype), dtype=dtype)


UNBOUNDED = st.builds(lambda shape, dtype: spaces.Box(-np.inf, np.inf, shape, dtype), SHAPES, st.sampled_from(["f4", "f8"]))
PLAIN = st.one_of(
    boxes(SHAPES, ["float32", "float64", "float16", "int8", "int64", "uint8", "bool"], 1e3),
    UNBOUNDED,
    st.builds(spaces.Discrete, st.integers(1, 4)),
    st.builds(spaces.MultiDiscrete, st.lists(st.integers(1, 3), min_size=1, max_size=3)),
    st.builds(spaces.MultiBinary, st.integers(1, 4)),
)
IMAGES = st.builds(
    lambda channels, last: spaces.Box(0, 255, (36, 38, channels) if last else (channels, 36, 38), np.uint8),
    st.sampled_from([1, 3]),
    st.booleans(),
)
DICTIONARIES = st.dictionaries(st.sampled_from(["a", "b", "goal"]), PLAIN, min_size=1).map(spaces.Dict)
OBSERVATIONS = st.one_of(
    st.tuples(st.just("MlpPolicy"), PLAIN),
    st.tuples(st.just("MultiInputPolicy"), DICTIONARIES),
    st.tuples(st.just("CnnPolicy"), IMAGES),
)
ACTIONS = boxes(SHAPES, ["float32", "float64"], 1e6)


@st.composite
def hyperparameters(draw):
    steps = draw(st.integers(1, 5))
    n_steps = draw(st.integers(1, 3))
    memory = n_steps == 1 and draw(st.booleans())
    optimizer = draw(st.sampled_from([th.optim.Adam, th.optim.AdamW, th.optim.RMSprop]))
    return {
        "learning_rate": draw(st.floats(1e-6, 1e-3)),
        "actor_learning_rate": draw(st.none() | st.floats(1e-6, 1e-3)),
        "batch_size": draw(st.integers(1, 8)),
        "tau": draw(st.floats(0, 1)),
        "gamma": draw(st.floats(0, 1)),
        "train_freq": draw(st.sampled_from([1, 2, (1, "episode")])),
        "gradient_steps": draw(st.sampled_from([-1, 2])),
        "n_steps": n_steps,
        "learning_starts": draw(st.integers(0, 10)),
        "buffer_size": draw(st.integers(12, 40)),
        "optimize_memory_usage": memory,
        "replay_buffer_kwargs": {"handle_timeout_termination": False} if memory else None,
        "diffusion_steps": steps,
        "sampling_steps": draw(st.none() | st.integers(1, steps)),
        "target_sampling_steps": draw(st.none() | st.integers(1, steps)),
        "noise_schedule": draw(st.sampled_from(sorted(NOISE_SCHEDULES))),
        "sampler": draw(st.sampled_from(sorted(SAMPLERS))),
        "sampling_temperature": draw(st.floats(0, 2)),
        "score_target": draw(st.sampled_from(sorted(SCORE_TARGETS))),
        "temperature": draw(st.floats(1e-3, 1e3)),
        "q_grad_coef": draw(st.none() | st.floats(1e-2, 100)),
        "q_grad_clip": draw(st.none() | st.floats(1e-2, 100)),
        "target_policy_noise": draw(st.floats(0, 1)),
        "policy_samples": draw(st.sampled_from([0.0, 0.5, 1.0])),
        "gradient_critic": draw(st.sampled_from(["online", "target", "both"])),
        "critic_reduction": draw(st.sampled_from(sorted(CRITIC_REDUCTIONS))),
        "policy_delay": draw(st.integers(1, 2)),
        "target_update_interval": draw(st.integers(1, 2)),
        "best_of_n": draw(st.integers(1, 3)),
        "exploration_noise": draw(st.floats(0, 1)),
        "exploration_initial_eps": draw(st.floats(0, 1)),
        "exploration_decay_steps": draw(st.integers(0, 30)),
        "prior_std": draw(st.none() | st.floats(0.05, 5)),
        "noisy": draw(st.booleans()),
        "precision": draw(st.sampled_from(PRECISIONS)),
        "policy_kwargs": {
            "net_arch": draw(st.sampled_from([[], [4], {"pi": [4, 3], "qf": [5]}])),
            "activation_fn": draw(st.sampled_from([th.nn.ReLU, th.nn.SiLU, th.nn.Tanh])),
            "layer_norm": draw(st.booleans()),
            "critic_layer_norm": draw(st.booleans()),
            "critic_activation_fn": draw(st.sampled_from([th.nn.ReLU, th.nn.SiLU, th.nn.Mish])),
            "share_features_extractor": draw(st.booleans()),
            "n_critics": draw(st.integers(1, 3)),
            "fourier_dim": draw(st.sampled_from([2, 4])),
            "time_arch": draw(st.sampled_from([(), (3,), [4, 4]])),
            "xavier": draw(st.booleans()),
            "optimizer_class": optimizer,
        },
    }


def examples(count, arguments, **kwargs):
    """Not shrunk: that takes minutes, and an example is short enough to be read."""

    def decorate(test):
        test = given(observation=OBSERVATIONS, action_space=ACTIONS, kwargs=arguments, n_envs=st.integers(1, 2))(test)
        checks = list(HealthCheck)
        return settings(max_examples=count, deadline=None, suppress_health_check=checks, phases=[Phase.generate], **kwargs)(
            test
        )

    return decorate


@examples(30, hyperparameters(), derandomize=True)
def test_build_train_save_load_act(observation, action_space, kwargs, n_envs):
    build_train_save_load_act(observation, action_space, kwargs, n_envs)


@pytest.mark.slow
@examples(300, hyperparameters())
def test_build_train_save_load_act_often(observation, action_space, kwargs, n_envs):
    build_train_save_load_act(observation, action_space, kwargs, n_envs)


def build_train_save_load_act(observation, action_space, kwargs, n_envs):
    policy, space = observation
    if policy == "MultiInputPolicy":
        # SB3 has no such buffer of dictionaries
        kwargs.update(optimize_memory_usage=False, replay_buffer_kwargs=None)
    if policy == "CnnPolicy":
        kwargs["policy_kwargs"]["features_extractor_kwargs"] = {"features_dim": 4}

    if kwargs["train_freq"] == (1, "episode"):
        n_envs = 1  # so SB3 demands

    def make_env():
        return DummyVecEnv([lambda: SpacesEnv(space, action_space)] * n_envs)

    if kwargs.pop("noisy"):
        sigma = np.full(action_space.shape, 0.2)
        kwargs["action_noise"] = NormalActionNoise(np.zeros(action_space.shape), sigma)
    model = QSM(policy, make_env(), seed=0, **kwargs)
    while model._n_updates < 2:
        model.learn(4, reset_num_timesteps=False)
    assert all(th.isfinite(value).all() for value in model.policy.state_dict().values())

    obs = model.env.reset()
    action, _ = model.predict(obs)
    assert len(action) == n_envs
    assert all(action_space.contains(one.astype(action_space.dtype)) for one in action)

    expected, _ = model.predict(obs, deterministic=True)
    file = io.BytesIO()
    model.save(file)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        loaded = [QSM.load(file, env=make_env())]
        if SAFE:
            file = io.BytesIO()
            model.save_safe(file)
            file.seek(0)
            loaded.append(QSM.load_safe(file, env=make_env()))
    for other in loaded:
        np.testing.assert_array_equal(other.predict(obs, deterministic=True)[0], expected)
        other.set_random_seed(1)
        updates = other._n_updates
        while other._n_updates == updates:
            other.learn(4, reset_num_timesteps=False)
    if len(loaded) == 2:
        first, second = (other.policy.state_dict() for other in loaded)
        assert all(th.equal(value, second[name]) for name, value in first.items())


# DDiffPG


class SuccessfulEnv(SpacesEnv):
    """Every third episode succeeds, which is all that is paid for."""

    episodes = 0

    def step(self, action):
        observation, _, terminated, truncated, info = super().step(action)
        self.episodes += terminated or truncated
        success = self.episodes % 3 == 0
        return observation, float(success and truncated), terminated, truncated, {**info, "success": success}


def first_numbers(observations):
    """A position of any observation: the first two numbers in it."""
    parts = observations.values() if isinstance(observations, dict) else [observations]
    flat = np.concatenate([np.asarray(part, dtype=np.float64).reshape(len(part), -1) for part in parts], axis=1)
    return np.tanh(np.concatenate([flat, flat], axis=1)[:, :2] / 100)


@st.composite
def mode_hyperparameters(draw):
    common = draw(hyperparameters())
    names = ("learning_rate", "actor_learning_rate", "tau", "gamma", "train_freq", "gradient_steps", "diffusion_steps")
    names += (
        "noise_schedule",
        "sampler",
        "sampling_temperature",
        "target_policy_noise",
        "exploration_noise",
        "learning_starts",
    )
    return {
        **{name: common[name] for name in (*names, "exploration_initial_eps", "exploration_decay_steps", "policy_kwargs")},
        "batch_size": draw(st.integers(8, 16)),
        "buffer_size": draw(st.integers(60, 120)),
        "replay_buffer_kwargs": {"max_successes": draw(st.integers(1, 10)), "max_points": draw(st.integers(2, 10))},
        "clustering_freq": draw(st.integers(1, 30)),
        "cluster_threshold": draw(st.none() | st.floats(1e-3, 1.0)),
        "min_silhouette": draw(st.floats(-1, 1)),
        "min_mode_size": draw(st.integers(1, 3)),
        "target_action_steps": draw(st.integers(1, 3)),
        "target_action_lr": draw(st.floats(1e-4, 1.0)),
        "mode_embedding_dim": draw(st.integers(1, 6)),
        "mode_dropout": draw(st.floats(0, 1)),
        "intrinsic_reward_scale": draw(st.floats(0, 1)),
        **draw(st.sampled_from([{}, {"n_atoms": 5, "v_min": -100.0, "v_max": 100.0}])),
    }


@examples(15, mode_hyperparameters(), derandomize=True)
def test_modes_build_train_save_load_act(observation, action_space, kwargs, n_envs):
    modes_build_train_save_load_act(observation, action_space, kwargs, n_envs)


@pytest.mark.slow
@examples(150, mode_hyperparameters())
def test_modes_build_train_save_load_act_often(observation, action_space, kwargs, n_envs):
    modes_build_train_save_load_act(observation, action_space, kwargs, n_envs)


def modes_build_train_save_load_act(observation, action_space, kwargs, n_envs):
    pytest.importorskip("dtaidistance")
    policy, space = observation
    if policy == "CnnPolicy":
        kwargs["policy_kwargs"]["features_extractor_kwargs"] = {"features_dim": 4}
    if kwargs["train_freq"] == (1, "episode"):
        n_envs = 1

    def make_env():
        return DummyVecEnv([lambda: SuccessfulEnv(space, action_space)] * n_envs)

    model = DDiffPG(policy, make_env(), position=first_numbers, seed=0, **kwargs)
    model.learn(45)
    assert model._n_updates > 0
    assert all(th.isfinite(value).all() for value in model.policy.state_dict().values())
    assert len(model.modes) == model.policy.n_modes
    obs = model.env.reset()
    file, buffer = io.BytesIO(), io.BytesIO()
    model.save(file)
    model.save_replay_buffer(buffer)
    file.seek(0), buffer.seek(0)
    other = DDiffPG.load(file, env=make_env())
    for mode in (None, *range(len(model.modes))):
        action, _ = model.predict(obs, deterministic=True, mode=mode)
        assert all(action_space.contains(one.astype(action_space.dtype)) for one in action)
        np.testing.assert_array_equal(other.predict(obs, deterministic=True, mode=mode)[0], action)
    other.load_replay_buffer(buffer)
    updates = other._n_updates
    other.learn(20, reset_num_timesteps=False)
    assert other._n_updates > updates
