"""Acting: deterministic, stochastic, best of N."""

import random

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_qsm import QSM
from sb3_qsm.common.policies import DiffusionActor, DiffusionPolicy, set_mode
from sb3_qsm.diffusion import NOISE_SCHEDULES, SAMPLERS
from tests.test_run import BOX, DummyEnv

OBSERVATIONS = spaces.Box(-1.0, 1.0, (3,), np.float32)
#: Different for each action, none symmetric
ACTIONS = spaces.Box(np.float32([-1.0, 0.5]), np.float32([3.0, 0.75]))


def make_model(action_space=ACTIONS, trained=True, policy_kwargs=None, actor_ema=False, **kwargs) -> QSM:
    model = QSM(
        "MlpPolicy",
        DummyEnv(OBSERVATIONS, action_space),
        actor_ema=actor_ema,
        # What is asserted of these networks shall not depend on the defaults
        policy_kwargs={"net_arch": [16], "xavier": False, "critic_activation_fn": th.nn.ReLU, **(policy_kwargs or {})},
        learning_starts=5,
        batch_size=8,
        buffer_size=100,
        device="cpu",
        seed=0,
        **kwargs,
    )
    if trained:
        # Actions depend more on the observation, and values on the action, than at the start
        with th.no_grad():
            model.actor.score_network.input_layer.weight[:, 2:5] *= 5
            model.actor.score_network.trunk[-1].weight *= 2
            for network in model.critic.q_networks:
                network[0].weight[:, 3:] *= 10
    return model


def observations(n: int) -> np.ndarray:
    return np.random.default_rng(1).uniform(-1, 1, (n, 3)).astype(np.float32)


def rng_states() -> list:
    name, keys, *rest = np.random.get_state()
    return [th.get_rng_state().tolist(), name, keys.tolist(), rest, random.getstate()]


@pytest.mark.parametrize("best_of_n", [1, 5])
@pytest.mark.parametrize(("sampler", "noise_schedule"), [("ddpm_x0", "cosine"), ("ddpm", "vp"), ("ddim", "vp")])
def test_deterministic_action_is_a_function_of_the_observation(sampler, noise_schedule, best_of_n):
    model = make_model(sampler=sampler, noise_schedule=noise_schedule, best_of_n=best_of_n)
    obs = observations(100)
    batched, _ = model.predict(obs, deterministic=True)
    assert np.ptp(batched, axis=0).min() > 1e-3  # not the same one everywhere
    for seed in (0, 1):
        th.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        before = rng_states()
        np.testing.assert_array_equal(batched, model.predict(obs, deterministic=True)[0])
        reverse, _ = model.predict(obs[::-1].copy(), deterministic=True)
        np.testing.assert_allclose(reverse[::-1], batched, atol=2e-5)
        for observation, action in zip(obs[:30], batched[:30], strict=True):
            single, _ = model.predict(observation, deterministic=True)
            # Rounding differs between sizes of a batch; the chain multiplies it, most in its first steps
            assert np.abs(model.policy.scale_action(single) - model.policy.scale_action(action)).max() <= 5e-6
        assert rng_states() == before


@pytest.mark.parametrize(
    ("change", "kwargs"),
    [
        *((change, {}) for change in ("train", "frozen", "data", "load", "set", "vector")),
        # The frequencies of the only step, 0, get no gradient
        ("train", {"diffusion_steps": 1, "noise_schedule": "linear", "policy_kwargs": {"time_arch": ()}}),
    ],
)
def test_acting_follows_the_parameters(change, kwargs):
    """What is kept between calls of ``predict`` goes when any parameter in it changes, however it was changed."""
    model = make_model(**kwargs)
    network = model.actor.score_network
    obs = observations(1)
    before, _ = model.predict(obs, deterministic=True)
    model.predict(obs, deterministic=True)
    if change in ("train", "frozen"):
        for parameter in network.parameters():
            parameter.requires_grad_(change == "train" or parameter.dim() > 1)
        model.learning_rate = model.lr_schedule = lambda _: 0.05
        model.learn(20)
    elif change == "data":
        for parameter in model.policy.parameters():
            parameter.data.mul_(1.1)
    elif change == "load":
        model.policy.load_state_dict({name: value * 1.1 for name, value in model.policy.state_dict().items()})
    elif change == "set":
        network.time_mlp[0].weight = th.nn.Parameter(network.time_mlp[0].weight * 3)
    else:
        model.policy.load_from_vector(model.policy.parameters_to_vector() * 1.1)
    after, _ = model.predict(obs, deterministic=True)
    network._time_cache = None
    fresh, _ = model.predict(obs, deterministic=True)
    np.testing.assert_array_equal(after, fresh)
    assert np.abs(after - before).max() > 1e-5


