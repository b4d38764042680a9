"""Wrong arguments, environments and files end in a message that says what is wrong."""

import re

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import NStepReplayBuffer
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.save_util import load_from_pkl, load_from_zip_file
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_qsm import QSM
from sb3_qsm.common.policies import DiffusionActor, DiffusionPolicy
from sb3_qsm.diffusion import NoiseSchedule
from sb3_qsm.qsm.policies import MlpPolicy
from tests.test_run import BOX, DummyEnv

SMALL = {"learning_starts": 5, "batch_size": 8, "buffer_size": 50, "diffusion_steps": 3, "device": "cpu"}


def make_model(env="Pendulum-v1", policy="MlpPolicy", policy_kwargs=None, **kwargs) -> QSM:
    return QSM(policy, env, policy_kwargs={"net_arch": [16], **(policy_kwargs or {})}, **{**SMALL, **kwargs})


# Arguments

BAD_ARGUMENTS = [
    ({"diffusion_steps": 0}, "diffusion_steps must be an integer >= 1, got 0"),
    ({"diffusion_steps": -1}, "diffusion_steps must be an integer >= 1, got -1"),
    ({"diffusion_steps": 1.5}, "diffusion_steps must be an integer >= 1, got 1.5"),
    ({"diffusion_steps": True}, "diffusion_steps must be an integer >= 1, got True"),
    ({"noise_schedule": "sine"}, "Unknown noise_schedule 'sine'; known ones: cosine, linear, vp"),
    ({"sampler": "euler"}, "Unknown sampler 'euler'; known ones: ddim, ddpm, ddpm_x0"),
    ({"sampler": ["ddim"]}, "Unknown sampler ['ddim']; known ones: ddim, ddpm, ddpm_x0"),
    ({"actor_ema": 0.995}, "actor_ema must be True or False, got 0.995"),
    ({"compile": "no"}, "compile must be True or False, got 'no'"),
    ({"train_freq": 0}, "train_freq must be an integer >= 1, got 0"),
    ({"train_freq": (0, "episode")}, "train_freq must be an integer >= 1, got 0"),
    ({"policy_kwargs": {"activation_fn": th.nn.ReLU()}}, "activation_fn must be a class, such as nn.ReLU, got ReLU()"),
    ({"score_target": "clear"}, "Unknown score_target 'clear'; known ones: clean, denoised, noised, paper"),
    ({"critic_reduction": "max"}, "Unknown critic_reduction 'max'; known ones: mean, min, split"),
    ({"policy_samples": 1.5}, "policy_samples must be a number >= 0 and <= 1, got 1.5"),
    ({"gradient_critic": "mine"}, "Unknown gradient_critic 'mine'; known ones: both, online, target"),
    ({"exploration_initial_eps": 1.5}, "exploration_initial_eps must be a number >= 0 and <= 1, got 1.5"),
    ({"exploration_decay_steps": -1}, "exploration_decay_steps must be an integer >= 0, got -1"),
    ({"q_grad_clip": 0}, "q_grad_clip must be a number > 0, got 0"),
    ({"temperature": 0}, "temperature must be a number > 0, got 0"),
    ({"temperature": -0.1}, "temperature must be a number > 0, got -0.1"),
    ({"temperature": float("nan")}, "temperature must be a finite number > 0, got nan"),
    ({"temperature": "auto"}, "temperature must be a number > 0, got 'auto'"),
    ({"q_grad_coef": -1}, "q_grad_coef must be a number > 0, got -1"),
    ({"q_grad_coef": 0.0}, "q_grad_coef must be a number > 0, got 0.0"),
    ({"sampling_temperature": -1.0}, "sampling_temperature must be a number >= 0, got -1.0"),
    ({"target_policy_noise": -0.1}, "target_policy_noise must be a number >= 0, got -0.1"),
    ({"exploration_noise": -0.1}, "exploration_noise must be a number >= 0, got -0.1"),
    ({"best_of_n": 0}, "best_of_n must be an integer >= 1, got 0"),
    ({"policy_delay": 0}, "policy_delay must be an integer >= 1, got 0"),
    ({"target_update_interval": 0}, "target_update_interval must be an integer >= 1, got 0"),
    ({"n_steps": 0}, "n_steps must be an integer >= 1, got 0"),
    ({"tau": 2}, "tau must be a number >= 0 and <= 1, got 2"),
    ({"gamma": -0.1}, "gamma must be a number >= 0 and <= 1, got -0.1"),
    ({"gamma": 1.01}, "gamma must be a number >= 0 and <= 1, got 1.01"),
    ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
    ({"buffer_size": 0}, "buffer_size must be an integer >= 1, got 0"),
    ({"policy_kwargs": {"n_critics": 0}}, "n_critics must be an integer >= 1, got 0"),
    ({"policy_kwargs": {"n_critics": 1.5}}, "n_critics must be an integer >= 1, got 1.5"),
    ({"policy_kwargs": {"net_arch": [-1]}}, "A layer in net_arch or time_arch must be an integer >= 1, got -1"),
    ({"policy_kwargs": {"fourier_dim": -2}}, "fourier_dim must be an integer >= 2, got -2"),
    ({"policy_kwargs": {"fourier_dim": 3}}, "fourier_dim must be even, for a sine and a cosine of each frequency, got 3"),
    ({"learning_rate": -1e-3}, "learning_rate must be a number >= 0, got -0.001"),
    ({"actor_learning_rate": -1e-3}, "actor_learning_rate must be a number >= 0, got -0.001"),
    ({"actor_learning_rate": float("nan")}, "actor_learning_rate must be a finite number >= 0, got nan"),
    ({"learning_starts": 0.5}, "learning_starts must be an integer >= 0, got 0.5"),
    ({"learning_starts": float("inf")}, "learning_starts must be an integer >= 0, got inf"),
    ({"learning_starts": "x"}, "learning_starts must be an integer >= 0, got 'x'"),
    ({"gradient_steps": 1.5}, "gradient_steps must be an integer >= -1, got 1.5"),
    ({"gradient_steps": -7}, "gradient_steps must be an integer >= -1, got -7"),
    ({"policy_kwargs": {"diffusion_steps": 5}}, "Pass diffusion_steps to QSM itself, not in policy_kwargs"),
    ({"policy_kwargs": {"sampler": "ddim", "best_of_n": 2}}, "Pass best_of_n, sampler to QSM itself, not in policy_kwargs"),
]


