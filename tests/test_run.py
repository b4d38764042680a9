"""Training: constructor forms, rollouts, updates, logging, callbacks, spaces."""

import inspect
import math
from copy import deepcopy

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.buffers import BaseBuffer, DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
    StopTrainingOnMaxEpisodes,
)
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import Logger, configure
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.utils import LinearSchedule, obs_as_tensor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnvWrapper, VecNormalize
from torch import nn

import sb3_qsm.qsm
from sb3_qsm import QSM
from sb3_qsm.common.buffers import DictNStepReplayBuffer
from sb3_qsm.common.policies import DiffusionActor, DiffusionPolicy
from sb3_qsm.diffusion import NOISE_SCHEDULES, SAMPLERS
from sb3_qsm.diffusion.activations import Mish
from sb3_qsm.qsm.targets import CRITIC_REDUCTIONS, SCORE_TARGETS

SMALL = {"learning_starts": 5, "batch_size": 8, "buffer_size": 200, "diffusion_steps": 3, "device": "cpu"}
TINY_NETS = {"net_arch": [16]}
TRAIN_METRICS = {
    "actor_loss",
    "critic_loss",
    "learning_rate",
    "n_updates",
    "q_grad",
    "score_target",
    "action_saturation",
    "q_mean",
}


class DummyEnv(gym.Env):
    """Observations and actions of given spaces, random observations, reward 1, episodes of 10 steps."""

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Box) -> None:
        # Several environments share the given spaces otherwise, and with them a random state
        self.observation_space = deepcopy(observation_space)
        self.action_space = deepcopy(action_space)
        self.actions: list[np.ndarray] = []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.n_steps = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self.actions.append(action)
        self.n_steps += 1
        return self.observation_space.sample(), 1.0, False, self.n_steps >= 10, {}


BOX = spaces.Box(-1.0, 1.0, (3,), np.float32)


def make_model(env="Pendulum-v1", policy="MlpPolicy", policy_kwargs=None, **kwargs) -> QSM:
    model = QSM(policy, env, policy_kwargs={**TINY_NETS, **(policy_kwargs or {})}, **{**SMALL, **kwargs})
    model.set_logger(Logger(None, []))
    return model


def make_filled_model(steps=10, **kwargs) -> QSM:
    """A model with transitions in its buffer and no gradient step done."""
    model = make_model(seed=0, **{"learning_starts": 1000, **kwargs})
    model.learn(steps)
    assert model._n_updates == 0
    model.set_logger(Logger(None, []))
    return model


