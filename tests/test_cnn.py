"""Features extractors: images, shared and separate, batch normalisation, training and evaluation mode."""

from copy import deepcopy

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, FlattenExtractor, NatureCNN
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize, VecTransposeImage, is_vecenv_wrapped
from torch import nn

from sb3_qsm import QSM
from sb3_qsm.common.policies import DiffusionCnnPolicy, DiffusionMultiInputPolicy
from tests.test_run import DummyEnv

SMALL = {"learning_starts": 5, "batch_size": 8, "buffer_size": 50, "diffusion_steps": 3, "device": "cpu", "seed": 0}


def make_env(**kwargs) -> FakeImageEnv:
    return FakeImageEnv(**{"screen_height": 36, "screen_width": 36, "n_channels": 1, "discrete": False, **kwargs})


def make_model(env=None, policy_kwargs=None, policy="CnnPolicy", **kwargs) -> QSM:
    policy_kwargs = {"net_arch": [16], "features_extractor_kwargs": {"features_dim": 8}, **(policy_kwargs or {})}
    model = QSM(policy, env or make_env(), policy_kwargs=policy_kwargs, **{**SMALL, **kwargs})
    model.set_logger(Logger(None, []))
    return model


def changed(before: nn.Module, after: nn.Module) -> set[bool]:
    """Whether parameters differ, each for itself."""
    pairs = zip(before.parameters(), after.parameters(), strict=True)
    return {not th.equal(old, new) for old, new in pairs}


@pytest.mark.parametrize("share_features_extractor", [False, True])
def test_cnn(tmp_path, share_features_extractor):
    env = make_env()
    model = make_model(env, {"share_features_extractor": share_features_extractor}, train_freq=4)
    assert isinstance(model.policy, DiffusionCnnPolicy)
    assert isinstance(model.actor.features_extractor, NatureCNN)
    before = deepcopy(model.policy)
    model.learn(16)
    assert is_vecenv_wrapped(model.get_env(), VecTransposeImage)
    assert changed(before.actor.features_extractor, model.actor.features_extractor) == {True}
    obs, _ = env.reset()  # channels last
    action, _ = model.predict(obs, deterministic=True)
    assert env.action_space.contains(model.predict(obs)[0])
    model.save(tmp_path / "model")
    loaded = QSM.load(tmp_path / "model", env=env)
    np.testing.assert_array_equal(action, loaded.predict(obs, deterministic=True)[0])
    loaded.learn(12)


def test_channels_first():
    env = make_env(channel_first=True)
    model = make_model(env).learn(8)
    assert not is_vecenv_wrapped(model.get_env(), VecTransposeImage)
    assert env.action_space.contains(model.predict(env.reset()[0])[0])


@pytest.mark.parametrize("share_features_extractor", [False, True])
def test_whose_loss_trains_the_features_extractor(share_features_extractor):
    model = make_model(policy_kwargs={"share_features_extractor": share_features_extractor}, learning_starts=100).learn(10)
    shared = model.actor.features_extractor is model.critic.features_extractor
    assert shared == share_features_extractor
    assert model.critic_target.features_extractor is not model.critic.features_extractor
    assert changed(model.critic, model.critic_target) == {False}
    trained = {id(parameter) for parameter in model.critic.optimizer.param_groups[0]["params"]}
    extractor = {id(parameter) for parameter in model.critic.features_extractor.parameters()}
    assert bool(trained & extractor) != share_features_extractor

    batch = model.replay_buffer.sample(8)
    noise = model._draw_noise(batch)
    before = deepcopy(model.policy)
    model._update_critic(batch, noise)
    assert changed(before.critic.qf0, model.critic.qf0) == {True}
    assert changed(before.critic.features_extractor, model.critic.features_extractor) == {not share_features_extractor}
    assert changed(before.actor, model.actor) == {False}

    before = deepcopy(model.policy)
    model._update_actor(batch, noise)
    assert changed(before.actor, model.actor) == {True}
    assert changed(before.critic.qf0, model.critic.qf0) == {False}
    assert changed(before.critic.features_extractor, model.critic.features_extractor) == {share_features_extractor}
    assert changed(before.critic_target, model.critic_target) == {False}


