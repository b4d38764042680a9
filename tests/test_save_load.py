"""Saving and loading models, policies, actors and replay buffers."""

import io
import math
import pathlib
import pickle
import warnings
from copy import deepcopy

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv, FakeImageEnv, IdentityEnvBox
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_qsm import QSM
from sb3_qsm.common.policies import DiffusionActor, DiffusionPolicy

SMALL = {"learning_starts": 5, "batch_size": 8, "buffer_size": 200, "diffusion_steps": 3, "device": "cpu"}


def make_env(n_envs: int = 1) -> DummyVecEnv:
    return DummyVecEnv([lambda: IdentityEnvBox(-10, 10)] * n_envs)


def make_model(env=None, policy="MlpPolicy", **kwargs) -> QSM:
    policy_kwargs = {"net_arch": [16], **kwargs.pop("policy_kwargs", {})}
    return QSM(policy, env or make_env(), policy_kwargs=policy_kwargs, **{**SMALL, **kwargs})


def flatten(values, prefix=""):
    if isinstance(values, (dict, list, tuple)):
        for key, value in values.items() if isinstance(values, dict) else enumerate(values):
            yield from flatten(value, f"{prefix}{key}.")
    else:
        yield prefix, values


def state(model: QSM) -> dict:
    """All parameters, both optimizers and the running mean of the gradient, by name."""
    return dict(flatten(deepcopy({**model.get_parameters(), "q_grad_norm": model.q_grad_norm})))


def differences(first: dict, second: dict) -> list[str]:
    """Names of the entries that are not equal bit for bit."""
    assert first.keys() == second.keys()
    return [
        name
        for name, value in first.items()
        if not (th.equal(value, second[name]) if isinstance(value, th.Tensor) else value == second[name])
    ]


def observations(env, n: int = 10) -> np.ndarray:
    return np.stack([env.observation_space.sample() for _ in range(n)])


# Models


@pytest.mark.parametrize("form", ["str", "path", "bytes", "without_suffix"])
def test_save_load(tmp_path, form):
    model = make_model(learning_rate=1e-3).learn(20)
    obs = observations(model.env)
    actions, _ = model.predict(obs, deterministic=True)
    where = {"str": str(tmp_path / "model.zip"), "path": tmp_path / "model.zip", "without_suffix": tmp_path / "model"}
    target = where.get(form) or io.BytesIO()
    model.save(target)
    if form == "bytes":
        target.seek(0)
    loaded = QSM.load(target, env=make_env())
    assert differences(state(model), state(loaded)) == []
    assert state(model)["actor.optimizer.state.0.step."] == 15
    assert loaded.q_grad_norm > 0
    assert loaded.num_timesteps == 20
    np.testing.assert_array_equal(actions, loaded.predict(obs, deterministic=True)[0])
    before = state(loaded)
    loaded.learn(20)
    assert any(name.startswith("policy.actor.") for name in differences(before, state(loaded)))