def parameters(module: nn.Module) -> list[th.Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def same(first: list[th.Tensor], second: list[th.Tensor]) -> bool:
    """Equal bit for bit."""
    return all(th.equal(a, b) for a, b in zip(first, second, strict=True))


def all_differ(first: list[th.Tensor], second: list[th.Tensor]) -> bool:
    return not any(th.equal(a, b) for a, b in zip(first, second, strict=True))


def logged(model: QSM, name: str) -> float:
    return model.logger.name_to_value[f"train/{name}"]


# Constructor


def test_positional_arguments_are_those_of_sac():
    ours, theirs = (list(inspect.signature(cls.__init__).parameters) for cls in (QSM, SAC))
    common = theirs[: theirs.index("ent_coef")]
    assert ours[: len(common)] == common
    sac_only = {"ent_coef", "target_entropy", "use_sde", "sde_sample_freq", "use_sde_at_warmup"}
    assert set(theirs) - set(ours) == sac_only


@pytest.mark.parametrize("policy", ["MlpPolicy", sb3_qsm.qsm.MlpPolicy, DiffusionPolicy])
def test_policy_by_name_and_by_class(policy):
    assert type(make_model(policy=policy).policy) is DiffusionPolicy


def test_env_by_id_instance_and_vec_env():
    for env in ("Pendulum-v1", gym.make("Pendulum-v1"), make_vec_env("Pendulum-v1", n_envs=2)):
        model = make_model(env)
        assert model.n_envs == model.replay_buffer.n_envs == getattr(env, "num_envs", 1)


def test_model_can_be_set_up_later():
    model = QSM("MlpPolicy", "Pendulum-v1", policy_kwargs=TINY_NETS, _init_setup_model=False, **SMALL)
    assert not hasattr(model, "actor")
    model._setup_model()
    model.learn(8)
    assert model._n_updates == 3


@pytest.mark.parametrize("net_arch", [[], [4], [4, 4], {"pi": [8], "qf": [8, 8]}, {"pi": [], "qf": [4]}])
def test_net_arch(net_arch):
    model = make_model(policy_kwargs={"net_arch": net_arch})
    pi, qf = (net_arch["pi"], net_arch["qf"]) if isinstance(net_arch, dict) else (net_arch, net_arch)
    trunk = [model.actor.score_network.input_layer, *model.actor.score_network.trunk]
    assert [layer.out_features for layer in trunk if isinstance(layer, nn.Linear)] == [*pi, 1]
    for q_network in model.critic.q_networks:
        assert [layer.out_features for layer in q_network if isinstance(layer, nn.Linear)] == [*qf, 1]
    model.learn(8)
    assert model._n_updates == 3


def test_layers_and_activations_of_the_policy():
    model = make_model(policy_kwargs={"layer_norm": True, "activation_fn": nn.Mish, "critic_activation_fn": nn.ELU})
    for network, activation in [(model.actor.score_network.trunk, Mish), (model.critic.q_networks[1], nn.ELU)]:
        kinds = [type(layer) for layer in network]
        assert activation in kinds
        assert nn.LayerNorm in kinds
    model.learn(8)
    assert math.isfinite(model.q_grad_norm)


@pytest.mark.parametrize(
    ("optimizer_class", "optimizer_kwargs"), [(th.optim.AdamW, {"weight_decay": 0.1}), (th.optim.RMSprop, {"alpha": 0.9})]
)
def test_optimizer(optimizer_class, optimizer_kwargs):
    model = make_model(policy_kwargs={"optimizer_class": optimizer_class, "optimizer_kwargs": optimizer_kwargs})
    for optimizer in (model.actor.optimizer, model.critic.optimizer):
        assert type(optimizer) is optimizer_class
        assert all(optimizer.param_groups[0][name] == value for name, value in optimizer_kwargs.items())
    before = parameters(model.actor)
    model.learn(8)
    assert not same(before, parameters(model.actor))


def test_user_arguments_are_not_changed():
    policy_kwargs = {"net_arch": [16], "optimizer_kwargs": {"eps": 1e-5}}
    copy = deepcopy(policy_kwargs)
    model = QSM("MlpPolicy", "Pendulum-v1", policy_kwargs=policy_kwargs, **SMALL)
    assert policy_kwargs == copy
    assert model.policy_kwargs == copy


def test_paper_hyperparameters_run():
    kwargs = QSM.paper_hyperparameters(total_timesteps=1000)
    kwargs["policy_kwargs"]["net_arch"] = [16]
    model = QSM("MlpPolicy", "Pendulum-v1", **{**kwargs, "learning_starts": 5, "batch_size": 8, "buffer_size": 100})
    model.learn(8)
    assert model.actor.schedule.name == "vp"
    assert model.gradient_critic == "online"
    assert model._n_updates == 3


# Rollouts


@pytest.mark.parametrize(
    ("train_freq", "updates"), [(4, 4), ((4, "step"), 4), ((1, "episode"), 2), ((2, "episode"), 1), (1, 15)]
)
def test_train_freq(train_freq, updates):
    model = make_model(DummyEnv(BOX, BOX), train_freq=train_freq, learning_starts=1)
    model.learn(16)
    # The first step only collects; episodes have ten steps and are finished, beyond the 16 steps
    assert model._n_updates == updates


@pytest.mark.parametrize("train_freq", ["4", ("1", "episode"), "non_sense", (1, "close")])
def test_train_freq_fail(train_freq):
    with pytest.raises(ValueError, match="train_freq"):
        make_model(train_freq=train_freq)


def test_gradient_steps_minus_one_follows_the_rollout():
    model = make_model(make_vec_env("Pendulum-v1", n_envs=2), train_freq=3, gradient_steps=-1, learning_starts=0)
    model.learn(6)
    assert model._n_updates == 6
    model = make_model(train_freq=2, gradient_steps=5, learning_starts=0)
    model.learn(4)
    assert model._n_updates == 10


def test_no_update_before_learning_starts():
    model = make_model(learning_starts=10)
    before = parameters(model.policy)
    model.learn(10)
    assert same(before, parameters(model.policy))
    model.learn(12)
    assert not same(before, parameters(model.policy))


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("action_noise", [None, NormalActionNoise, OrnsteinUhlenbeckActionNoise])
def test_several_envs_and_action_noise(n_envs, action_noise):
    noise = None if action_noise is None else action_noise(np.zeros(1), 0.1 * np.ones(1))
    model = make_model(make_vec_env("Pendulum-v1", n_envs=n_envs), action_noise=noise, train_freq=2)
    model.learn(18)
    stored = model.replay_buffer.actions[: model.replay_buffer.pos]
    assert model.replay_buffer.pos * n_envs == 18
    assert np.abs(stored).max() <= 1.0
    assert model._n_updates > 0


class ConstantNoise(NormalActionNoise):
    def __init__(self, value: float) -> None:
        super().__init__(np.zeros(1), np.zeros(1))
        self.value = value

    def __call__(self) -> np.ndarray:
        return np.array([self.value], dtype=np.float32)


@pytest.mark.parametrize("exploration_noise", [0.0, 0.1])
def test_action_noise_replaces_exploration_noise(exploration_noise):
    model = make_filled_model(
        exploration_noise=exploration_noise, exploration_initial_eps=0.0, learning_starts=0, gradient_steps=0
    )

    def collected(action_noise) -> np.ndarray:
        th.manual_seed(3)
        np.random.seed(3)
        return model._sample_action(0, action_noise)[1][0]

    th.manual_seed(3)
    scaled = model.policy.scale_action(model.predict(model._last_obs)[0])[0]
    np.testing.assert_allclose(collected(ConstantNoise(0.25)), np.clip(scaled + 0.25, -1, 1), atol=1e-6)
    np.random.seed(3)
    noise = np.random.normal(0.0, 1.0, (1,)) * exploration_noise
    np.testing.assert_allclose(collected(None), np.clip(scaled + noise, -1, 1), atol=1e-6)


@pytest.mark.parametrize(("steps", "share"), [(0, 0.8), (500, 0.4), (1000, 0.0), (5000, 0.0)])
def test_random_actions_fade_out(steps, share):
    """The policy always answers 0.25, so that the random actions stand out."""
    env = make_vec_env("Pendulum-v1", n_envs=400)
    model = make_model(
        env=env,
        exploration_noise=0.0,
        exploration_initial_eps=0.8,
        exploration_decay_steps=1000,
        learning_starts=0,
        seed=0,
    )
    model._setup_learn(1)
    model.num_timesteps = steps
    model._last_obs = np.zeros_like(model._last_obs)
    model.policy._predict = lambda observation, deterministic=False: th.full((len(observation), 1), 0.25)
    actions, buffer_actions = model._sample_action(0, None, n_envs=400)
    random = ~np.isclose(buffer_actions[:, 0], 0.25)
    assert abs(random.mean() - share) < 0.08
    np.testing.assert_allclose(actions, 2.0 * buffer_actions, atol=1e-6)
    if share:
        # Uniform over the whole box: mean 0, standard deviation 0.577
        assert abs(buffer_actions[random].mean()) < 0.15
        assert abs(buffer_actions[random].std() - 0.577) < 0.06


# Updates


@pytest.mark.parametrize(
    "kwargs",
    [
        *({"sampler": name} for name in SAMPLERS),
        *({"noise_schedule": name} for name in NOISE_SCHEDULES),
        *({"score_target": name} for name in SCORE_TARGETS),
        *({"critic_reduction": name} for name in CRITIC_REDUCTIONS),
        *({"policy_samples": share} for share in (0.0, 0.4, 1.0)),
        *({"gradient_critic": name} for name in ("online", "target", "both")),
        {"diffusion_steps": 1},
        {"diffusion_steps": 20, "sampling_temperature": 0.5},
        {"q_grad_coef": 50.0},
        {"temperature": 2.0},
        {"target_policy_noise": 0.2},
        {"best_of_n": 4},
        {"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}},
    ],
    ids=lambda kwargs: "-".join(str(value) for value in list(kwargs.values())[:1]),
)
def test_every_choice_trains(kwargs):
    model = make_model(seed=1, **kwargs)
    actor, critic, target = parameters(model.actor), parameters(model.critic), parameters(model.critic_target)
    model.learn(12)
    assert all_differ(critic, parameters(model.critic))
    assert all_differ(target, parameters(model.critic_target))
    # With one diffusion step its number is always zero, so that half of the Fourier features is constant
    assert not same(actor, parameters(model.actor))
    model.train(gradient_steps=2, batch_size=8)
    for name in TRAIN_METRICS:
        assert math.isfinite(logged(model, name)), name
    assert np.abs(model.replay_buffer.actions).max() <= 1.0


@pytest.mark.parametrize("n_critics", [1, 3])
def test_n_critics(n_critics):
    model = make_model(policy_kwargs={"n_critics": n_critics})
    assert len(model.critic.q_networks) == len(model.critic_target.q_networks) == n_critics
    before = parameters(model.critic)
    model.learn(10)
    assert all_differ(before, parameters(model.critic))


def constant_critics(model: QSM, target_values: list[float]) -> None:
    """Make the critics 0 and the target critics the given numbers, everywhere."""
    with th.no_grad():
        for critic, values in ((model.critic, [0.0] * len(target_values)), (model.critic_target, target_values)):
            for parameter in critic.parameters():
                parameter.zero_()
            for network, value in zip(critic.q_networks, values, strict=True):
                network[-1].bias.fill_(value)


def add_transition(model: QSM, reward: float, done: bool = False, timeout: bool = False) -> None:
    obs = np.zeros((1, 3), dtype=np.float32)
    infos = [{"TimeLimit.truncated": timeout}]
    model.replay_buffer.add(obs, obs + 1, np.zeros((1, 1)), np.array([reward]), np.array([done]), infos)


@pytest.mark.parametrize(("done", "timeout", "bootstraps"), [(False, False, True), (True, False, False), (True, True, True)])
def test_values_bootstrap_at_timeouts_and_not_at_terminations(done, timeout, bootstraps):
    model = make_model(gamma=0.9, policy_kwargs={"n_critics": 3})
    constant_critics(model, [8.0, 5.0, 6.0])
    add_transition(model, 2.0, done, timeout)
    model.train(gradient_steps=1, batch_size=4)
    target = 2.0 + 0.9 * 5.0 if bootstraps else 2.0
    # The critics are zero, so that the loss is the sum of their squared targets
    assert logged(model, "critic_loss") == pytest.approx(3 * target**2, rel=1e-5)
    assert logged(model, "q_mean") == 0.0


def test_both_critics_give_the_mean_gradient():
    """With the mean as reduction, the gradient of online and target critics together is the mean of the two gradients."""
    models = {name: make_filled_model(gradient_critic=name) for name in ("online", "target", "both")}
    for model in models.values():
        with th.no_grad():
            for parameter in model.critic.parameters():
                parameter.mul_(1.5)
    observations, actions = th.randn(16, 3), th.rand(16, 1) * 2 - 1
    gradients = {}
    for name, model in models.items():
        features = [observations] * len(model._gradient_critics())
        gradients[name] = model._actor_step.loss.q_gradient(features, actions)
    assert not th.allclose(gradients["online"], gradients["target"], rtol=0.1)
    th.testing.assert_close(gradients["both"], (gradients["online"] + gradients["target"]) / 2)


def test_gamma_changed_between_updates():
    model = make_model(gamma=0.9)
    add_transition(model, 2.0)
    for gamma in (0.9, 0.5, 0.0):
        model.gamma = gamma
        constant_critics(model, [4.0, 5.0])
        model.train(gradient_steps=1, batch_size=4)
        assert logged(model, "critic_loss") == pytest.approx(2 * (2.0 + gamma * 4.0) ** 2, rel=1e-5)


@pytest.mark.parametrize(("last", "bootstraps"), [("none", True), ("timeout", True), ("termination", False)])
def test_n_step_return(last, bootstraps, monkeypatch):
    model = make_model(gamma=0.9, n_steps=3)
    constant_critics(model, [4.0, 5.0])
    for i, reward in enumerate((1.0, 2.0, 3.0, 100.0)):
        # The episode ends with the second transition, if at all
        add_transition(model, reward, i == 1 and last != "none", i == 1 and last == "timeout")
    monkeypatch.setattr(np.random, "randint", lambda low, high, size: np.zeros(size, dtype=int))
    model.train(gradient_steps=1, batch_size=4)
    target = 1.0 + 0.9 * 2.0 + (0.9**2 * 3.0 + 0.9**3 * 4.0 if last == "none" else 0.9**2 * 4.0 * bootstraps)
    assert logged(model, "critic_loss") == pytest.approx(2 * target**2, rel=1e-5)


@pytest.mark.parametrize("handle_timeouts", [True, False])
def test_returns_do_not_run_on_where_a_training_resets_the_environment(handle_timeouts):
    """The second `learn` begins with new episodes: the three-step return of the last old step ends there, and bootstraps."""
    kwargs = {} if handle_timeouts else {"replay_buffer_kwargs": {"handle_timeout_termination": False}}
    model = make_model(DummyVecEnv([lambda: DummyEnv(BOX, BOX)]), learning_starts=1000, n_steps=3, **kwargs)
    if not handle_timeouts:
        model.learn(5)
        model.learn(5)
        discounts = model.replay_buffer._get_samples(np.array([2, 3, 4])).discounts[:, 0]
        np.testing.assert_allclose(discounts, 0.99 ** np.array([3, 2, 1]), rtol=1e-6)
        return
    model.learn(14)
    model.learn(6)
    buffer = model.replay_buffer
    assert buffer.timeouts[:20, 0].nonzero()[0].tolist() == [9, 13]
    assert buffer.dones[:20, 0].nonzero()[0].tolist() == [9, 13]
    samples = buffer._get_samples(np.array([12, 13, 14]))
    np.testing.assert_allclose(samples.rewards[:, 0], [1 + 0.99, 1, 1 + 0.99 + 0.99**2], rtol=1e-5)
    assert not samples.dones.any()
    # Without a reset an episode goes on
    model.learn(6, reset_num_timesteps=False)
    assert buffer.timeouts[:26, 0].nonzero()[0].tolist() == [9, 13, 23]


class LinearCritic(nn.Module):
    """Q(a) = slope * sum a + offset."""

    def __init__(self, slope, offset=0.0):
        super().__init__()
        self.slope, self.offset = slope, offset

    def q_values(self, features, actions):
        return (self.slope * actions.sum(-1) + self.offset).unsqueeze(0)


def actor_metrics(critics, norm=1.0, attributes=None, **kwargs):
    """What an update of the actor says where the critics are linear: the gradient is the same everywhere."""
    model = make_filled_model(20, **kwargs)
    for name, value in (attributes or {}).items():
        setattr(model, name, value)
    model._actor_step.loss.critics = nn.ModuleList(critics)
    model._gradient_critics = lambda: [model.critic] * len(critics)
    model.q_grad_norm.fill_(norm)
    th.manual_seed(3)
    np.random.seed(3)
    batch = model.replay_buffer.sample(64)
    noise = model._draw_noise(batch)
    sigma = model.actor.schedule.sigmas[noise.t].mean().item()
    return {name: value.item() for name, value in model._update_actor(batch, noise).items()} | {"sigma": sigma}


PLAIN = {"score_target": "noised", "prior_std": None, "q_grad_clip": None}


def test_arguments_of_the_actors_target():
    """-sigma / temperature times the gradient over its running mean, 0.995 + 0.005 * 3, or times the paper's factor."""
    for temperature in (0.1, 0.2):
        found = actor_metrics([LinearCritic(3.0)], temperature=temperature, **PLAIN)
        assert found["q_grad"] == pytest.approx(3.0)
        assert found["score_target"] == pytest.approx(found["sigma"] / temperature * 3.0 / 1.01, rel=1e-4)
    # Changed later, they take effect too
    changes = {"temperature": 0.4, "q_grad_clip": 1.0}
    found = actor_metrics([LinearCritic(3.0)], attributes=changes, **PLAIN)
    assert found["score_target"] == pytest.approx(found["sigma"] / 0.4, rel=1e-4)
    found = actor_metrics([LinearCritic(3.0)], q_grad_coef=2.0, **PLAIN)
    assert found["score_target"] == pytest.approx(found["sigma"] * 6.0, rel=1e-4)


def test_gradient_is_clipped_with_a_prior_too():
    """A gradient of 3 where 1.01 is the limit is one of 1.01."""
    kwargs = {"score_target": "noised", "prior_std": 0.5}
    clipped = actor_metrics([LinearCritic(3.0)], q_grad_clip=1.0, **kwargs)
    smaller = actor_metrics([LinearCritic(1.01)], norm=1.01, q_grad_clip=None, **kwargs)
    assert clipped["score_target"] == pytest.approx(smaller["score_target"], rel=1e-5)
    free = actor_metrics([LinearCritic(3.0)], q_grad_clip=None, **kwargs)
    assert free["score_target"] > 1.2 * clipped["score_target"]


def test_the_papers_target_has_no_prior():
    first, second = (actor_metrics([LinearCritic(3.0)], score_target="paper", prior_std=std) for std in (None, 0.5))
    assert first == second


def test_critic_reduction():
    critics = [LinearCritic(3.0, offset=10.0), LinearCritic(1.0)]
    for reduction, gradient in (("mean", 2.0), ("min", 1.0)):
        assert actor_metrics(critics, critic_reduction=reduction, **PLAIN)["q_grad"] == pytest.approx(gradient)


@pytest.mark.parametrize(("gradient_critic", "batch_size"), [("online", 7), ("both", 8), ("target", 1)])
def test_each_state_follows_one_critic_in_turns(gradient_critic, batch_size):
    """Row i the critic i modulo their number, with both kinds the mean of the online and the target one."""
    model = make_model(critic_reduction="split", gradient_critic=gradient_critic, policy_kwargs={"n_critics": 3} | TINY_NETS)
    for parameter in model.critic_target.parameters():
        parameter.data.add_(0.1 * th.randn_like(parameter))
    critics = model._gradient_critics()
    features = [th.randn(batch_size, 3) for _ in critics]
    actions = th.rand(batch_size, 1)
    found = model._actor_step.loss.q_gradient(features, actions)
    assert found.shape == actions.shape
    for i in range(batch_size):
        expected = 0.0
        for critic, f in zip(critics, features, strict=True):
            action = actions[i : i + 1].clone().requires_grad_(True)
            value = critic.q_networks[i % 3](th.cat([f[i : i + 1], action], dim=1))
            expected = expected + th.autograd.grad(value, action)[0][0] / len(critics)
        th.testing.assert_close(found[i], expected)


def test_random_numbers_of_an_update_are_independent():
    model = make_filled_model(20, diffusion_steps=4)
    noise = model._draw_noise(model.replay_buffer.sample(2000))
    parts = [noise.latent, *noise.chain, noise.target, noise.eps]
    assert len(parts) == 7
    correlations = np.corrcoef(np.stack([part.flatten().numpy() for part in parts]))
    assert np.abs(correlations - np.eye(7)).max() < 0.1
    assert np.bincount(noise.t.numpy(), minlength=4).min() > 400
    assert noise.t.max() == 3


def test_cosine_decay_by_its_definition():
    """The official code's schedule: of 2,000,000 gradient steps, which begin after 10,000 steps of the environment."""
    rate = QSM.paper_hyperparameters(1_000_000)["actor_learning_rate"]
    for steps, expected in [(0, 3e-4), (10_000, 3e-4), (510_000, 3e-4 * (1 + math.cos(math.pi / 4)) / 2)]:
        assert rate(1 - steps / 1_000_000) == pytest.approx(expected, rel=1e-6)
    assert QSM.paper_hyperparameters(2_010_000)["actor_learning_rate"](0.0) == pytest.approx(0.0, abs=1e-12)
    assert QSM.paper_hyperparameters(5_000_000)["actor_learning_rate"](0.1) == 0.0


@pytest.mark.parametrize("network", ["actor", "critic", "critic_target"])
def test_a_layer_without_parameters_that_was_replaced_is_seen(network):
    """What is compiled has its function in it."""
    model = make_model(seed=0).learn(8)
    updates = model._critic_step
    sequential = model.actor.score_network.trunk if network == "actor" else getattr(model, network).q_networks[0]
    (i,) = [i for i, layer in enumerate(sequential) if type(layer) is nn.SiLU][:1]
    sequential[i] = nn.Tanh()
    model.train(gradient_steps=1, batch_size=8)
    assert model._critic_step is not updates


@pytest.mark.parametrize(
    ("space", "as_it_is"),
    [
        (spaces.Box(-1.0, 1.0, (3,), np.float32), True),
        (spaces.Box(-1.0, 1.0, (3,), np.float64), True),
        (spaces.Box(0, 255, (3,), np.uint8), True),
        (spaces.Box(-1.0, 1.0, (2, 3), np.float32), False),
        (spaces.Box(0, 255, (36, 36, 3), np.uint8), False),
        (spaces.Discrete(5), False),
        (spaces.MultiDiscrete([2, 3]), False),
        (spaces.MultiBinary(4), False),
    ],
    ids=str,
)
def test_features_are_those_of_stable_baselines3(monkeypatch, space, as_it_is):
    model = make_model(DummyEnv(space, BOX))
    obs = obs_as_tensor(np.stack([model.observation_space.sample() for _ in range(4)]), model.device)
    calls = []
    monkeypatch.setattr(FlattenExtractor, "forward", lambda self, x: calls.append(x) or self.flatten(x))
    for network in (model.actor, model.critic):
        expected = network.extract_features(obs, network.features_extractor)
        assert expected.dtype == th.float32
        calls.clear()
        found = network.features(obs)
        assert len(calls) == (0 if as_it_is else 1)
        assert th.equal(found, expected)
        assert found.dtype == th.float32
        # It may do anything
        hook = network.features_extractor.register_forward_hook(lambda module, inputs, output: 2.0 * output)
        assert th.equal(network.features(obs), 2.0 * expected)
        hook.remove()


def test_features_of_another_extractor():
    class Doubled(FlattenExtractor):
        def forward(self, observations):
            return 2.0 * super().forward(observations)

    class Tripled(DiffusionActor):
        def extract_features(self, obs, features_extractor):
            return 3.0 * super().extract_features(obs, features_extractor)

    obs = th.rand(4, 3)
    actor = make_model(policy_kwargs={"features_extractor_class": Doubled}).actor
    assert th.equal(actor.features(obs), 2.0 * obs)
    actor = make_model().actor
    assert th.equal(actor.features(obs), obs)
    actor.__class__ = Tripled
    assert th.equal(actor.features(obs), 3.0 * obs)


def test_noise_of_the_chain_is_drawn_where_it_is_used():
    model = make_filled_model(20, diffusion_steps=4, target_sampling_steps=2, target_policy_noise=0.1)
    batch = model.replay_buffer.sample(2000)
    noise = model._draw_noise(batch)
    assert noise.chain is None
    parts = np.stack([part.flatten().numpy() for part in (noise.latent, noise.target, noise.eps)])
    assert np.abs(np.corrcoef(parts) - np.eye(3)).max() < 0.1
    model.train(gradient_steps=1, batch_size=8)
    model.target_sampling_steps = None
    assert model._draw_noise(batch).chain.shape == (4, 2000, 1)
    model.train(gradient_steps=1, batch_size=8)


def test_action_noise_follows_the_number_of_environments(tmp_path):
    noise = NormalActionNoise(np.zeros(3), np.full(3, 0.1))

    def make_env(n):
        return DummyVecEnv([lambda: DummyEnv(BOX, BOX)] * n)

    make_model(make_env(2), action_noise=noise).learn(20).save(tmp_path / "model")
    for n_envs in (3, 1, 2):
        model = QSM.load(tmp_path / "model", env=make_env(n_envs))
        model.learn(12, reset_num_timesteps=False)
        assert model._n_updates > 0


def test_a_step_that_a_callback_stopped_is_no_gap_in_an_episode():
    """Its transition is not stored, so that the next `learn` must begin with a reset."""

    class Stop(BaseCallback):
        def _on_step(self):
            return self.n_calls < 4

    model = make_model(DummyVecEnv([lambda: DummyEnv(BOX, BOX)]), learning_starts=1000, n_steps=3)
    model.learn(14, callback=Stop())
    env = model.env.envs[0].unwrapped
    assert env.n_steps == 4
    model.learn(5, reset_num_timesteps=False)
    assert env.n_steps == 5
    buffer = model.replay_buffer
    assert buffer.pos == 8
    assert buffer.timeouts[:8, 0].nonzero()[0].tolist() == [2]
    for row in (0, 1, 3, 4, 5, 6):
        np.testing.assert_array_equal(buffer.next_observations[row], buffer.observations[row + 1])


class Rows(ReplayBuffer):
    """A buffer with storage of its own."""

    def __init__(self, buffer_size, observation_space, action_space, device="auto", n_envs=1, **_):
        BaseBuffer.__init__(self, buffer_size, observation_space, action_space, device, n_envs)
        self.rows = []

    def add(self, obs, next_obs, action, reward, done, infos):
        self.rows.append((obs, action, next_obs, done[:, None], reward[:, None]))
        self.pos = len(self.rows)

    def sample(self, batch_size, env=None):
        rows = [self.rows[i] for i in np.random.randint(len(self.rows), size=batch_size)]
        columns = (np.concatenate(column).astype(np.float32) for column in zip(*rows, strict=True))
        return ReplayBufferSamples(*map(self.to_torch, columns))


def test_a_buffer_with_storage_of_its_own():
    model = make_model(replay_buffer_class=Rows)
    for _ in range(2):
        model.learn(20)
    assert len(model.replay_buffer.rows) == 40


class NoTerminalObservation(VecEnvWrapper):
    """Without what SB3 would use if it were there."""

    def reset(self):
        return self.venv.reset()

    def step_wait(self):
        obs, rewards, dones, infos = self.venv.step_wait()
        return obs, rewards, dones, [{**info, "terminal_observation": None} for info in infos]


def test_terminal_observations_may_be_missing():
    model = make_model(NoTerminalObservation(DummyVecEnv([lambda: DummyEnv(BOX, BOX)])))
    model.learn(25)
    assert model.replay_buffer.dones.sum() == 2


@pytest.mark.parametrize("frozen", ["encoder", "actor", "half the actor", "half the critics"])
def test_frozen_parameters_stay(frozen):
    """As with Stable-Baselines3's algorithms."""

    class Encoder(FlattenExtractor):
        def __init__(self, observation_space):
            super().__init__(observation_space)
            self.layer = nn.Linear(self.features_dim, self.features_dim)
            self.layer.requires_grad_(frozen != "encoder")

        def forward(self, observations):
            return self.layer(super().forward(observations))

    model = make_model(policy_kwargs={"features_extractor_class": Encoder})
    model.learn(10)
    chosen = {
        "encoder": [model.actor.features_extractor, model.critic.features_extractor],
        "actor": [model.actor],
        "half the actor": [model.actor.score_network.trunk],
        "half the critics": [model.critic.q_networks[0]],
    }[frozen]
    for network in chosen:
        network.requires_grad_(False)
    everything = [*model.actor.parameters(), *model.critic.parameters()]
    before = [parameter.detach().clone() for parameter in everything]
    model.learn(10, reset_num_timesteps=False)
    changed = [not th.equal(parameter, old) for parameter, old in zip(everything, before, strict=True)]
    assert changed == [parameter.requires_grad for parameter in everything]
    assert any(changed)


def test_n_steps_learns():
    model = make_model(DummyEnv(BOX, BOX), n_steps=3)
    model.learn(15)
    assert math.isfinite(logged_after_train(model))


@pytest.mark.parametrize("dictionary", [False, True])
@pytest.mark.parametrize(("share", "n"), [(0.0, 0), (0.3, 3), (1.0, 10)])
def test_what_the_actor_learns_from(monkeypatch, share, n, dictionary):
    if dictionary:
        model = make_filled_model(env=DICT_ENV, policy="MultiInputPolicy", policy_samples=share)
    else:
        model = make_filled_model(policy_samples=share)
    seen = {}
    sample, update, draw = model._sample_batch, model._update_actor, model._draw_noise
    monkeypatch.setattr(model, "_sample_batch", lambda size: seen.setdefault("batch", sample(size)))
    monkeypatch.setattr(model, "_draw_noise", lambda batch: seen.setdefault("noise", draw(batch)))
    monkeypatch.setattr(model, "_update_actor", lambda batch, noise: seen.update(used=batch) or update(batch, noise))
    actor = deepcopy(model.actor)
    model.train(gradient_steps=1, batch_size=10)
    batch, noise, used = seen["batch"], seen["noise"], seen["used"]
    for key in batch.observations if dictionary else [...]:
        assert th.equal(used.observations[key][:n], batch.next_observations[key][:n])
        assert th.equal(used.observations[key][n:], batch.observations[key][n:])
    # The actor as it was when the critics' target was computed
    with th.no_grad():
        next_actions = actor.sample(actor.features(batch.next_observations), noise.latent, noise.chain)
    th.testing.assert_close(used.actions[:n], next_actions[:n])
    assert th.equal(used.actions[n:], batch.actions[n:])
    assert not used.actions.requires_grad
    assert not th.allclose(next_actions, batch.actions)


def logged_after_train(model: QSM) -> float:
    model.set_logger(Logger(None, []))
    model.train(gradient_steps=1, batch_size=8)
    return logged(model, "critic_loss")


@pytest.mark.parametrize("gradient_critic", ["online", "target", "both"])
def test_actor_update_leaves_the_critics_alone_and_the_reverse(gradient_critic):
    model = make_filled_model(gradient_critic=gradient_critic)
    batch = model.replay_buffer.sample(8)
    noise = model._draw_noise(batch)
    actor, critic, target = parameters(model.actor), parameters(model.critic), parameters(model.critic_target)

    model._update_actor(batch, noise)
    assert all_differ(actor, parameters(model.actor))
    assert same(critic, parameters(model.critic))
    assert same(target, parameters(model.critic_target))
    assert all(parameter.grad is None for parameter in model.critic.parameters())
    assert all(parameter.grad is None for parameter in model.critic_target.parameters())

    actor = parameters(model.actor)
    gradients = [parameter.grad.clone() for parameter in model.actor.parameters()]
    model._update_critic(batch, noise)
    assert all_differ(critic, parameters(model.critic))
    assert same(target, parameters(model.critic_target))
    assert same(actor, parameters(model.actor))
    assert same(gradients, [parameter.grad for parameter in model.actor.parameters()])


def test_tau_changed_between_updates():
    model = make_filled_model(tau=0.0)
    target = parameters(model.critic_target)
    model.train(gradient_steps=2, batch_size=8)
    assert same(target, parameters(model.critic_target))
    model.tau = 1.0
    model.train(gradient_steps=1, batch_size=8)
    assert same(parameters(model.critic), parameters(model.critic_target))
    model.tau = 0.25
    target = parameters(model.critic_target)
    model.train(gradient_steps=1, batch_size=8)
    for old, new, online in zip(target, model.critic_target.parameters(), model.critic.parameters(), strict=True):
        th.testing.assert_close(new, 0.75 * old + 0.25 * online, check_layout=False)


def test_target_update_interval_changed_between_updates():
    model = make_filled_model(target_update_interval=2)
    target = parameters(model.critic_target)
    model.train(gradient_steps=1, batch_size=8)
    assert same(target, parameters(model.critic_target))
    model.train(gradient_steps=1, batch_size=8)
    assert all_differ(target, parameters(model.critic_target))
    target = parameters(model.critic_target)
    model.target_update_interval = 5
    model.train(gradient_steps=2, batch_size=8)
    assert same(target, parameters(model.critic_target))
    model.train(gradient_steps=1, batch_size=8)
    assert all_differ(target, parameters(model.critic_target))


def test_policy_delay():
    model = make_filled_model(policy_delay=3)
    actor = parameters(model.actor)
    model.train(gradient_steps=2, batch_size=8)
    assert same(actor, parameters(model.actor))
    assert "train/actor_loss" not in model.logger.name_to_value
    model.train(gradient_steps=1, batch_size=8)
    assert all_differ(actor, parameters(model.actor))
    assert math.isfinite(logged(model, "actor_loss"))
    actor = parameters(model.actor)
    model.policy_delay = 1
    model.train(gradient_steps=1, batch_size=8)
    assert all_differ(actor, parameters(model.actor))


def test_lr_schedule_changed_between_updates():
    model = make_filled_model()
    model.lr_schedule = lambda _: 0.0
    before = parameters(model.actor) + parameters(model.critic)
    model.train(gradient_steps=1, batch_size=8)
    assert logged(model, "learning_rate") == 0.0
    assert same(before, parameters(model.actor) + parameters(model.critic))
    model.lr_schedule = lambda _: 1e-3
    model.train(gradient_steps=1, batch_size=8)
    assert logged(model, "learning_rate") == 1e-3
    assert all_differ(before, parameters(model.actor) + parameters(model.critic))


def test_learning_rates_follow_the_progress_and_are_separate():
    model = make_filled_model(learning_rate=LinearSchedule(1e-2, 0.0, 1.0), actor_learning_rate=lambda p: 1e-3 * p**2)
    model._current_progress_remaining = 0.5
    model.train(gradient_steps=1, batch_size=8)
    assert model.critic.optimizer.param_groups[0]["lr"] == logged(model, "learning_rate") == pytest.approx(5e-3)
    assert model.actor.optimizer.param_groups[0]["lr"] == logged(model, "actor_learning_rate") == pytest.approx(2.5e-4)
    model = make_filled_model(actor_learning_rate=0.0)
    actor, critic = parameters(model.actor), parameters(model.critic)
    model.train(gradient_steps=1, batch_size=8)
    assert same(actor, parameters(model.actor))
    assert all_differ(critic, parameters(model.critic))


# Logging and callbacks


def read_csv(path) -> dict[str, list[str]]:
    header, *rows = (line.split(",") for line in path.read_text().splitlines())
    return {name: [row[i] for row in rows] for i, name in enumerate(header)}


def test_logged_names(tmp_path):
    model = make_model(DummyEnv(BOX, BOX), actor_learning_rate=1e-4)
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(20, log_interval=2)
    columns = read_csv(tmp_path / "progress.csv")
    expected = {f"train/{name}" for name in TRAIN_METRICS | {"action_std", "actor_learning_rate"}}
    assert expected <= set(columns)
    assert {"rollout/ep_rew_mean", "rollout/ep_len_mean", "time/total_timesteps", "time/fps"} <= set(columns)
    for name in expected:
        assert math.isfinite(float(columns[name][-1])), name
    assert float(columns["train/learning_rate"][-1]) == 3e-4
    assert float(columns["train/actor_learning_rate"][-1]) == 1e-4
    assert 0.0 < float(columns["train/action_std"][-1]) <= 1.1
    assert 0.0 <= float(columns["train/action_saturation"][-1]) <= 1.0


def test_action_std_is_the_spread_of_samples():
    model = make_filled_model(env=make_vec_env("Pendulum-v1", n_envs=2))
    state = th.get_rng_state()
    spread = model._action_std(n_samples=32)
    assert th.equal(th.get_rng_state(), state)  # looking does not change the training
    with th.no_grad():
        actions = model.actor(th.as_tensor(model._last_obs).repeat(32, 1)).view(32, 2, 1).numpy()
    assert spread == pytest.approx(actions.std(axis=0, ddof=1).mean(), rel=1e-5)


def test_metrics_are_means_over_the_gradient_steps(monkeypatch):
    model = make_filled_model()
    losses = []
    update = model._update_critic

    def spy(*args):
        metrics, next_actions = update(*args)
        losses.append(metrics["critic_loss"].item())
        return metrics, next_actions

    monkeypatch.setattr(model, "_update_critic", spy)
    model.train(gradient_steps=4, batch_size=8)
    assert len(set(losses)) == 4
    assert logged(model, "critic_loss") == pytest.approx(np.mean(losses), rel=1e-5)


def test_tensorboard_files(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = make_model(DummyEnv(BOX, BOX), tensorboard_log=str(tmp_path))
    model._custom_logger = False  # make_model() has set one
    model.learn(20, log_interval=2)
    model.learn(10, log_interval=1, reset_num_timesteps=False)
    model.learn(10, log_interval=1, tb_log_name="again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["QSM_1", "again_1"]
    events = EventAccumulator(str(tmp_path / "QSM_1"))
    events.Reload()
    expected = {f"train/{name}" for name in (TRAIN_METRICS | {"action_std"}) - {"n_updates"}} | {"rollout/ep_rew_mean"}
    assert expected <= set(events.Tags()["scalars"])
    assert "train/n_updates" not in events.Tags()["scalars"]  # as in SB3
    assert [event.step for event in events.Scalars("train/actor_loss")] == [20, 30]


def test_callbacks(tmp_path):
    eval_callback = EvalCallback(
        DummyEnv(BOX, BOX),
        eval_freq=8,
        n_eval_episodes=1,
        best_model_save_path=str(tmp_path),
        log_path=str(tmp_path),
        warn=False,
    )
    checkpoint = CheckpointCallback(save_freq=1, save_path=str(tmp_path), save_replay_buffer=True)
    events = EveryNTimesteps(n_steps=10, callback=checkpoint)
    episodes = StopTrainingOnMaxEpisodes(max_episodes=2)
    callback = CallbackList([eval_callback, events, episodes])
    model = make_model(DummyEnv(BOX, BOX))
    model.learn(100, callback=callback)
    assert model.num_timesteps == events.n_calls == callback.num_timesteps == 20
    assert checkpoint.n_calls == 2
    assert "new_obs" in callback.locals
    assert callback.locals["new_obs"] is checkpoint.locals["new_obs"]
    assert list(np.load(tmp_path / "evaluations.npz")["timesteps"]) == [8, 16]
    assert QSM.load(tmp_path / "best_model").num_timesteps in (8, 16)
    assert QSM.load(tmp_path / "rl_model_20_steps").num_timesteps == 20
    assert (tmp_path / "rl_model_replay_buffer_20_steps.pkl").exists()
    calls = []
    model.learn(100, callback=lambda _locals, _globals: calls.append(0) or len(calls) < 3)
    assert model.num_timesteps == 3


# Determinism


@pytest.mark.parametrize("kwargs", [{}, {"n_envs": 2, "gradient_steps": -1}, {"sampler": "ddim", "best_of_n": 2}])
def test_training_is_determined_by_the_seed(kwargs):
    def run(seed: int, log_interval: int):
        options = dict(kwargs)
        env = make_vec_env("Pendulum-v1", n_envs=options.pop("n_envs", 1), env_kwargs={"max_episode_steps": 10})
        model = make_model(env, seed=seed, **options)
        model.learn(24, log_interval=log_interval)
        obs = model.env.reset()
        actions = [th.as_tensor(model.predict(obs)[0]) for _ in range(3)]
        return [*parameters(model.policy), model.q_grad_norm, th.as_tensor(model.replay_buffer.observations), *actions]

    first = run(1, 1)
    # Logging, which looks at samples of the policy, is no part of it
    assert same(first, run(1, 1000))
    assert not same(first, run(2, 1))


def test_dict_is_flat_bit_for_bit():
    dict_env = DummyEnv(spaces.Dict({"vec": BOX}), BOX)
    flat_env = gym.wrappers.FlattenObservation(DummyEnv(spaces.Dict({"vec": BOX}), BOX))
    dict_model = make_model(dict_env, "MultiInputPolicy", seed=2)
    flat_model = make_model(flat_env, "MlpPolicy", seed=2)
    before = parameters(dict_model.policy)
    assert same(before, parameters(flat_model.policy))
    for model in (dict_model, flat_model):
        model.set_random_seed(2)
        model.learn(25)
    assert not same(before, parameters(dict_model.policy))
    assert same(parameters(dict_model.policy), parameters(flat_model.policy))
    obs = BOX.sample()
    action, _ = dict_model.predict({"vec": obs}, deterministic=True)
    assert np.array_equal(action, flat_model.predict(obs, deterministic=True)[0])


# n-step returns


DICT_ENV = DummyEnv(spaces.Dict({"vec": BOX, "other": BOX}), BOX)


@pytest.mark.parametrize(
    ("kwargs", "buffer_class", "n_steps"),
    [
        ({}, NStepReplayBuffer, 3),
        ({"n_steps": 5}, NStepReplayBuffer, 5),
        ({"n_steps": 1}, ReplayBuffer, None),
        ({"env": DICT_ENV, "policy": "MultiInputPolicy"}, DictNStepReplayBuffer, 3),
        ({"env": DICT_ENV, "policy": "MultiInputPolicy", "n_steps": 1}, DictReplayBuffer, None),
        ({"replay_buffer_class": ReplayBuffer}, ReplayBuffer, None),
        (
            {"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}},
            ReplayBuffer,
            None,
        ),
    ],
)
def test_n_steps(kwargs, buffer_class, n_steps):
    model = make_model(**kwargs)
    assert type(model.replay_buffer) is buffer_class
    assert getattr(model.replay_buffer, "n_steps", None) == n_steps
    # Stored as given
    assert model.n_steps == kwargs.get("n_steps")
    assert model.replay_buffer_class == kwargs.get("replay_buffer_class")
    assert model.replay_buffer_kwargs == kwargs.get("replay_buffer_kwargs", {})
    model.learn(20)


def test_n_steps_can_be_changed_at_loading(tmp_path):
    make_model().save(tmp_path / "model")
    for n_steps, buffer_class in ((None, NStepReplayBuffer), (1, ReplayBuffer), (2, NStepReplayBuffer)):
        model = QSM.load(tmp_path / "model", n_steps=n_steps)
        assert type(model.replay_buffer) is buffer_class
        assert getattr(model.replay_buffer, "n_steps", 1) == (3 if n_steps is None else n_steps)


def test_gamma_of_n_step_returns_follows_the_models():
    model = make_filled_model(10)
    model.gamma = 0.5
    model.train(gradient_steps=1, batch_size=8)
    discounts = model.replay_buffer.sample(100).discounts
    assert set(discounts.flatten().tolist()) <= {0.5, 0.25, 0.125}


def test_gamma_given_to_an_own_replay_buffer_stays():
    own = {"n_steps": 2, "gamma": 0.5}
    model = make_model(replay_buffer_class=NStepReplayBuffer, replay_buffer_kwargs=own, learning_starts=10).learn(20)
    assert model.gamma != 0.5
    assert set(model.replay_buffer.sample(100).discounts.flatten().tolist()) <= {0.5, 0.25}


def test_steps_may_be_whole_floats():
    model = make_model(learning_starts=1e1, exploration_decay_steps=2e1).learn(15)
    assert model._n_updates == 5
    assert isinstance(model.learning_starts, float)  # stored as it was given


@pytest.mark.parametrize("normalized", [False, True])
def test_n_step_returns_of_dictionaries(normalized):
    """The same transitions, with terminations and time-outs, in SB3's flat buffer and split over two keys."""
    rng = np.random.default_rng(0)
    space = spaces.Dict({"a": spaces.Box(-9, 9, (2,)), "b": spaces.Box(-9, 9, (1,))})
    flat = NStepReplayBuffer(50, spaces.Box(-9, 9, (3,)), BOX, n_envs=2, n_steps=3, gamma=0.9)
    split = DictNStepReplayBuffer(50, space, BOX, n_envs=2, n_steps=3, gamma=0.9)
    for _ in range(70):
        obs, next_obs = rng.normal(size=(2, 2, 3)).astype(np.float32)
        rest = rng.normal(size=(2, 3)), rng.normal(size=2), rng.random(2) < 0.2
        infos = [{"TimeLimit.truncated": bool(rng.random() < 0.5)} for _ in range(2)]
        flat.add(obs, next_obs, *rest, infos)
        split.add(*({"a": o[:, :2], "b": o[:, 2:]} for o in (obs, next_obs)), *rest, infos)
    env = None
    if normalized:
        env = VecNormalize(DummyVecEnv([lambda: DummyEnv(space, BOX)]), norm_reward=False)
        env.obs_rms["a"].mean[:] = 0.5
    np.random.seed(0)
    expected = flat.sample(200)
    np.random.seed(0)
    samples = split.sample(200, env)
    for name in ("observations", "next_observations"):
        values = getattr(expected, name)
        a = (values[:, :2] - 0.5) / np.sqrt(1 + 1e-8) if normalized else values[:, :2]
        th.testing.assert_close(getattr(samples, name)["a"], a.float())
        th.testing.assert_close(getattr(samples, name)["b"], values[:, 2:])
    for name in ("actions", "dones", "rewards", "discounts"):
        assert th.equal(getattr(samples, name), getattr(expected, name)), name
    assert len(set(samples.discounts.flatten().tolist())) == 3


# Spaces and wrappers


@pytest.mark.parametrize(
    "space",
    [
        spaces.Discrete(5),
        spaces.MultiDiscrete([4, 3]),
        spaces.MultiBinary(8),
        spaces.MultiBinary((3, 2)),
        spaces.Box(-1.0, 1.0, (2, 3), np.float64),
        spaces.Dict({"a": BOX, "b": spaces.Discrete(3)}),
    ],
    ids=lambda space: str(space).replace(" ", ""),
)
def test_observation_spaces(space):
    policy = "MultiInputPolicy" if isinstance(space, spaces.Dict) else "MlpPolicy"
    env = DummyEnv(space, BOX)
    model = make_model(env, policy)
    model.learn(14)
    assert math.isfinite(logged_after_train(model))
    returns, lengths = evaluate_policy(model, env, n_eval_episodes=1, return_episode_rewards=True, warn=False)
    assert returns == [10.0]
    assert lengths == [10]
    assert env.action_space.contains(model.predict(env.reset()[0])[0])


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(-1.0, 1.0, (2, 2), np.float32),
        spaces.Box(-1.0, 1.0, (2,), np.float64),
        spaces.Box(np.array([-1.0, 0.5, -30.0]), np.array([3.0, 0.75, -10.0]), dtype=np.float64),
        spaces.Box(np.float32([[-1, 2]]), np.float32([[0, 5]])),
    ],
    ids=lambda space: f"{space.shape}-{space.dtype}",
)
def test_action_spaces(space):
    env = DummyEnv(BOX, space)
    check_env(env, warn=False)
    env.actions.clear()
    model = make_model(env)
    model.learn(14)
    assert len(env.actions) == 14
    for action in [*env.actions, *(model.predict(BOX.sample(), deterministic=flag)[0] for flag in (True, False))]:
        assert action.shape == space.shape
        assert action.dtype == space.dtype
        assert (action >= space.low - 1e-6).all()
        assert (action <= space.high + 1e-6).all()
    assert model.predict(np.stack([BOX.sample()] * 3))[0].shape == (3, *space.shape)


@pytest.mark.parametrize("n_envs", [1, 2])
def test_her_with_multi_input_policy(n_envs):
    env = make_vec_env(lambda: BitFlippingEnv(n_bits=3, continuous=True), n_envs=n_envs)
    model = make_model(
        env,
        "MultiInputPolicy",
        replay_buffer_class=HerReplayBuffer,
        replay_buffer_kwargs={"n_sampled_goal": 2, "goal_selection_strategy": "future"},
        learning_starts=12,
    )
    before = parameters(model.policy)
    model.learn(24)
    assert model._n_updates > 0
    assert not same(before, parameters(model.policy))
    assert math.isfinite(logged_after_train(model))
    obs = env.reset()
    assert model.predict(obs, deterministic=True)[0].shape == (n_envs, 3)


def test_vec_normalize(monkeypatch):
    env = VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")]), clip_obs=2.0, clip_reward=1.5)
    eval_env = VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")]), training=False, norm_reward=False)
    model = make_model(env, n_steps=1, seed=0)
    assert model.get_vec_normalize_env() is env
    model.set_env(eval_env)
    assert model.get_vec_normalize_env() is eval_env
    model.learn(4)
    model.set_env(env)
    model.learn(14)
    # The buffer holds what the environment gave, the updates get it normalised
    assert np.abs(model.replay_buffer.rewards).max() > 1.5
    batches = []
    update = model._update_critic
    monkeypatch.setattr(model, "_update_critic", lambda batch, noise: batches.append(batch) or update(batch, noise))
    model.set_logger(Logger(None, []))
    model.train(gradient_steps=1, batch_size=32)
    (batch,) = batches
    stored = model.replay_buffer.observations[: model.replay_buffer.pos, 0]
    normalised = {tuple(row) for row in np.round(env.normalize_obs(stored), 4)}
    assert {tuple(row) for row in np.round(batch.observations.numpy(), 4)} <= normalised
    assert batch.rewards.abs().max() <= 1.5


@pytest.mark.parametrize(
    "change",
    [
        {"score_target": "noised"},
        {"prior_std": None},
        {"gradient_critic": "target"},
        {"critic_reduction": "min"},
        {"target_sampling_steps": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_arguments_that_were_changed_are_followed(change, tmp_path):
    """As by a model that was loaded with them."""
    model = make_model(seed=0).learn(8)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    results = []
    for attributes, arguments in ((change, {}), ({}, change), ({}, {})):
        each = QSM.load(tmp_path / "model", env=model.env, **arguments)
        each.load_replay_buffer(tmp_path / "buffer")
        each.set_logger(Logger(None, []))
        for name, value in attributes.items():
            setattr(each, name, value)
        th.manual_seed(0)
        np.random.seed(0)
        each.train(2, 8)
        results.append(parameters(each.actor))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


def test_compilation_that_was_switched_on_is_followed():
    model = make_model().learn(8)
    model.compile = True
    model._follow_changes()
    assert model._critic_step.compiled
    assert model._actor_step.compiled


def test_wrong_argument_that_was_set_is_refused():
    model = make_model().learn(8)
    model.critic_reduction = "max"
    before = parameters(model.critic)
    with pytest.raises(ValueError, match="Unknown critic_reduction 'max'; known ones: mean, min, split"):
        model.learn(8)
    assert same(before, parameters(model.critic))


@pytest.mark.parametrize("replaced", ["policy", "layers", "target", "average", "optimizer"])
def test_networks_that_were_replaced_are_trained(replaced):
    """As by SB3's algorithms, which look the networks up at every step."""
    model = make_model(seed=0).learn(8)
    if replaced == "policy":
        model.policy = type(model.policy)(
            model.observation_space, model.action_space, model.lr_schedule, **model.policy_kwargs, **model._diffusion_kwargs()
        )
        model._create_aliases()
        watched = model.policy.state_dict()
    elif replaced == "layers":
        layers = [model.actor.score_network.trunk, *model.critic.q_networks]
        for layer in layers:
            layer[-1] = deepcopy(layer[-1])
        for network in (model.actor, model.critic):
            network.optimizer = th.optim.Adam(network.parameters(), lr=1e-3)
        watched = dict(nn.ModuleList(layer[-1] for layer in layers).named_parameters())
    elif replaced == "target":
        model.critic_target = deepcopy(model.critic)
        watched = dict(model.critic_target.named_parameters())
    elif replaced == "average":
        model.policy.actor_ema = deepcopy(model.actor)
        watched = dict(model.policy.actor_ema.named_parameters())
    else:
        model.actor.optimizer = th.optim.Adam(model.actor.score_network.trunk.parameters(), lr=1e-3)
        watched = dict(model.actor.score_network.trunk.named_parameters())
        others = [model.actor.score_network.input_layer.weight.clone(), model.actor.score_network.input_layer.weight]
    before = {name: tensor.clone() for name, tensor in watched.items()}
    updates = model._actor_step
    model.learn(10, reset_num_timesteps=False)
    constant = ("schedule", "steps")
    changed = {name for name, tensor in watched.items() if not th.equal(tensor, before[name])}
    assert changed == {name for name in watched if not any(part in name for part in constant)}
    assert replaced != "optimizer" or th.equal(*others)
    assert model._actor_step is not updates
    updates = model._actor_step
    model.learn(1, reset_num_timesteps=False)
    assert model._actor_step is updates