@pytest.mark.parametrize("best_of_n", [1, 5])
def test_deterministic_action_of_the_actor_and_after_loading(tmp_path, best_of_n):
    model = make_model(best_of_n=best_of_n)
    obs = observations(10)
    action, _ = model.predict(obs, deterministic=True)
    model.save(tmp_path / "model")
    np.testing.assert_array_equal(action, QSM.load(tmp_path / "model").predict(obs, deterministic=True)[0])
    tensor = th.as_tensor(obs)
    with th.no_grad():
        for policy in (model.policy, model.actor):
            assert th.equal(policy(tensor, deterministic=True), policy(tensor, deterministic=True))
        # The actor alone has no critics to choose by
        first = th.as_tensor(model.policy.scale_action(action))
        assert th.allclose(model.actor(tensor, deterministic=True), first, atol=1e-5) == (best_of_n == 1)


def add_noise_to_data(model: QSM) -> None:
    for parameter in model.actor.parameters():
        parameter.data.add_(0.1 * th.randn_like(parameter))


@th.no_grad()
def add_noise_in_place(model: QSM) -> None:
    for parameter in model.actor.parameters():
        parameter.add_(0.1 * th.randn_like(parameter))


def load_another_vector(model: QSM) -> None:
    vector = model.actor.parameters_to_vector()
    model.actor.load_from_vector(vector + np.random.normal(0.0, 0.1, len(vector)))


def load_another_state(model: QSM) -> None:
    state = model.policy.state_dict()
    model.policy.load_state_dict({name: value + 0.1 * th.randn_like(value) for name, value in state.items()})


def step_of_the_optimizer(model: QSM) -> None:
    for parameter in model.actor.parameters():
        parameter.grad = th.randn_like(parameter)
    model.actor.optimizer.param_groups[0]["lr"] = 0.02
    model.actor.optimizer.step()


@pytest.mark.parametrize(
    "change", [add_noise_to_data, add_noise_in_place, load_another_vector, load_another_state, step_of_the_optimizer]
)
def test_acting_follows_every_change_of_the_parameters(change):
    model = make_model(noise_schedule="vp", trained=False)
    obs = observations(20)
    previous, _ = model.predict(obs, deterministic=True)
    for _ in range(3):
        change(model)
        action, _ = model.predict(obs, deterministic=True)
        fresh = make_model(noise_schedule="vp", trained=False)
        fresh.policy.load_state_dict(model.policy.state_dict())
        np.testing.assert_array_equal(action, fresh.predict(obs, deterministic=True)[0])
        assert not np.array_equal(action, previous)
        previous = action


@pytest.mark.parametrize("rows", [1, 130])
@pytest.mark.parametrize("autocast", [False, True])
def test_hooks_of_layers_are_called_while_acting(rows, autocast):
    """One that is called once a step and changes what it sees; autocast is what precision="bf16" acts under."""
    model, calls = make_model(), []
    layers = model.actor.score_network.trunk
    with th.autocast("cpu", enabled=autocast, dtype=th.bfloat16):
        before = model.predict(observations(rows), deterministic=True)[0]
        handles = [layers[-1].register_forward_pre_hook(lambda layer, inputs: calls.append("pre"))]
        assert np.allclose(model.predict(observations(rows), deterministic=True)[0], before, atol=0.02 if autocast else 1e-6)
        assert len(calls) == model.diffusion_steps
        handles.append(layers[-1].register_forward_hook(lambda layer, inputs, output: output + 1))
        changed = model.predict(observations(rows), deterministic=True)[0]
        assert len(calls) == 2 * model.diffusion_steps
        assert not np.allclose(changed, before, atol=0.02)
        for handle in handles:
            handle.remove()
        assert np.array_equal(model.predict(observations(rows), deterministic=True)[0], before)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_stochastic_actions_differ_and_follow_the_seed(sampler):
    model = make_model(sampler=sampler, noise_schedule="vp", trained=False)
    obs = np.repeat(observations(1), 50, axis=0)
    th.manual_seed(0)
    actions, _ = model.predict(obs)
    assert np.unique(actions, axis=0).shape[0] > 5
    assert not np.array_equal(actions, model.predict(obs)[0])
    th.manual_seed(0)
    np.testing.assert_array_equal(actions, model.predict(obs)[0])