@pytest.mark.parametrize(("kwargs", "message"), BAD_ARGUMENTS, ids=[message[:40] for _, message in BAD_ARGUMENTS])
def test_argument(kwargs, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make_model(**kwargs)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"tau": 0, "gamma": 1},
        {"tau": 1.0, "gamma": 0.0, "temperature": 1e-6, "sampling_temperature": 0, "exploration_noise": 0},
        {"diffusion_steps": np.int64(2), "batch_size": np.int64(4), "gamma": np.float64(0.9), "tau": np.float64(0.1)},
    ],
    ids=["integers", "limits", "numpy"],
)
def test_values_at_the_limits_are_fine(kwargs):
    model = make_model(**kwargs).learn(8)
    assert model._n_updates == 3
    assert model.q_grad_norm.isfinite()


def test_bad_value_at_loading(tmp_path):
    make_model().save(tmp_path / "model")
    with pytest.raises(ValueError, match="Unknown sampler 'euler'; known ones: ddim, ddpm, ddpm_x0"):
        QSM.load(tmp_path / "model", sampler="euler")


def test_policy_alone_checks_too():
    def make_policy(**kwargs) -> DiffusionPolicy:
        return MlpPolicy(BOX, BOX, lambda _: 3e-4, net_arch=[4], **kwargs)

    with pytest.raises(ValueError, match="Unknown sampler 'euler'; known ones: ddim, ddpm, ddpm_x0"):
        make_policy(sampler="euler")
    with pytest.raises(ValueError, match="Unknown noise_schedule 'sine'; known ones: cosine, linear, vp"):
        make_policy(noise_schedule="sine")
    with pytest.raises(ValueError, match="diffusion_steps must be an integer >= 1, got 0"):
        NoiseSchedule("vp", 0)