@pytest.mark.parametrize("share_features_extractor", [False, True])
def test_target_follows_the_features_extractor(share_features_extractor):
    model = make_model(policy_kwargs={"share_features_extractor": share_features_extractor}, learning_starts=100).learn(10)
    before = deepcopy(model.policy)
    model.tau = 0.0
    model.train(gradient_steps=1, batch_size=8)
    assert changed(before.critic_target, model.critic_target) == {False}
    assert changed(before.critic, model.critic) == {True}

    before = deepcopy(model.policy)
    model.lr_schedule = lambda _: 0.0
    model.tau = 1.0
    model.train(gradient_steps=1, batch_size=8)
    assert changed(before.critic, model.critic) == {False}
    assert changed(before.critic_target, model.critic_target) == {True}
    assert changed(model.critic, model.critic_target) == {False}


@pytest.mark.parametrize("gradient_critic", ["online", "target", "both"])
def test_each_critic_gets_the_features_of_its_own_extractor(gradient_critic, monkeypatch):
    model = make_model(gradient_critic=gradient_critic, learning_starts=100).learn(10)
    with th.no_grad():
        for parameter in model.critic_target.features_extractor.parameters():
            parameter.add_(0.1 * th.randn_like(parameter))
    batch = model.replay_buffer.sample(4)
    noise = model._draw_noise(batch)
    seen = {}
    for name in ("_critic_step", "_actor_step"):
        update = getattr(model, name)
        monkeypatch.setattr(model, name, lambda *args, n=name, call=update: seen.setdefault(n, args) and call(*args))
    with th.no_grad():
        expected = model.critic_target.features(batch.next_observations)
        online = model.critic.features(batch.next_observations)
    model._update_critic(batch, noise)
    assert th.equal(seen["_critic_step"][2], expected)
    assert not th.allclose(expected, online)
    model._update_actor(batch, noise)
    chosen = {"online": [model.critic], "target": [model.critic_target], "both": [model.critic, model.critic_target]}
    for found, critic in zip(seen["_actor_step"][1], chosen[gradient_critic], strict=True):
        with th.no_grad():
            assert th.allclose(found, critic.features(batch.observations))


@pytest.mark.parametrize("normalize_images", [True, False])
def test_image_normalisation(normalize_images, monkeypatch):
    model = make_model(policy_kwargs={"normalize_images": normalize_images}, learning_starts=100).learn(10)
    seen = []
    forward = NatureCNN.forward
    monkeypatch.setattr(NatureCNN, "forward", lambda self, obs: seen.append(obs.max().item()) or forward(self, obs))
    model.predict(make_env().reset()[0])
    model.train(gradient_steps=1, batch_size=8)
    # One call to act; two each of the actor and of the critics and one of their targets to train
    assert len(seen) == 6
    assert all(0.9 < value <= 1.0 for value in seen) == normalize_images
    assert all(value > 200 for value in seen) != normalize_images


@pytest.mark.parametrize("normalize_images", [True, False])
def test_image_like_input_with_vec_normalize(normalize_images):
    env = VecNormalize(DummyVecEnv([lambda: make_env(channel_first=True)]))
    if normalize_images:  # as in SB3: floats are no image that can be divided by 255
        with pytest.raises(AssertionError, match="image"):
            make_model(env, {"normalize_images": True})
        return
    model = make_model(env, {"normalize_images": False}).learn(10)
    assert model._n_updates == 5