def test_get_and_set_parameters():
    model = make_model().learn(10)
    original = deepcopy(model.get_parameters())
    assert set(original) == {"policy", "actor.optimizer", "critic.optimizer"}
    with pytest.raises(ValueError, match="invalid"):
        model.set_parameters({**original, "invalid": {}}, exact_match=False)
    with pytest.raises(ValueError, match="do not match"):
        model.set_parameters({"policy": original["policy"]}, exact_match=True)
    incomplete = {**original, "policy": dict(list(original["policy"].items())[:-1])}
    with pytest.raises(RuntimeError, match="Missing key"):
        model.set_parameters(incomplete, exact_match=True)

    *names, last = original["policy"]
    random = {"policy": {name: th.rand_like(original["policy"][name]) for name in names}}
    model.set_parameters(random, exact_match=False)
    new = model.get_parameters()["policy"]
    assert all(th.equal(new[name], random["policy"][name]) for name in names)
    assert th.equal(new[last], original["policy"][last])
    # Training goes on with the new parameters
    model.set_logger(Logger(None, []))
    model.train(gradient_steps=1, batch_size=8)
    assert not th.equal(
        model.actor.score_network.input_layer.weight, random["policy"]["actor.score_network.input_layer.weight"]
    )


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"actor_learning_rate": lambda progress: 1e-3 * (1.0 + progress), "policy_delay": 2},
        {"n_steps": 1},
        {"policy_kwargs": {"optimizer_class": th.optim.AdamW, "layer_norm": True}, "gradient_critic": "online"},
    ],
    ids=["defaults", "schedule", "n_steps", "policy"],
)
def test_updates_after_load_are_those_without_it(tmp_path, kwargs):
    model = make_model(seed=1, **kwargs).learn(25)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")

    def go_on(model: QSM) -> dict:
        np.random.seed(4)
        th.manual_seed(4)
        model.set_logger(Logger(None, []))
        model.train(gradient_steps=4, batch_size=8)
        return state(model)

    def load() -> QSM:
        loaded = QSM.load(tmp_path / "model", env=make_env(), device="cpu")
        loaded.load_replay_buffer(tmp_path / "buffer")
        return loaded

    assert load().replay_buffer.size() == 25
    expected = go_on(model)
    assert differences(expected, go_on(load())) == []

    # Each part of the state matters for that
    forgetful = load()
    forgetful.q_grad_norm.zero_()
    assert any(name.startswith("policy.actor.") for name in differences(expected, go_on(forgetful)))
    for name in ("actor", "critic"):
        forgetful = load()
        optimizer = getattr(forgetful, name).optimizer
        optimizer.state.clear()
        assert any(key.startswith(f"policy.{name}.") for key in differences(expected, go_on(forgetful)))


def test_actor_learning_rate_schedule_survives(tmp_path):
    model = make_model(learning_rate=1e-3, actor_learning_rate=lambda progress: 1e-2 * progress).learn(20)
    model.save(tmp_path / "model")
    model = QSM.load(tmp_path / "model", env=make_env())
    assert model.actor_lr_schedule(0.5) == pytest.approx(5e-3)
    assert model.lr_schedule(0.5) == 1e-3
    model.learn(20)
    # The last rollout starts at 19 of 20 steps
    assert model.actor.optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * model._current_progress_remaining, abs=1e-9)
    assert model.critic.optimizer.param_groups[0]["lr"] == 1e-3


def test_hyperparameters_survive_and_can_be_replaced(tmp_path):
    arguments = {
        "noise_schedule": "vp",
        "sampler": "ddim",
        "sampling_temperature": 0.5,
        "score_target": "noised",
        "temperature": 0.7,
        "q_grad_coef": 3.0,
        "target_policy_noise": 0.2,
        "gradient_critic": "online",
        "critic_reduction": "min",
        "policy_delay": 2,
        "target_update_interval": 3,
        "best_of_n": 2,
        "exploration_noise": 0.3,
        "tau": 0.5,
        "gamma": 0.5,
    }
    make_model(**arguments).save(tmp_path / "model")
    model = QSM.load(tmp_path / "model")
    assert {name: getattr(model, name) for name in arguments} == arguments
    assert model.policy.best_of_n == 2
    assert model.actor.sampler == "ddim"
    assert model.actor.schedule.name == "vp"
    assert model._actor_step.loss.critics[0] is model.critic

    model = QSM.load(tmp_path / "model", gamma=0.9, sampler="ddpm", best_of_n=3, gradient_critic="target")
    assert model.gamma == 0.9
    assert model.actor.sampler == "ddpm"
    assert model.policy.best_of_n == 3
    assert model._actor_step.loss.critics[0] is model.critic_target
    with pytest.raises(ValueError, match="specified policy kwargs do not equal"):
        QSM.load(tmp_path / "model", policy_kwargs={"net_arch": [8]})