@pytest.mark.parametrize("twice", [{"n_steps": 5}, {"n_steps": 5, "gamma": 0.5}])
def test_returns_are_arguments_of_the_algorithm(twice):
    with pytest.raises(ValueError, match=f"Pass {' and '.join(sorted(twice))} to QSM itself, not in replay_buffer_kwargs"):
        QSM("MlpPolicy", "Pendulum-v1", replay_buffer_kwargs=twice)
    QSM(
        "MlpPolicy", "Pendulum-v1", buffer_size=100, replay_buffer_class=NStepReplayBuffer, replay_buffer_kwargs={"n_steps": 5}
    )


def test_unknown_policy():
    with pytest.raises(ValueError, match="Policy LstmPolicy unknown"):
        make_model(policy="LstmPolicy")


def test_compile_needs_an_extractor_without_parameters():
    env = FakeImageEnv(screen_height=36, screen_width=36, n_channels=1, discrete=False)
    with pytest.raises(ValueError, match="compile=True needs a features extractor without parameters.*got NatureCNN"):
        make_model(env, "CnnPolicy", {"features_extractor_kwargs": {"features_dim": 8}}, compile=True)


# Spaces


def test_discrete_actions():
    with pytest.raises(AssertionError, match="only supports .*Box.* as action spaces but Discrete"):
        make_model("CartPole-v1")


@pytest.mark.parametrize("low", [-np.inf, -1.0])
def test_unbounded_actions(low):
    with pytest.raises(AssertionError, match="finite lower and upper bound"):
        make_model(DummyEnv(BOX, spaces.Box(low, np.inf, (2,))))


def test_an_action_that_cannot_vary():
    space = spaces.Box(np.array([-1.0, 2.0], dtype=np.float32), np.array([1.0, 2.0], dtype=np.float32))
    with pytest.raises(ValueError, match=r"action_space: .* got low=\[-1.  2.\] and high=\[1. 2.\]"):
        make_model(DummyEnv(BOX, space))


def test_lazy_layers():
    class Lazy(FlattenExtractor):
        def __init__(self, observation_space):
            super().__init__(observation_space)
            self.layer = th.nn.LazyLinear(self.features_dim)

    with pytest.raises(ValueError, match="features_extractor_class Lazy has lazy layers"):
        make_model(policy_kwargs={"features_extractor_class": Lazy})


def test_policy_that_does_not_fit_the_observations():
    env = DummyEnv(spaces.Dict({"a": BOX}), BOX)
    with pytest.raises(ValueError, match="You must use `MultiInputPolicy`"):
        make_model(env)
    with pytest.raises(AssertionError, match="You should use NatureCNN only with images"):
        make_model("Pendulum-v1", "CnnPolicy")


# What the environment returns


