"""Learning from data that is already there."""

import copy
import sys

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_qsm import QSM, offline
from sb3_qsm.common.buffers import DictNStepReplayBuffer
from sb3_qsm.common.losses import noise_prediction_loss
from tests.envs import SpacesEnv

# It would like to know who made a dataset, and in which environment
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:minari")

BOX = spaces.Box(-1, 1, (3,))
DICT = spaces.Dict({"a": spaces.Box(-1, 1, (2,)), "b": spaces.Discrete(3)})
IMAGE = spaces.Box(0, 255, (36, 38, 3), np.uint8)
ACTION = spaces.Box(np.array([-1.0, 2.0], np.float32), np.array([3.0, 2.5], np.float32))
POLICIES = {"MlpPolicy": BOX, "MultiInputPolicy": DICT, "CnnPolicy": IMAGE}
SMALL = {"buffer_size": 100, "batch_size": 8, "diffusion_steps": 2, "learning_starts": 0, "seed": 0}


def make_model(policy="MlpPolicy", wrapper=lambda env: env, **kwargs):
    env = wrapper(DummyVecEnv([lambda: SpacesEnv(POLICIES[policy], ACTION)] * kwargs.pop("n_envs", 1)))
    policy_kwargs = {"net_arch": [8], **kwargs.pop("policy_kwargs", {})}
    if policy == "CnnPolicy":
        policy_kwargs["features_extractor_kwargs"] = {"features_dim": 4}
    return QSM(policy, env, policy_kwargs=policy_kwargs, **{**SMALL, **kwargs})


def sample(space, n):
    found = [space.sample() for _ in range(n)]
    return (
        {key: np.stack([row[key] for row in found]) for key in found[0]} if isinstance(space, spaces.Dict) else np.stack(found)
    )


def episodes(space=BOX, lengths=(4, 3, 2), ends=("terminated", "truncated", None)):
    """What Minari's recorder hands over."""
    collector = pytest.importorskip("minari.data_collector", reason="needs pip install 'sb3-qsm[offline]'")
    space.seed(0)
    ACTION.seed(0)
    for length, end in zip(lengths, ends, strict=True):
        flags = [False] * (length - 1)
        yield collector.EpisodeBuffer(
            observations=sample(space, length + 1),
            actions=sample(ACTION, length),
            rewards=list(np.random.default_rng(length).normal(size=length)),
            terminations=[*flags, end == "terminated"],
            truncations=[*flags, end == "truncated"],
        )


@pytest.fixture
def make_dataset(tmp_path, monkeypatch):
    """Make a local dataset of Minari."""
    minari = pytest.importorskip("minari", reason="needs pip install 'sb3-qsm[offline]'")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))

    def make(space=BOX, name="test/some-v0", **kwargs):
        return minari.create_dataset_from_buffers(
            name, list(episodes(space, **kwargs)), observation_space=space, action_space=ACTION, jpeg_encoding=False
        )

    return make