def test_image_in_a_dictionary():
    space = spaces.Dict({"image": spaces.Box(0, 255, (36, 36, 1), np.uint8), "vec": spaces.Box(-1, 1, (2,))})
    env = DummyEnv(space, spaces.Box(-1.0, 1.0, (2,)))
    model = make_model(env, {"features_extractor_kwargs": {"cnn_output_dim": 8}}, "MultiInputPolicy").learn(10)
    assert isinstance(model.policy, DiffusionMultiInputPolicy)
    assert isinstance(model.actor.features_extractor, CombinedExtractor)
    assert model._n_updates == 5
    assert env.action_space.contains(model.predict(env.reset()[0], deterministic=True)[0])


# Batch normalisation, dropout


class BatchNormDropoutExtractor(BaseFeaturesExtractor):
    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space, int(np.prod(observation_space.shape)))
        self.layers = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(self.features_dim), nn.Dropout(0.5))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.layers(observations)


def make_batch_norm_model(share_features_extractor=False, **kwargs) -> QSM:
    policy_kwargs = {
        "features_extractor_class": BatchNormDropoutExtractor,
        "features_extractor_kwargs": {},
        "share_features_extractor": share_features_extractor,
    }
    return make_model("Pendulum-v1", policy_kwargs, "MlpPolicy", **kwargs)


def batch_norm(module: nn.Module) -> nn.BatchNorm1d:
    return module.features_extractor.layers[1]


@pytest.mark.parametrize("share_features_extractor", [False, True])
def test_batch_norm_statistics_are_copied_to_the_target(share_features_extractor):
    model = make_batch_norm_model(share_features_extractor, tau=0.0)
    before = deepcopy(model.policy)
    model.learn(12)
    for name in ("running_mean", "running_var"):
        for module in ("actor", "critic"):
            old, new = (getattr(batch_norm(getattr(policy, module)), name) for policy in (before, model.policy))
            assert not th.isclose(old, new).any()
        # Although the parameters are not, with tau = 0
        online, target = (getattr(batch_norm(module), name) for module in (model.critic, model.critic_target))
        assert th.equal(online, target)
    assert not th.equal(batch_norm(before.critic).bias, batch_norm(model.critic).bias)
    assert th.equal(batch_norm(before.critic_target).bias, batch_norm(model.critic_target).bias)


def test_statistics_do_not_move_while_collecting_or_predicting():
    model = make_batch_norm_model(gradient_steps=0)
    before = deepcopy(model.policy.state_dict())
    model.learn(12)
    obs = model.env.reset()
    first, _ = model.predict(obs, deterministic=True)
    for _ in range(3):
        np.testing.assert_array_equal(first, model.predict(obs, deterministic=True)[0])
    model._action_std()
    after = model.policy.state_dict()
    assert all(th.equal(value, after[name]) for name, value in before.items())


def test_training_and_evaluation_mode(monkeypatch):
    model = make_batch_norm_model()
    seen = {"update": set(), "collect": set()}

    def modes() -> tuple[bool, ...]:
        return tuple(module.training for module in (model.actor, model.critic, model.critic_target))

    update, act = model._update_critic, model.policy._predict
    monkeypatch.setattr(model, "_update_critic", lambda *args: seen["update"].add(modes()) or update(*args))
    monkeypatch.setattr(model.policy, "_predict", lambda *args, **kw: seen["collect"].add(modes()) or act(*args, **kw))
    model.learn(12)
    # The targets are always evaluated
    assert seen == {"update": {(True, True, False)}, "collect": {(False, False, False)}}
    assert batch_norm(model.critic_target).training is False
    model.policy.set_training_mode(True)
    assert modes() == (True, True, False)
    assert batch_norm(model.actor).training
    model.policy.set_training_mode(False)
    assert modes() == (False, False, False)


def test_custom_features_extractor_of_the_mlp_policy():
    model = make_model("Pendulum-v1", {"features_extractor_kwargs": {}}, "MlpPolicy")
    assert isinstance(model.actor.features_extractor, FlattenExtractor)
    assert isinstance(make_batch_norm_model().critic.features_extractor, BatchNormDropoutExtractor)