class FaultyEnv(gym.Env):
    """Episodes of 5 steps; from step ``at`` on, ``quantity`` is ``value``."""

    observation_space = BOX
    action_space = BOX

    def __init__(self, quantity: str, at: int = 5, value: float = np.nan) -> None:
        self.quantity, self.at, self.value = quantity, at, value
        self.n_steps = 0

    def observation(self, quantity: str) -> np.ndarray:
        bad = quantity == self.quantity and self.n_steps >= self.at
        return np.array([0.5, self.value if bad else 0.1, 0.2], dtype=np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation("reset"), {}

    def step(self, action):
        self.n_steps += 1
        done = self.n_steps % 5 == 0
        reward = self.value if self.quantity == "reward" and self.n_steps >= self.at else 1.0
        return self.observation("terminal" if done else "observation"), reward, done, False, {}


@pytest.mark.parametrize("quantity", ["observation", "reward"])
def test_infinity_behind_vec_normalize(quantity):
    """VecNormalize clips what it returns; the buffer gets the original."""
    env = VecNormalize(DummyVecEnv([lambda: FaultyEnv(quantity, at=7, value=np.inf)]), training=False)
    model = make_model(env)
    with pytest.raises(ValueError, match=f"non-finite {quantity} at environment step 7"):
        model.learn(20)
    assert np.isfinite(model.replay_buffer.next_observations).all()
    assert np.isfinite(model.replay_buffer.rewards).all()


class AsDict(gym.ObservationWrapper):
    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.observation_space = spaces.Dict({"a": env.observation_space})

    def observation(self, observation):
        return {"a": observation}


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("as_dict", [False, True])
@pytest.mark.parametrize(("quantity", "at"), [("observation", 7), ("reward", 7), ("reset", 7), ("reset", 0)])
def test_statistics_of_vec_normalize_stay_finite(quantity, at, as_dict, value, tmp_path):
    """VecNormalize counts a step before it can be refused."""

    def make_env() -> gym.Env:
        env = FaultyEnv(quantity, at, value)
        return AsDict(env) if as_dict else env

    env = VecNormalize(DummyVecEnv([make_env]))
    shared = env.obs_rms
    model = make_model(env, "MultiInputPolicy" if as_dict else "MlpPolicy")
    with pytest.raises(ValueError, match="non-finite"), np.errstate(invalid="ignore"):
        model.learn(20)
    assert env.obs_rms is shared
    statistics = shared["a"] if as_dict else shared
    # The reset and each step before the refused one
    assert statistics.count == pytest.approx(model.num_timesteps, abs=0.01)
    for array in (statistics.mean, statistics.var, env.ret_rms.mean, env.ret_rms.var, env.returns):
        assert np.isfinite(array).all()
    # It can go on from there
    env.venv.envs[0].unwrapped.value = 0.1
    model.learn(5, reset_num_timesteps=False)
    model.save(tmp_path / "model")
    assert "_statistics" not in load_from_zip_file(tmp_path / "model")[0]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("quantity", "at", "step", "named"),
    [
        ("observation", 7, 7, "observation"),
        ("reward", 7, 7, "reward"),
        ("terminal", 7, 10, "terminal observation"),
        ("reset", 6, 10, "observation"),
    ],
)
def test_non_finite_value_from_the_environment(tmp_path, quantity, at, step, named, value):
    model = make_model(FaultyEnv(quantity, at, value))
    with pytest.raises(ValueError, match=f"non-finite {named} at environment step {step}: .*{value}.*Nothing of this step"):
        model.learn(20)
    assert model.num_timesteps == step
    # Everything before it is there, and good
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    buffer = load_from_pkl(tmp_path / "buffer.pkl")
    assert buffer.size() == step - 1
    for name in ("observations", "next_observations", "actions", "rewards"):
        assert np.isfinite(getattr(buffer, name)[: step - 1]).all()
    loaded = QSM.load(tmp_path / "model", env=FaultyEnv("none"))
    loaded.load_replay_buffer(tmp_path / "buffer")
    assert all(parameter.isfinite().all() for parameter in loaded.policy.parameters())
    loaded.learn(5, reset_num_timesteps=False)
    assert loaded.num_timesteps == step + 5


def test_non_finite_first_observation():
    with pytest.raises(ValueError, match="non-finite observation at environment step 0: .*nan"):
        make_model(FaultyEnv("reset", at=0)).learn(10)