@pytest.mark.parametrize("n_steps", [1, 3])
@pytest.mark.parametrize("policy", POLICIES)
def test_minari(make_dataset, policy, n_steps):
    model = make_model(policy, n_steps=n_steps)
    space = POLICIES[policy]
    make_dataset(space)
    model.load_offline("test/some-v0")
    buffer = model._offline.buffer
    is_dict = policy == "MultiInputPolicy"
    kinds = {1: (ReplayBuffer, DictReplayBuffer), 3: (NStepReplayBuffer, DictNStepReplayBuffer)}
    assert type(buffer) is kinds[n_steps][is_dict]
    assert buffer.size() == 9
    np.testing.assert_array_equal(buffer.dones[:, 0], [0, 0, 0, 1, 0, 0, 1, 0, 1])
    # The last episode was cut: nothing is known to have ended there
    np.testing.assert_array_equal(buffer.timeouts[:, 0], [0, 0, 0, 0, 0, 0, 1, 0, 1])
    start = 0
    for episode in episodes(space):
        rows = slice(start, start + len(episode.rewards))
        np.testing.assert_allclose(buffer.rewards[rows, 0], episode.rewards, rtol=1e-6)
        np.testing.assert_allclose(model.policy.unscale_action(buffer.actions[rows, 0]), episode.actions, atol=1e-6)
        for name, part in (("observations", slice(None, -1)), ("next_observations", slice(1, None))):
            found, expected = getattr(buffer, name), episode.observations
            if not is_dict:
                found, expected = {"": found}, {"": expected}
            for key, value in expected.items():
                value = value.transpose(0, 3, 1, 2) if policy == "CnnPolicy" else value
                np.testing.assert_array_equal(found[key][rows, 0].reshape(value[part].shape), value[part])
        start += len(episode.rewards)
    updates = copy.deepcopy(model.policy.state_dict())
    model.pretrain(3)
    assert model._n_updates == 3
    assert any(not th.equal(value, updates[name]) for name, value in model.policy.state_dict().items())


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("kind", ["plain", "memory", "dict", "n_step"])
def test_replay_buffer(kind, full):
    """The same transitions, in their order, environment by environment."""
    policy = "MultiInputPolicy" if kind == "dict" else "MlpPolicy"
    changes = {"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}}
    changes = {"n_steps": 3 if kind == "n_step" else 1, **(changes if kind == "memory" else {})}
    source = make_model(policy, n_envs=2, buffer_size=20, learning_starts=1000, **changes)
    source.learn(26 if full else 12)
    found = source.replay_buffer
    assert found.full == full
    model = make_model(policy, n_steps=1)
    model.load_offline(found)
    buffer = model._offline.buffer
    order = [3, 4, 5, 6, 7, 8, 9, 0, 1, 2] if full else list(range(6))
    if kind == "memory" and full:
        order = order[1:]
    assert buffer.size() == 2 * len(order)
    for env in (0, 1):
        rows = slice(env * len(order), (env + 1) * len(order))
        np.testing.assert_array_equal(buffer.rewards[rows, 0], found.rewards[order, env])
        np.testing.assert_array_equal(buffer.actions[rows, 0], found.actions[order, env])
        keys = DICT.spaces if kind == "dict" else [None]
        for key in keys:
            ours, theirs = ((b.observations, getattr(b, "next_observations", None)) for b in (buffer, found))
            if key is not None:
                ours, theirs = ([part[key] for part in side] for side in (ours, theirs))
            np.testing.assert_array_equal(ours[0][rows, 0], theirs[0][order, env])
            following = theirs[0][[(i + 1) % 10 for i in order], env] if kind == "memory" else theirs[1][order, env]
            np.testing.assert_array_equal(ours[1][rows, 0], following)
        # The buffer of little memory does not know time-outs
        dones, timeouts = found.dones[order, env].copy(), found.timeouts[order, env].copy()
        timeouts[-1] = max(timeouts[-1], 1 - dones[-1])
        dones[-1] = 1
        np.testing.assert_array_equal(buffer.dones[rows, 0], dones)
        np.testing.assert_array_equal(buffer.timeouts[rows, 0], timeouts)


def test_returns_of_many_steps_end_with_the_episode(make_dataset):
    model = make_model(n_steps=3, gamma=0.5)
    model.load_offline(make_dataset())
    buffer = model._offline.buffer
    batch = buffer._get_samples(np.arange(9))
    rewards = buffer.rewards[:, 0]
    np.testing.assert_allclose(batch.discounts[:, 0], [1 / 8, 1 / 8, 1 / 4, 1 / 2, 1 / 8, 1 / 4, 1 / 2, 1 / 4, 1 / 2])
    np.testing.assert_array_equal(batch.dones[:, 0], [0, 1, 1, 1, 0, 0, 0, 0, 0])
    np.testing.assert_allclose(batch.rewards[4, 0], rewards[4] + rewards[5] / 2 + rewards[6] / 4, rtol=1e-5)
    np.testing.assert_allclose(batch.rewards[7, 0], rewards[7] + rewards[8] / 2, rtol=1e-5)


def fill(model, n, reward=0.0, actions=None, seed=0):
    """A replay buffer of single steps."""
    generator = np.random.default_rng(seed)
    buffer = ReplayBuffer(n, model.observation_space, model.action_space)
    actions = generator.uniform(-1, 1, (n, 2)) if actions is None else actions
    rewards = reward(actions) if callable(reward) else np.full(n, reward)
    for action, value in zip(actions, rewards, strict=True):
        obs = generator.uniform(-1, 1, (1, 3))
        buffer.add(obs, obs, action[None], np.array([value]), np.array([True]), [{}])
    return buffer


@pytest.mark.filterwarnings("ignore:.*is ignored because a custom")
def test_share_of_the_batch():
    model = make_model(learning_starts=100, n_steps=1, batch_size=10)
    model.learn(20)
    for share, expected in [(0.0, 0), (0.5, 5), (0.72, 7), (1.0, 10)]:
        model.load_offline(fill(model, 20, reward=100.0), share=share)
        batch = model._sample_batch(10)
        assert batch.actions.shape == (10, 2)
        assert int((batch.rewards == 100.0).sum()) == expected
    # Buffers of one step have no discounts, others do
    model = make_model(n_steps=3, learning_starts=100, gamma=0.5, replay_buffer_class=ReplayBuffer)
    model.learn(20)
    model.load_offline(fill(model, 20, reward=100.0))
    batch = model._sample_batch(8)
    np.testing.assert_array_equal(batch.discounts, np.full((8, 1), 0.5))


def test_both_kinds_of_rows_get_both_roles_in_the_actors_batch():
    """Data and replayed rows are mixed, so that the actor learns from both at replayed and at its own actions."""
    model = make_model(learning_starts=100, n_steps=1, policy_samples=0.5)
    model.learn(40)
    model.load_offline(fill(model, 40, reward=100.0))
    batch = model._sample_batch(64)
    used = model._actor_batch(batch, th.full_like(batch.actions, 2.0))
    own, from_data = (used.actions == 2.0).all(dim=1), (batch.rewards == 100.0).flatten()
    assert int(own.sum()) == int(from_data.sum()) == 32
    for role in (own, ~own):
        assert 6 <= int((role & from_data).sum()) <= 26
    # The rows are whole
    for row in range(64):
        buffer = model._offline.buffer if from_data[row] else model.replay_buffer
        match = (buffer.observations[:, 0] == batch.observations[row].numpy()).all(axis=-1).nonzero()[0]
        assert any(np.allclose(buffer.actions[i, 0], batch.actions[row], atol=1e-6) for i in match)


def test_no_share_has_no_behaviour_term():
    model = make_model()
    model.load_offline(fill(model, 10), share=0.0, behaviour=0.8)
    assert model._behaviour() is None


def test_gamma_of_the_data_follows_the_models():
    model = make_model(n_steps=3)
    model.load_offline(fill(model, 30), share=1.0)
    model.gamma = 0.5
    assert set(model._sample_batch(30).discounts.flatten().tolist()) <= {0.5, 0.25, 0.125}


def test_data_of_two_trainings_has_a_break_between_them():
    """SB3 marks nothing where `learn` resets the environments."""
    env = DummyVecEnv([lambda: SpacesEnv(BOX, ACTION)])
    sac = SAC("MlpPolicy", env, buffer_size=100, learning_starts=100, policy_kwargs={"net_arch": [4]})
    sac.learn(5)
    sac.learn(5)
    assert not sac.replay_buffer.dones.any()
    model = make_model()
    model.load_offline(sac.replay_buffer)
    data = model._offline.buffer
    assert data.timeouts[:, 0].nonzero()[0].tolist() == data.dones[:, 0].nonzero()[0].tolist() == [4, 9]


def test_statistics_of_large_and_repeated_data():
    model = make_model(wrapper=VecNormalize)
    env = model.get_vec_normalize_env()
    buffer = fill(model, 100)
    model.load_offline(buffer)
    count = env.obs_rms.count
    model.load_offline(buffer, update_statistics=False)
    assert env.obs_rms.count == count
    model.load_offline(buffer)
    assert env.obs_rms.count == count + 100

    values = (1000.0 + 0.1 * np.random.default_rng(0).standard_normal((300_000, 3))).astype(np.float32)
    stream = offline.Stream(values, values, values, np.zeros(len(values)), np.zeros(len(values)), np.zeros(len(values)))
    fresh = make_model(wrapper=VecNormalize).get_vec_normalize_env()
    fresh.obs_rms.count = 0
    offline._update_statistics(fresh, stream)
    np.testing.assert_allclose(fresh.obs_rms.mean, values.astype(np.float64).mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(np.sqrt(fresh.obs_rms.var), 0.1, rtol=0.01)


def losses(model, behaviour):
    """Loss of the actor on a fixed batch, and what it is made of."""
    th.manual_seed(0)
    model.actor.set_training_mode(True)
    loss = model._actor_step.loss
    actions, features = th.rand(6, 2) * 2 - 1, th.rand(6, 3)
    noise = model._draw_noise(type("Batch", (), {"actions": actions}))
    arguments = (features, [features], actions, noise, th.tensor(1.0), th.tensor(0.1), None, None)
    value, _ = loss(*arguments, None if behaviour is None else th.tensor(behaviour))
    gradient = th.cat([g.flatten() for g in th.autograd.grad(value, list(model.actor.score_network.parameters()))])
    noisy = model.actor.schedule.add_noise(actions, noise.eps, noise.t)
    cloning = noise_prediction_loss(model.actor.predict_noise(features, noisy, noise.t), noise.eps)
    cloning = th.cat([g.flatten() for g in th.autograd.grad(cloning, list(model.actor.score_network.parameters()))])
    return value, gradient, cloning


def test_loss_is_the_weighted_sum():
    model = make_model()
    value, gradient, cloning = losses(model, None)
    assert losses(model, 0.0)[0] == value
    th.testing.assert_close(losses(model, 1.0)[1], cloning)
    th.testing.assert_close(losses(model, 0.3)[1], 0.3 * cloning + 0.7 * gradient)
    assert (cloning - gradient).norm() > 0.1 * gradient.norm()


def test_weight_falls():
    model = make_model()
    assert model._behaviour() is None
    data = fill(model, 10)
    model.load_offline(data, behaviour=0.8)
    assert model._behaviour() == pytest.approx(0.8)
    model.load_offline(data, behaviour=0.8, behaviour_decay_steps=100)
    for steps, expected in [(0, 0.8), (50, 0.4), (100, 0.0), (1000, 0.0)]:
        model.num_timesteps = steps
        assert model._behaviour() == pytest.approx(expected)


@pytest.mark.parametrize("behaviour", [0.0, 0.5])
def test_what_is_cloned_are_the_actions_of_the_data(behaviour):
    model = make_model(policy_samples=1.0)
    model.load_offline(fill(model, 20), share=1.0, behaviour=behaviour)
    batch = model._sample_batch(8)
    used = model._actor_batch(batch, th.zeros_like(batch.actions))
    if behaviour:
        assert used.observations is batch.observations
        assert used.actions is batch.actions
    else:
        assert th.equal(used.observations, batch.next_observations)
        assert not used.actions.any()


def test_cloning_and_improving():
    """Data around two actions of which one pays: cloning has both, the critic chooses."""
    kwargs = {"gamma": 0.0, "n_steps": 1, "batch_size": 64, "learning_rate": 3e-3, "diffusion_steps": 5}
    generator = np.random.default_rng(0)
    side = np.where(generator.random(512) < 0.5, -0.5, 0.5)
    actions = np.stack([side, np.full(512, 0.3)], axis=1) + 0.05 * generator.normal(size=(512, 2))
    paying = {}
    for behaviour in (1.0, 0.9):
        model = make_model(policy_kwargs={"net_arch": [64]}, **kwargs)
        model.load_offline(fill(model, 512, reward=lambda a: 3 * a[:, 0], actions=actions))
        model.pretrain(300, behaviour=behaviour)
        drawn = model.policy.scale_action(model.predict(np.zeros((300, 3), np.float32))[0])
        paying[behaviour] = (drawn[:, 0] > 0).mean()
        # Of the other component the data says where it is, and the critic nothing
        assert abs(drawn[:, 1].mean() - 0.3) < 0.15
    assert 0.3 < paying[1.0] < 0.7
    assert paying[0.9] > 0.8


def test_offline_to_online(tmp_path):
    model = make_model(exploration_initial_eps=0.0)
    model.load_offline(fill(model, 30), behaviour=0.5, behaviour_decay_steps=20)
    assert model.pretrain(5, behaviour=1.0, batch_size=4, log_interval=2) is model
    assert model._n_updates == 5
    assert model._offline.share == 0.5
    model.learn(30)
    assert model._n_updates == 35
    assert model.replay_buffer.size() == 30
    model.save(tmp_path / "model.zip")
    loaded = QSM.load(tmp_path / "model.zip", env=model.env)
    assert loaded._offline is None
    loaded.load_offline(fill(model, 30))
    loaded.learn(5, reset_num_timesteps=False)


@pytest.mark.parametrize("training", [True, False])
def test_vec_normalize(make_dataset, training):
    model = make_model(wrapper=lambda env: VecNormalize(env, training=training, gamma=0.9), n_steps=1)
    env = model.get_vec_normalize_env()
    dataset = make_dataset(lengths=(40, 30, 20))
    model.load_offline(dataset)
    observations, returns = [], []
    for episode in dataset:
        running = 0.0
        observations.append(episode.observations[:-1])
        for reward in episode.rewards:
            running = 0.9 * running + reward
            returns.append(running)
    if not training:
        assert (env.obs_rms.mean == 0).all()
        return
    np.testing.assert_allclose(env.obs_rms.mean, np.concatenate(observations).mean(axis=0), atol=1e-4)
    np.testing.assert_allclose(env.ret_rms.var, np.var(returns), rtol=1e-3)
    rows = np.arange(90)
    raw, normalized = model._offline.buffer._get_samples(rows), model._offline.buffer._get_samples(rows, env)
    np.testing.assert_allclose(normalized.rewards, raw.rewards / np.sqrt(np.var(returns)), rtol=1e-2)


def nan(buffer, name):
    getattr(buffer, name)[3] = np.nan
    return buffer


def big(buffer):
    buffer.actions[2] = 1.5
    return buffer


@pytest.mark.parametrize(
    ("dataset", "kwargs", "error", "message"),
    [
        (lambda m: fill(m, 5), {"share": 1.5}, ValueError, "share must be a number >= 0 and <= 1, got 1.5"),
        (lambda m: fill(m, 5), {"behaviour": "x"}, ValueError, "behaviour must be a number >= 0 and <= 1, got 'x'"),
        (lambda m: fill(m, 5), {"behaviour_decay_steps": 0}, ValueError, "behaviour_decay_steps must be an integer >= 1"),
        (lambda m: fill(m, 5), {"behaviour_decay_steps": 9}, ValueError, "behaviour_decay_steps needs a behaviour > 0"),
        (lambda m: ReplayBuffer(5, BOX, spaces.Box(-2, 2, (2,))), {}, ValueError, r"are those of Box\(-2.0, 2.0"),
        (lambda m: ReplayBuffer(5, BOX, spaces.Discrete(2)), {}, ValueError, r"are those of Discrete\(2\)"),
        (lambda m: [1, 2], {}, TypeError, "dataset must be one of Minari, a name, or a ReplayBuffer of SB3, got list"),
        (lambda m: ReplayBuffer(5, BOX, ACTION), {}, ValueError, "The dataset is empty"),
        (lambda m: nan(fill(m, 5), "rewards"), {}, ValueError, "The dataset's rewards are not all finite"),
        (lambda m: nan(fill(m, 5), "next_observations"), {}, ValueError, "next_observations are not all finite"),
        (lambda m: big(fill(m, 5)), {}, ValueError, r"actions are not scaled to \[-1, 1\]"),
        (
            lambda m: make_model("MultiInputPolicy").learn(2).replay_buffer,
            {},
            ValueError,
            "observations are a, b, the model has",
        ),
    ],
)
def test_bad_data(dataset, kwargs, error, message):
    model = make_model()
    model.load_offline(fill(model, 7))
    before = model._offline
    with pytest.raises(error, match=message):
        model.load_offline(dataset(model), **kwargs)
    assert model._offline is before


class Episode:
    """One of a dataset that holds what it likes."""

    def __init__(self, observations, rewards=(0.0, 0.0), actions=((0.0, 2.2), (0.0, 2.2)), terminations=(False, False)):
        self.observations, self.rewards, self.actions = observations, rewards, np.asarray(actions)
        self.terminations, self.truncations = terminations, np.zeros(2, dtype=bool)

    def __len__(self):
        return 2

    def iterate_episodes(self):
        return [self]


def parts(a=0.0, b=0):
    return {"a": np.full((3, 2), a), "b": np.full(3, b)}


@pytest.mark.parametrize(
    ("policy", "episode", "message"),
    [
        ("CnnPolicy", Episode(np.full((3, 36, 38, 3), 0.5)), r"observations are not all integers within Box\(0, 255"),
        ("CnnPolicy", Episode(np.full((3, 36, 38, 3), 256)), r"observations are not all integers within Box\(0, 255"),
        ("MultiInputPolicy", Episode(parts(b=1.7)), r"\['b'\] are not all integers within Discrete\(3\)"),
        ("MultiInputPolicy", Episode(parts(b=3)), r"\['b'\] are not all integers within Discrete\(3\)"),
        ("MultiInputPolicy", Episode(parts(a="text")), r"\['a'\] must be numbers, got <U4"),
        ("MultiInputPolicy", Episode(parts(a=1e39)), "observations are not all finite in single precision"),
        ("MlpPolicy", Episode(np.zeros((3, 3)), rewards=(0.0, 1e39)), "rewards are not all finite in single precision"),
        ("MlpPolicy", Episode(np.zeros((2, 3))), r"rewards as actions \(2\) and one observation more, got 2 and 2"),
        ("MlpPolicy", Episode(np.zeros((3, 3)), rewards=(0.0,)), r"got 1 and 3"),
        ("MlpPolicy", Episode(np.zeros((3, 3)), rewards=0.0), r"got 1 and 3"),
        ("MlpPolicy", Episode(np.zeros((3, 3)), rewards=(None, None)), "rewards must be numbers, got object"),
        ("MlpPolicy", Episode(np.zeros((3, 3)), rewards=(1j, 0.0)), "rewards must be numbers, got complex128"),
        (
            "MlpPolicy",
            Episode(np.zeros((3, 3)), rewards=np.zeros((2, 2))),
            r"rewards must have .* \(2,\) .* got \(2, 2\)",
        ),
        ("MlpPolicy", Episode(np.zeros((3, 3)), terminations=True), r"terminations must have the shape \(2,\) .* got \(\)"),
    ],
)
def test_data_that_the_buffer_would_change(policy, episode, message):
    model = make_model(policy)
    with pytest.raises(ValueError, match=message):
        model.load_offline(episode)
    assert model._offline is None


def test_rewards_in_a_column():
    model = make_model(wrapper=VecNormalize)
    model.load_offline(Episode(np.zeros((3, 3)), rewards=np.array([[1.0], [2.0]]), terminations=np.array([[0], [1]])))
    assert model._offline.buffer.rewards.ravel().tolist() == [1.0, 2.0]
    assert model._offline.buffer.dones.ravel().tolist() == [0.0, 1.0]
    assert model.get_vec_normalize_env().ret_rms.count == pytest.approx(2, abs=1e-3)


def test_buffers_of_scaled_actions_are_taken():
    model = make_model()
    buffer = ReplayBuffer(5, BOX, spaces.Box(-1, 1, (2,)), device="cpu")
    for _ in range(3):
        buffer.add(np.zeros((1, 3)), np.zeros((1, 3)), np.full((1, 2), 0.5), np.zeros(1), np.zeros(1), [{}])
    model.load_offline(buffer)
    np.testing.assert_array_equal(model._offline.buffer.actions, 0.5)


def test_a_small_share_is_a_row():
    model = make_model()
    model.load_offline(fill(model, 7, reward=5.0), share=0.01)
    fill_own = make_model()
    fill_own.learn(20)
    model.replay_buffer = fill_own.replay_buffer
    assert (model._sample_batch(8).rewards == 5.0).sum() == 1
    model.load_offline(fill(model, 7, reward=5.0), share=0.99)
    assert (model._sample_batch(8).rewards == 5.0).sum() == 7


def test_pretraining_after_a_training_is_at_the_start_of_the_schedule():
    model = make_model(learning_rate=LinearSchedule(1e-3, 0.0, 1.0)).learn(20)
    assert model._current_progress_remaining < 0.1
    remaining = model._current_progress_remaining
    model.load_offline(fill(model, 7))
    before = [parameter.clone() for parameter in model.actor.parameters()]
    model.pretrain(1)
    assert any(not th.equal(old, new) for old, new in zip(before, model.actor.parameters(), strict=True))
    assert model._current_progress_remaining == remaining


def test_data_of_other_spaces(make_dataset):
    model = make_model()
    with pytest.raises(ValueError, match=r"observations have shape \(4,\), the model has Box"):
        model.load_offline(make_dataset(spaces.Box(-1, 1, (4,)), name="other-v0"))
    dataset = make_dataset()
    env = DummyVecEnv([lambda: SpacesEnv(BOX, spaces.Box(-1, 1, (3,)))])
    with pytest.raises(ValueError, match=r"actions have shape \(2,\), the model has Box"):
        QSM("MlpPolicy", env, **SMALL).load_offline(dataset)
    env = DummyVecEnv([lambda: SpacesEnv(BOX, spaces.Box(-1, 1, (2,)))])
    with pytest.raises(ValueError, match=r"actions are not within Box"):
        QSM("MlpPolicy", env, **SMALL).load_offline(dataset)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"gradient_steps": 0}, "gradient_steps must be an integer >= 1, got 0"),
        ({"behaviour": -0.1}, "behaviour must be a number >= 0 and <= 1, got -0.1"),
        ({"batch_size": 1.5}, "batch_size must be an integer >= 1, got 1.5"),
        ({"log_interval": 0}, "log_interval must be an integer >= 1, got 0"),
    ],
)
def test_bad_pretraining(kwargs, message):
    model = make_model()
    with pytest.raises(ValueError, match="call load_offline first"):
        model.pretrain(1)
    model.load_offline(fill(model, 7))
    with pytest.raises(ValueError, match=message):
        model.pretrain(**{"gradient_steps": 1, **kwargs})
    assert model._n_updates == 0


def test_without_minari(monkeypatch):
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(ImportError, match=r'pip install "sb3-qsm\[offline\]"'):
        make_model().load_offline("some-v0")


@pytest.mark.slow
def test_compiled():
    """The same parameters after pretraining and mixed batches, compiled or not."""
    found = []
    for compiled in (False, True):
        model = make_model(compile=compiled, n_steps=1)
        model.load_offline(fill(model, 30), behaviour=0.5, behaviour_decay_steps=20)
        found.append(model.pretrain(5).learn(10).policy.state_dict())
    for name, value in found[0].items():
        th.testing.assert_close(found[1][name], value, rtol=1e-3, atol=1e-4)