def test_exclude_include_and_custom_objects(tmp_path):
    model = make_model(verbose=2, actor_learning_rate=1e-3)
    model.save(tmp_path / "model", exclude=["verbose"])
    assert QSM.load(tmp_path / "model").verbose == 0
    model.save(tmp_path / "model", exclude=["verbose"], include=["verbose"])
    model = QSM.load(
        tmp_path / "model", custom_objects={"learning_rate": 2e-5, "actor_learning_rate": lambda _: 7e-6, "dummy": 1.0}
    )
    assert model.verbose == 2
    assert model.learning_rate == model.lr_schedule(1.0) == 2e-5
    assert model.actor_lr_schedule(1.0) == 7e-6
    assert not hasattr(model, "dummy")


def her_model() -> QSM:
    env = DummyVecEnv([lambda: BitFlippingEnv(n_bits=3, continuous=True)])
    return make_model(env, "MultiInputPolicy", replay_buffer_class=HerReplayBuffer)


@pytest.mark.parametrize(
    "make",
    [
        make_model,
        lambda: make_model(n_steps=1),
        lambda: make_model(actor_learning_rate=lambda progress: 1e-3 * progress),
        her_model,
    ],
    ids=["defaults", "n_steps", "schedule", "her"],
)
def test_no_warnings(tmp_path, make):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = make()
        model.learn(15)
        model.save(tmp_path / "model")
        model.save_replay_buffer(tmp_path / "buffer")
        loaded = QSM.load(tmp_path / "model", env=model.env)
        loaded.load_replay_buffer(tmp_path / "buffer", truncate_last_traj=False)
        loaded.learn(10, reset_num_timesteps=False)
    assert loaded.num_timesteps == 25
    assert type(loaded.replay_buffer) is type(model.replay_buffer)


def test_compiled_policy(tmp_path):
    model = make_model().learn(10)
    before = state(model)
    model.policy = th.compile(model.policy)
    model.save(tmp_path / "model")
    loaded = QSM.load(tmp_path / "model", env=make_env())
    assert differences(before, state(loaded)) == []
    loaded.learn(10)


@pytest.mark.parametrize("best_of_n", [1, 4])
def test_every_device(tmp_path, best_of_n):
    make_model(best_of_n=best_of_n).learn(10).save(tmp_path / "model")
    for device in ["auto", "cpu", *(["cuda"] if th.cuda.is_available() else [])]:
        model = QSM.load(tmp_path / "model", env=make_env(), device=device)
        device_type = model.device.type
        assert device == "auto" or device_type == device
        tensors = [*model.policy.parameters(), *model.policy.buffers(), model.q_grad_norm]
        assert {tensor.device.type for tensor in tensors} == {device_type}
        model.learn(10)
        assert math.isfinite(model.q_grad_norm)


# Environments


def test_set_env(tmp_path):
    env = make_env()
    model = make_model(env).learn(12)
    model.set_env(make_env(), force_reset=True)
    assert model._last_obs is None
    model.learn(12)
    assert model.num_timesteps == 12
    model.set_env(IdentityEnvBox(-10, 10))
    model.learn(12)
    with pytest.raises(AssertionError, match="number of environments"):
        model.set_env(make_env(2))
    with pytest.raises(ValueError, match="spaces do not match"):
        model.set_env(DummyVecEnv([lambda: IdentityEnvBox(-1, 10)]))
    model.set_env(model.get_env(), force_reset=False)
    assert model._last_obs is not None
    model.learn(12, reset_num_timesteps=False)
    assert model.num_timesteps == 24

    current_env = model.get_env()
    model.save(tmp_path / "model")
    # The environment kept its state
    model = QSM.load(tmp_path / "model", env=current_env, force_reset=False)
    assert model._last_obs is not None
    model.learn(12, reset_num_timesteps=False)
    assert model.num_timesteps == 36
    model = QSM.load(tmp_path / "model", env=make_env(), force_reset=True)
    assert model._last_obs is None
    model.learn(12, reset_num_timesteps=False)
    assert model.num_timesteps == 36