def test_sampling_temperature_widens_the_actions():
    spread = []
    for temperature in (0.0, 1.0):
        model = make_model(sampling_temperature=temperature, sampler="ddpm", noise_schedule="vp", trained=False)
        th.manual_seed(0)
        # One latent for all, so that only the noise of the chain is left
        features = model.actor.features(th.as_tensor(observations(1)))
        latent, noise = model.actor.draw_latents(64)
        with th.no_grad():
            spread.append(model.actor.sample(features.expand(64, -1), latent[:1].expand(64, -1), noise).std(dim=0).max())
    assert spread[0] < 1e-6
    assert spread[1] > 0.1


@pytest.mark.parametrize("n_envs", [1, 7])
@pytest.mark.parametrize("deterministic", [True, False])
def test_best_of_n_takes_the_highest_minimum_of_the_critics(n_envs, deterministic):
    n = 6
    model = make_model(best_of_n=n, gradient_critic="online")
    # Other parameters than those of the targets, which must not choose
    with th.no_grad():
        for parameter in model.critic_target.parameters():
            parameter.normal_()
    obs = observations(n_envs)
    th.manual_seed(5)
    action = model.policy.scale_action(model.predict(obs, deterministic=deterministic)[0])

    th.manual_seed(5)
    latents, noise = model.actor.draw_latents(n_envs, deterministic, n)
    chosen, spreads = set(), []
    for i, observation in enumerate(th.as_tensor(obs)):
        candidates = []
        for k in range(n):
            row = slice(k * n_envs + i, k * n_envs + i + 1)
            chain = None if noise is None else noise[:, row]
            with th.no_grad():
                candidates.append(model.actor.sample(observation[None], latents[row], chain)[0])
        with th.no_grad():
            q_values = [min(q.item() for q in model.critic(observation[None], a[None])) for a in candidates]
        best = int(np.argmax(q_values))
        chosen.add(best)
        np.testing.assert_allclose(action[i], candidates[best].numpy(), atol=1e-5)
        spreads.append(max(q_values) - min(q_values))
    # Where the chain ends in a corner, all candidates may be the same
    assert max(spreads) > 0
    if n_envs > 1:
        assert len(chosen) > 1


def test_best_of_n_raises_the_value():
    def mean_value(n: int) -> float:
        model = make_model(best_of_n=n)
        obs = th.as_tensor(observations(100))
        th.manual_seed(2)
        with th.no_grad():
            return th.cat(model.critic(obs, model.policy(obs)), dim=1).amin(dim=1).mean().item()

    assert mean_value(8) > mean_value(1) + 1e-3