def test_non_finite_value_in_one_of_two_envs_and_behind_vec_normalize():
    env = DummyVecEnv([lambda: FaultyEnv("none"), lambda: FaultyEnv("reward", at=3)])
    with pytest.raises(ValueError, match=re.escape("non-finite reward at environment step 6: [1.0, nan]")):
        make_model(env).learn(20)
    env = VecNormalize(DummyVecEnv([lambda: FaultyEnv("observation", at=3)]))
    model = make_model(env)
    with pytest.raises(ValueError, match="non-finite observation at environment step 3"):
        model.learn(20)
    assert np.isfinite(model.replay_buffer.next_observations).all()


def test_non_finite_entry_of_a_dictionary():
    env = DummyEnv(spaces.Dict({"a": BOX, "b": spaces.Discrete(2)}), BOX)
    model = make_model(env, "MultiInputPolicy").learn(3)
    env.observation_space["a"].sample = lambda: np.full(3, np.nan, dtype=np.float32)
    with pytest.raises(ValueError, match=re.escape("non-finite observation['a'] at environment step 4")):
        model.learn(5, reset_num_timesteps=False)


# Losses


def test_non_finite_critic_loss(tmp_path):
    class HugeRewards(gym.RewardWrapper):
        def reward(self, reward):
            return 1e30

    model = make_model(HugeRewards(gym.make("Pendulum-v1")))
    with pytest.raises(ValueError, match=r"^critic_loss is inf at environment step 6, gradient step 1: check the scale of"):
        model.learn(20)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    # It stopped before the step
    loaded = QSM.load(tmp_path / "model")
    assert all(parameter.isfinite().all() for parameter in loaded.policy.parameters())
    assert loaded.q_grad_norm == 0


def test_non_finite_actor_loss():
    model = make_model(q_grad_coef=1e30)
    with pytest.raises(ValueError, match=r"^actor_loss is inf at environment step 6, gradient step 1"):
        model.learn(20)
    assert all(parameter.isfinite().all() for parameter in model.policy.parameters())


def test_non_finite_mean_of_the_losses():
    """The check that is left where no single loss is looked at, on a GPU."""
    model = make_model()
    model.set_logger(Logger(None, []))
    model._log([{"critic_loss": th.tensor(1.0), "actor_loss": th.tensor(1.0)}])
    with pytest.raises(ValueError, match="actor_loss is nan at environment step 0"):
        model._log([{"critic_loss": th.tensor(1.0), "actor_loss": th.tensor(float("nan"))}])


# Files


def test_load_model_of_another_algorithm(tmp_path):
    SAC("MlpPolicy", "Pendulum-v1", buffer_size=10, policy_kwargs={"net_arch": [4]}).save(tmp_path / "sac")
    with pytest.raises(ValueError, match="sac was not saved by QSM but by stable_baselines3.sac.policies"):
        QSM.load(tmp_path / "sac")


def test_load_truncated_or_damaged_model(tmp_path):
    path = tmp_path / "model.zip"
    make_model().save(path)
    data = path.read_bytes()
    for size in (0, 10, len(data) // 2, len(data) - 10):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match="model.zip is not a saved model, or it is truncated or damaged"):
            QSM.load(path)
    middle = data.index(b"policy.pth") + 2000
    path.write_bytes(data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :])
    with pytest.raises(ValueError, match="model.zip is damaged: policy.pth in it does not match its checksum"):
        QSM.load(path)
    path.write_bytes(data)
    QSM.load(path)


@pytest.mark.parametrize("content", ["learning_rate: 0.001\n", "{}"])
def test_load_text_file(tmp_path, content):
    path = tmp_path / "notes.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match="notes.txt is not a saved model"):
        QSM.load(path)


def test_load_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        QSM.load(tmp_path / "nothing")


def test_load_for_another_environment(tmp_path):
    make_model().save(tmp_path / "model")
    with pytest.raises(ValueError, match="spaces do not match"):
        QSM.load(tmp_path / "model", env=DummyEnv(BOX, BOX))


def test_load_actor_from_a_policy_file(tmp_path):
    model = make_model()
    model.policy.save(tmp_path / "policy.pkl")
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        DiffusionActor.load(tmp_path / "policy.pkl")