def test_load_from_one_to_two_envs_and_back(tmp_path):
    make_model().learn(12).save(tmp_path / "model")
    model = QSM.load(tmp_path / "model", env=make_env(2))
    assert model.n_envs == model.replay_buffer.n_envs == 2
    before = state(model)
    model.learn(12)
    assert model.replay_buffer.actions.shape[1] == 2
    assert any(name.startswith("policy.actor.") for name in differences(before, state(model)))
    model.save(tmp_path / "model")
    model = QSM.load(tmp_path / "model", env=make_env(1))
    assert model.n_envs == 1
    model.learn(12)
    assert model.replay_buffer.pos == 12


# Replay buffers


@pytest.mark.parametrize("form", [str, pathlib.Path])
def test_replay_buffer(tmp_path, form):
    path = form(tmp_path / "buffer.pkl")
    model = make_model(gym.make("Pendulum-v1", max_episode_steps=5)).learn(25)
    old = deepcopy(model.replay_buffer)
    assert old.timeouts.sum() == 5
    model.save_replay_buffer(path)
    model.replay_buffer = None
    model.load_replay_buffer(path)
    assert model.replay_buffer.device == model.device
    for name in ("observations", "next_observations", "actions", "rewards", "dones", "timeouts"):
        np.testing.assert_array_equal(getattr(old, name), getattr(model.replay_buffer, name))
    model.learn(10, reset_num_timesteps=False)
    assert model.replay_buffer.pos == 35