@pytest.mark.parametrize("noise_schedule", NOISE_SCHEDULES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_actions_are_within_asymmetric_bounds(noise_schedule, sampler):
    model = make_model(noise_schedule=noise_schedule, sampler=sampler)
    low, high = ACTIONS.low, ACTIONS.high
    for deterministic in (True, False):
        actions, _ = model.predict(observations(200), deterministic=deterministic)
        assert actions.shape == (200, 2)
        assert actions.dtype == np.float32
        assert (actions >= low - 1e-6).all()
        assert (actions <= high + 1e-6).all()
        assert (np.abs(model.policy.scale_action(actions)) <= 1 + 1e-6).all()
    # Both halves of each range are used
    assert (actions.min(axis=0) < (low + high) / 2).all()
    assert (actions.max(axis=0) > (low + high) / 2).all()


def test_bounds_are_reached_exactly(monkeypatch):
    model = make_model()
    for scaled, expected in ((-1.0, ACTIONS.low), (0.0, (ACTIONS.low + ACTIONS.high) / 2), (1.0, ACTIONS.high)):
        monkeypatch.setattr(model.actor, "sample", lambda features, *_, value=scaled: th.full((len(features), 2), value))
        np.testing.assert_allclose(model.predict(observations(1))[0][0], expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rounding_does_not_leave_the_bounds(dtype):
    """SB3's arithmetic alone ends at 0.20000002 here."""
    rng = np.random.default_rng(0)
    low, high = (rng.uniform(*between, 100).astype(dtype) for between in ((-1.0, 0.0), (0.1, 2.0)))
    space = spaces.Box(np.append(low, dtype(-0.1)), np.append(high, dtype(0.2)), dtype=dtype)
    model = QSM("MlpPolicy", DummyEnv(BOX, space), policy_kwargs={"net_arch": [16]}, buffer_size=10)
    for scaled, bound in ((-1.0, space.low), (1.0, space.high)):
        scaled = np.full((1, 101), scaled, np.float32)
        np.testing.assert_allclose(model.policy.unscale_action(scaled)[0], bound, rtol=1e-5)
        assert space.contains(model.policy.unscale_action(scaled)[0].astype(dtype))
    assert not space.contains(BasePolicy.unscale_action(model.policy, scaled)[0].astype(dtype))
    actions, _ = model.predict(rng.normal(size=(100, 3)).astype(np.float32))
    assert (np.abs(model.policy.scale_action(actions)) > 0.999).any()
    assert all(space.contains(action.astype(dtype)) for action in actions)


class Grid(FlattenExtractor):
    """Keeps a tensor that it makes at its first forward pass, as position grids and masks do."""

    def __init__(self, observation_space):
        super().__init__(observation_space)
        self.layer, self.grid = th.nn.Linear(self.features_dim, self.features_dim), None

    def forward(self, observations):
        hidden = self.layer(super().forward(observations))
        if self.grid is None:
            self.grid = th.linspace(0.5, 1.0, self.features_dim)
        return hidden * self.grid


def test_an_extractor_may_keep_what_it_makes_while_acting():
    model = QSM("MlpPolicy", "Pendulum-v1", learning_starts=5, batch_size=8, policy_kwargs={"features_extractor_class": Grid})
    model.predict(np.zeros(3, np.float32))
    model.learn(10)
    assert model._n_updates > 0


def test_deterministic_actions_while_the_policy_is_in_training_mode():
    class Dropping(FlattenExtractor):
        def forward(self, observations):
            return th.nn.functional.dropout(super().forward(observations), training=self.training)

    model = QSM("MlpPolicy", "Pendulum-v1", policy_kwargs={"features_extractor_class": Dropping}, buffer_size=10)
    assert model.policy.train() is model.policy
    assert model.actor.training
    observation = np.ones((50, 3), np.float32)
    first, second = (model.predict(observation, deterministic=True)[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert not model.critic_target.training
    assert not model.policy.eval().critic.training


@pytest.mark.parametrize("device", ["cpu", "cuda", "auto"])
def test_shapes(device):
    if device == "cuda" and not th.cuda.is_available():
        pytest.skip("CUDA not available")
    model = QSM("MlpPolicy", "Pendulum-v1", policy_kwargs={"net_arch": [16]}, buffer_size=10, device=device)
    env = gym.make("Pendulum-v1")
    vec_env = DummyVecEnv([lambda: gym.make("Pendulum-v1")] * 2)
    for deterministic in (True, False):
        action, state = model.predict(env.reset()[0], deterministic=deterministic)
        assert isinstance(action, np.ndarray)
        assert env.action_space.contains(action)
        assert state is None
        assert model.predict(vec_env.reset(), deterministic=deterministic)[0].shape == (2, 1)


def test_mixing_gym_and_vec_env_api():
    model = make_model()
    with pytest.raises(ValueError, match="mixing Gym API"):
        model.predict(model.env.envs[0].reset())


def test_mode_of_all_modules_is_set():
    """As :meth:`torch.nn.Module.train` does it, also where a module has a method of its own."""

    class Frozen(th.nn.BatchNorm1d):
        def train(self, mode=True):
            return super().train(False)

    module = th.nn.Sequential(th.nn.Sequential(th.nn.Dropout(), th.nn.Linear(2, 2)), Frozen(2))
    module.absent = None
    module.register_module("none", None)
    for mode in (False, True):
        set_mode(module, mode)
        found = [each.training for each in module.modules()]
        assert found == [each.training for each in module.train(mode).modules()] == [mode] * 4 + [False]


class ConstantActor(DiffusionActor):
    def forward(self, obs, deterministic=False):
        return th.full((len(obs), self.action_dim), 0.5)


class ConstantPolicy(DiffusionPolicy):
    def make_actor(self, features_extractor=None):
        return ConstantActor(**self._update_features_extractor(self.actor_kwargs, features_extractor)).to(self.device)


def test_forward_of_an_actor_of_ones_own_acts():
    model = QSM(ConstantPolicy, gym.make("Pendulum-v1"), buffer_size=10, device="cpu")
    low, high = model.action_space.low, model.action_space.high
    for deterministic in (False, True):
        action, _ = model.predict(model.observation_space.sample(), deterministic=deterministic)
        np.testing.assert_allclose(action, low + 0.75 * (high - low), rtol=1e-6)


def test_hooks_of_the_actor_are_called():
    model, calls = make_model(), []
    handle = model.actor.register_forward_hook(lambda *args: calls.append(args))
    observation = model.observation_space.sample()
    model.predict(observation)
    assert len(calls) == 1
    handle.remove()
    model.predict(observation)
    assert len(calls) == 1