def test_another_replay_buffer(tmp_path):
    model = make_model(gym.make("Pendulum-v1"), n_steps=1).learn(7)
    model.save_replay_buffer(tmp_path / "buffer")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_replay_buffer(tmp_path / "buffer")
    # The episode of the buffer's last row is none that the environment goes on with
    model.learn(4, reset_num_timesteps=False)
    buffer = model.replay_buffer
    np.testing.assert_array_equal(buffer.dones[:11, 0], [0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(buffer.timeouts[:11, 0], buffer.dones[:11, 0])

    longer = make_model(gym.make("Pendulum-v1"))
    with pytest.warns(UserWarning, match="has returns of n_steps=1, .* made with n_steps=3"):
        longer.load_replay_buffer(tmp_path / "buffer")
    other = make_model()
    before = other.replay_buffer
    with pytest.raises(ValueError, match=r"replay buffer must be of Box\(-1.* got Box\(\[-1"):
        other.load_replay_buffer(tmp_path / "buffer")
    assert other.replay_buffer is before


def test_a_replay_buffer_of_another_number_of_environments(tmp_path):
    two = make_model(make_vec_env("Pendulum-v1", n_envs=2)).learn(8)
    two.save_replay_buffer(tmp_path / "buffer")
    one = make_model(gym.make("Pendulum-v1"))
    one.load_replay_buffer(tmp_path / "buffer")
    with pytest.raises(ValueError, match="as many environments as the model has, 1, got one of 2"):
        one.learn(4)
    # What it is for is still there
    assert one.num_timesteps == 0 and one.replay_buffer.pos == 4
    one.set_logger(Logger(None, []))
    one.train(gradient_steps=1, batch_size=4)


class Flat(ReplayBuffer):
    """One row for each transition, whatever the number of environments."""

    def __init__(self, *args, n_envs=1, **kwargs):
        super().__init__(*args, n_envs=1, **kwargs)

    def add(self, obs, next_obs, action, reward, done, infos):
        for rows in zip(obs, next_obs, action, reward, done, infos, strict=True):
            super().add(*rows[:-1], [rows[-1]])


def test_a_replay_buffer_that_stores_the_steps_of_any_number_of_environments():
    model = make_model(make_vec_env("Pendulum-v1", n_envs=2), replay_buffer_class=Flat).learn(8)
    assert model.replay_buffer.n_envs == 1 and model.replay_buffer.pos == 8


def test_what_acts_is_saved(tmp_path):
    model = make_model(best_of_n=2)
    model.policy.best_of_n, model.actor.sampling_steps = 5, 2
    model.policy.save(tmp_path / "policy")
    policy = type(model.policy).load(tmp_path / "policy")
    model.save(tmp_path / "model")
    for found in (policy, QSM.load(tmp_path / "model").policy):
        assert (found.best_of_n, found.actor.sampling_steps) == (5, 2)


def test_another_optimizer(tmp_path):
    model = make_model().learn(10)
    old = {name: getattr(model, name).optimizer for name in ("actor", "critic")}
    steps = {name: int(next(iter(optimizer.state.values()))["step"]) for name, optimizer in old.items()}
    for name in old:
        network = getattr(model, name)
        network.optimizer = th.optim.Adam(old[name].param_groups[0]["params"], betas=(0.5, 0.9))
    model.learn(5, reset_num_timesteps=False)
    for name, optimizer in old.items():
        assert int(next(iter(optimizer.state.values()))["step"]) == steps[name]
        assert len(getattr(model, name).optimizer.state) == len(optimizer.state)
    model.save(tmp_path / "model")
    loaded = QSM.load(tmp_path / "model", env=make_env())
    assert loaded.actor.optimizer.param_groups[0]["betas"] == (0.5, 0.9)
    loaded.learn(5, reset_num_timesteps=False)
    loaded.critic.optimizer = th.optim.SGD(loaded.critic.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="must be of the policy's optimizer_class Adam, got SGD"):
        loaded.learn(5, reset_num_timesteps=False)


def test_her_replay_buffer(tmp_path):
    model = her_model().learn(20)
    old = model.replay_buffer
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = QSM.load(tmp_path / "model", env=model.env)
    loaded.load_replay_buffer(tmp_path / "buffer", truncate_last_traj=False)
    for key, values in old.observations.items():
        np.testing.assert_array_equal(values, loaded.replay_buffer.observations[key])
    loaded.set_logger(Logger(None, []))
    loaded.train(gradient_steps=1, batch_size=8)
    assert math.isfinite(loaded.logger.name_to_value["train/critic_loss"])


@pytest.mark.parametrize("optimize_memory_usage", [False, True])
def test_warning_about_the_last_trajectory(recwarn, optimize_memory_usage):
    model = make_model(
        optimize_memory_usage=optimize_memory_usage,
        replay_buffer_kwargs={"handle_timeout_termination": not optimize_memory_usage},
    )
    model.learn(12)
    model.learn(12, reset_num_timesteps=False)
    assert len(recwarn) == 0
    model.learn(12)
    messages = [str(warning.message) for warning in recwarn]
    assert len(messages) == optimize_memory_usage
    assert all("The last trajectory in the replay buffer will be truncated" in message for message in messages)


# Policies and actors


@pytest.mark.parametrize(
    "policy_kwargs",
    [
        {},
        {
            "net_arch": {"pi": [8], "qf": [16, 8]},
            "activation_fn": th.nn.Mish,
            "critic_activation_fn": th.nn.Tanh,
            "layer_norm": True,
            "critic_layer_norm": False,
            "n_critics": 3,
            "fourier_dim": 8,
            "time_arch": (4,),
            "optimizer_class": th.optim.AdamW,
            "optimizer_kwargs": {"eps": 1e-5},
            "share_features_extractor": True,
            "xavier": True,
        },
    ],
    ids=["defaults", "all"],
)
@pytest.mark.parametrize("image", [False, True])
def test_policy_and_actor_alone(tmp_path, policy_kwargs, image):
    env = (
        DummyVecEnv([lambda: FakeImageEnv(screen_height=36, screen_width=36, n_channels=1, discrete=False)])
        if image
        else make_env()
    )
    if image:
        policy_kwargs = {**policy_kwargs, "normalize_images": True, "features_extractor_kwargs": {"features_dim": 8}}
    model = make_model(
        env,
        "CnnPolicy" if image else "MlpPolicy",
        policy_kwargs=policy_kwargs,
        sampler="ddpm",
        noise_schedule="vp",
        sampling_temperature=0.5,
        best_of_n=2,
    )
    policy = model.policy
    policy.load_state_dict({name: th.rand_like(value) - 0.5 for name, value in policy.state_dict().items()})
    obs = observations(env, 4)
    policy.save(tmp_path / "policy.pkl")
    policy.actor.save(tmp_path / "actor.pkl")
    loaded = type(policy).load(tmp_path / "policy.pkl", device="cpu")
    actor = DiffusionActor.load(tmp_path / "actor.pkl", device="cpu")
    assert isinstance(loaded, DiffusionPolicy)

    for old, new in ((policy, loaded), (policy.actor, actor)):
        assert differences(old.state_dict(), new.state_dict()) == []
        ours, theirs = (module._get_constructor_parameters() for module in (old, new))
        for parameters in (ours, theirs):  # the one is a function, the other a module
            parameters.pop("lr_schedule", None)
            parameters.pop("features_extractor", None)
        assert ours == theirs
        for deterministic in (True, False):
            th.manual_seed(0)
            expected, _ = old.predict(obs, deterministic=deterministic)
            th.manual_seed(0)
            np.testing.assert_array_equal(expected, new.predict(obs, deterministic=deterministic)[0])
    assert loaded.optimizer_kwargs == policy.optimizer_kwargs
    assert [type(layer) for layer in loaded.modules()] == [type(layer) for layer in policy.modules()]


def test_constructor_parameters_are_complete():
    model = make_model()
    for module in (model.policy, model.actor):
        arguments = set(module._get_constructor_parameters())
        parameters = type(module).__init__.__code__
        assert arguments == set(parameters.co_varnames[1 : parameters.co_argcount])


def test_loaded_model_does_not_keep_the_old_one_alive(tmp_path):
    """Parameters are copied, not shared, between two models of the same file."""
    make_model(make_vec_env("Pendulum-v1")).learn(8).save(tmp_path / "model")
    first, second = (QSM.load(tmp_path / "model", env=make_vec_env("Pendulum-v1")) for _ in range(2))
    before = state(second)
    first.learn(10)
    assert differences(before, state(second)) == []
    assert differences(before, state(first)) != []


def test_goals_are_rewarded_by_the_new_environment():
    model = her_model()
    model.learn(15)
    env = DummyVecEnv([lambda: BitFlippingEnv(n_bits=3, continuous=True)])
    model.set_env(env)
    assert model.replay_buffer.env is model.env is env
    model.learn(10, reset_num_timesteps=False)


def test_rows_with_other_goals_get_both_roles_in_the_actors_batch():
    """`HerReplayBuffer` puts the rows with their own goals first; the actor's own actions are not taken at those alone."""
    model = her_model()
    model.learn(40)
    batch = model._sample_batch(64)
    again = model.replay_buffer.sample
    th.manual_seed(0)
    np.random.seed(0)
    in_order = again(64)
    th.manual_seed(0)
    np.random.seed(0)
    mixed = model._sample_batch(64)
    assert not th.equal(in_order.actions, mixed.actions)
    assert th.equal(in_order.actions.sort(dim=0).values, mixed.actions.sort(dim=0).values)
    assert batch.actions.shape == (64, 3)


def test_misspelt_argument_at_loading(tmp_path):
    make_model().save(tmp_path / "model")
    with pytest.raises(TypeError, match="QSM has no argument 'prior_sdt'; did you mean 'prior_std'"):
        QSM.load(tmp_path / "model", prior_sdt=1.0)
    # Arguments, and what is in the file
    assert QSM.load(tmp_path / "model", prior_std=1.0, num_timesteps=7).num_timesteps == 7


@pytest.mark.parametrize("kwargs", [{}, {"compile": True}, {"critic_reduction": "min"}])
def test_pickled_models_train_on_alike(kwargs):
    """As Stable-Baselines3's can be sent to another process; what is compiled is compiled there."""
    model = make_model(seed=0, **kwargs)
    model.learn(5 if kwargs.get("compile") else 10)
    loaded = pickle.loads(pickle.dumps(model))
    results = []
    for each in (model, loaded):
        th.manual_seed(0)
        np.random.seed(0)
        if not each.compile:
            each.train(3, 8)
        results.append(dict(each.policy.state_dict()))
    assert all(th.equal(value, results[1][name]) for name, value in results[0].items())
    assert loaded._actor_step.network is loaded.actor
    assert loaded._critic_step.compiled == model.compile
