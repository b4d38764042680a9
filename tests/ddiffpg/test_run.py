"""Training: constructor forms, rollouts, updates, modes, logging, callbacks, spaces."""

import inspect
import itertools
import math
import pickle
from copy import deepcopy
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import CallbackList, CheckpointCallback, EvalCallback, StopTrainingOnMaxEpisodes
from stable_baselines3.common.logger import Logger, configure
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

import sb3_qsm.ddiffpg
from sb3_qsm import QSM, DDiffPG
from sb3_qsm.ddiffpg.buffers import EXPLORATION, MODE, DictTrajectoryReplayBuffer, TrajectoryReplayBuffer
from sb3_qsm.ddiffpg.distance import dtw_distance
from sb3_qsm.ddiffpg.modes import Inheritance
from sb3_qsm.envs import NGoalPointEnv
from sb3_qsm.evaluation import count_modes
from tests.ddiffpg.models import (
    MAX_STEPS,
    make_dict_env,
    make_env,
    make_model,
    make_picture_env,
    make_point,
    make_trained,
    position_in,
)
from tests.envs import SpacesEnv
from tests.test_run import all_differ, logged, parameters, read_csv, same

pytest.importorskip("dtaidistance")

TRAIN_METRICS = {
    "actor_loss",
    "critic_loss",
    "exploration_critic_loss",
    "q_mean",
    "exploration_q_mean",
    "intrinsic_reward",
    "novelty_loss",
    "target_action_shift",
    "action_saturation",
    "learning_rate",
    "n_updates",
}


def all_parameters(model: DDiffPG) -> list[list[th.Tensor]]:
    return [parameters(model.actor), *(parameters(critic) for pair in model.policy.group_critics() for critic in pair)]


# Constructor


def test_arguments_are_those_of_sac_and_qsm():
    ours = list(inspect.signature(DDiffPG.__init__).parameters)
    sac, qsm = (list(inspect.signature(cls.__init__).parameters) for cls in (SAC, QSM))
    common = sac[: sac.index("optimize_memory_usage")]
    assert ours[: len(common)] == common
    shared = set(ours) & set(qsm)
    assert [name for name in ours if name in shared] == [name for name in qsm if name in shared]


@pytest.mark.parametrize("policy", ["MlpPolicy", sb3_qsm.ddiffpg.MlpPolicy])
def test_policy_by_name_and_by_class(policy):
    assert type(make_model(policy=policy).policy) is sb3_qsm.ddiffpg.MlpPolicy


def test_user_arguments_are_not_changed():
    policy_kwargs, buffer_kwargs = {"net_arch": [16]}, {"max_successes": 7}
    copies = deepcopy((policy_kwargs, buffer_kwargs))
    model = DDiffPG("MlpPolicy", make_env(), policy_kwargs=policy_kwargs, replay_buffer_kwargs=buffer_kwargs)
    assert (policy_kwargs, buffer_kwargs) == copies
    assert (model.policy_kwargs, model.replay_buffer_kwargs, model.replay_buffer_class) == (*copies, None)
    assert model.replay_buffer.max_successes == 7
    assert type(model.replay_buffer) is TrajectoryReplayBuffer


# Rollouts


@pytest.mark.parametrize(("train_freq", "updates"), [(4, 5), ((4, "step"), 5), ((2, "episode"), None), (1, 19)])
def test_train_freq(train_freq, updates):
    model = make_model(train_freq=train_freq, learning_starts=1).learn(20)
    assert model._n_updates == (model._episode_num // 2 if updates is None else updates) > 0


def test_gradient_steps_minus_one_follows_the_rollout():
    model = make_model(make_env(2), train_freq=3, gradient_steps=-1, learning_starts=0).learn(12)
    assert model._n_updates == 12


def test_several_environments():
    model = make_model(make_env(3), train_freq=2, action_noise=NormalActionNoise(np.zeros(2), np.full(2, 0.2))).learn(300)
    assert len(model.modes) == 2
    assert model.replay_buffer.size() == 300
    for trajectory in model.replay_buffer.trajectories.values():
        observations = model.replay_buffer.observations[trajectory.rows, 0]
        following = model.replay_buffer.next_observations[trajectory.rows, 0]
        # Episodes are whole: every transition begins where the one before ended, and the first at the start
        np.testing.assert_array_equal(observations[1:], following[:-1])
        np.testing.assert_array_equal(observations[0], 0.0)
        assert len(trajectory.rows) <= MAX_STEPS
    assert np.abs(model.replay_buffer.actions).max() <= 1.0


def test_time_outs_bootstrap_from_the_true_final_observation():
    """Two steps reach no goal: the values after the last one are those of where it led, not of the next start."""
    env = DummyVecEnv([lambda: gym.wrappers.TimeLimit(NGoalPointEnv(2, step_size=0.2, reward_type="sparse"), 2)])
    model = make_model(env, train_freq=1, gamma=0.9, learning_starts=1000, intrinsic_reward_scale=0.0)
    model.learn(2)
    buffer = model.replay_buffer
    (trajectory,) = buffer.trajectories.values()
    last = trajectory.rows[-1]
    np.testing.assert_allclose(buffer.next_observations[last, 0], buffer.next_positions[last])
    assert np.abs(buffer.next_observations[last]).max() > 0.05
    assert buffer.dones[last] == buffer.timeouts[last] == 1.0

    # Critics that are zero and a target that is the first coordinate: the loss is the square of gamma times it
    with th.no_grad():
        for critic in (model.critic, model.critic_target):
            for parameter in critic.parameters():
                parameter.zero_()
    seen = []
    model.critic_target.q_values = lambda features, actions: seen.append(features) or features[:, 0].expand(2, -1)
    # That alone is left to be drawn
    buffer.row_modes[trajectory.rows[:-1]] = -2
    buffer._free.extend(trajectory.rows[:-1])
    model.set_logger(Logger(None, []))
    model.train(1, batch_size=4)
    x = buffer.next_observations[last, 0, 0]
    assert len(seen) == 1
    assert logged(model, "exploration_critic_loss") == pytest.approx(2 * (0.9 * x) ** 2, rel=1e-4)


def test_every_episode_follows_one_mode_or_explores(monkeypatch):
    model = make_trained()
    seen = []
    features = model.actor.features

    def spy(obs, context=None):
        result = features(obs, context)
        seen.append(result[0, -5:].clone())
        return result

    monkeypatch.setattr(model.actor, "features", spy)
    model.train = lambda gradient_steps, batch_size: None
    model.exploration_initial_eps = 0.0
    groups = []
    for _ in range(120):
        seen.clear()
        groups.append(model._env_groups[0])
        model.learn(1, reset_num_timesteps=False)
        assert th.equal(seen[0], model.actor.mode_embeddings[groups[-1]])
    assert set(groups) == {0, 1, 2}
    assert sum(a != b for a, b in itertools.pairwise(groups)) <= model._episode_num


# Updates


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"sampler": "ddim", "noise_schedule": "vp"},
        {"policy_kwargs": {"n_critics": 1}},
        {"policy_kwargs": {"n_critics": 3, "layer_norm": True}},
        {"n_atoms": 11, "v_max": 1.5},
        {"cluster_threshold": None, "min_mode_size": 2},
        {"buffer_size": 100},
    ],
    ids=["defaults", "sampler", "n_critics_1", "n_critics_3", "categorical", "silhouette", "small_buffer"],
)
def test_every_choice_trains(kwargs):
    model = make_model(**kwargs).learn(200)
    assert len(model.modes) >= 1
    before = all_parameters(model)
    model.set_logger(Logger(None, []))
    model.train(gradient_steps=3, batch_size=16)
    for old, new in zip(before, all_parameters(model), strict=True):
        assert not same(old, new)
    for name in TRAIN_METRICS:
        assert math.isfinite(logged(model, name)), name


def test_a_critic_learns_from_its_own_mode_alone(monkeypatch):
    model = make_trained()
    sample = model.replay_buffer.sample_groups

    def only_exploration(batch_size, n_modes, env=None):
        return sample(batch_size, 0, env)._replace(sizes=[batch_size, *[0] * n_modes])

    monkeypatch.setattr(model.replay_buffer, "sample_groups", only_exploration)
    before = all_parameters(model)
    model.train(gradient_steps=2, batch_size=16)
    actor, exploration, _, first, _, second, _ = (
        not same(old, new) for old, new in zip(before, all_parameters(model), strict=True)
    )
    assert (actor, exploration, first, second) == (True, True, False, False)


def test_the_exploration_is_paid_for_novelty_alone():
    model = make_trained(gamma=0.0, intrinsic_reward_scale=0.0)
    with th.no_grad():
        for critic, _ in model.policy.group_critics():
            for parameter in critic.parameters():
                parameter.zero_()
    model.replay_buffer.rewards[:] = 2.0
    model.train(gradient_steps=1, batch_size=30)
    assert logged(model, "intrinsic_reward") == 0.0
    assert logged(model, "exploration_critic_loss") == 0.0
    assert logged(model, "critic_loss") == pytest.approx(2 * 2.0**2)
    model.intrinsic_reward_scale = 1.0
    model.train(gradient_steps=1, batch_size=30)
    assert logged(model, "intrinsic_reward") > 0.0
    assert logged(model, "exploration_critic_loss") > 0.0


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_the_modes_are_paid_for_both(monkeypatch, scale):
    """Without a future the targets are the rewards: novelty alone for the exploration, the task's reward too for a mode."""
    model = make_trained(gamma=0.0, intrinsic_reward_scale=scale)
    monkeypatch.setattr("sb3_qsm.ddiffpg.ddiffpg.noveld_reward", lambda n, next_n, factor: factor * th.full_like(n, 7.0))
    batch = model.replay_buffer.sample_groups(30, 2)
    data = batch.transitions
    expected = []
    for (critic, _), part, paid in zip(
        model.policy.group_critics(), (slice(0, 10), slice(10, 20), slice(20, 30)), (0.0, 1.0, 1.0), strict=True
    ):
        with th.no_grad():
            q_values = th.cat(critic(data.observations[part], data.actions[part]), dim=1)
        target = 7.0 * scale + paid * data.rewards[part]
        expected.append((q_values - target).square().mean(dim=0).sum().item())
    metrics = model._update_critics(batch, model._draw_noise(data))
    assert metrics["exploration_critic_loss"].item() == pytest.approx(expected[0], rel=1e-5)
    assert metrics["critic_loss"].item() == pytest.approx((expected[1] + expected[2]) / 2, rel=1e-5)


def test_nothing_is_new_before_there_are_enough_positions():
    model = make_model(learning_starts=0, train_freq=1, n_atoms=0).learn(80)
    assert not model.novelty.fitted
    assert logged(model, "intrinsic_reward") == 0.0
    assert "train/novelty_loss" not in model.logger.name_to_value
    model.learn(80, reset_num_timesteps=False)
    assert model.novelty.fitted
    assert 0.0 < logged(model, "intrinsic_reward") < 0.1


def test_next_actions_and_losses_follow_the_modes(monkeypatch):
    """The next action of a mode's target has the mode's embedding; the actor's is left out with the given probability."""
    model = make_trained(mode_dropout=0.3)
    seen, contexts = [], []
    features, context_of = model.actor.features, model._contexts
    monkeypatch.setattr(model.actor, "features", lambda obs, context=None: seen.append(context) or features(obs, context))
    monkeypatch.setattr(model, "_contexts", lambda batch, dropout=0.0: contexts.append(dropout) or context_of(batch, dropout))
    model.train(gradient_steps=1, batch_size=30)
    assert contexts == [0.0, 0.3]
    assert th.equal(seen[0], model.actor.mode_embeddings.repeat_interleave(10, dim=0))


def test_actions_climb_on_the_critics_of_their_own_group():
    """The exploration's critics rise with the first action, one mode's with the second, the other's fall with it."""
    model = make_trained(target_action_steps=3)
    slopes = [(1.0, 0.0), (0.0, 1.0), (0.0, -1.0)]
    with th.no_grad():
        for (critic, _), slope in zip(model.policy.group_critics(), slopes, strict=True):
            for network in critic.q_networks:
                linear = [layer for layer in network if isinstance(layer, th.nn.Linear)]
                for parameter in network.parameters():
                    parameter.zero_()
                for layer in network:
                    if isinstance(layer, th.nn.LayerNorm):
                        layer.weight.fill_(1.0)
                linear[0].weight[0, 2:] = th.tensor(slope)
                linear[-1].weight[0, 0] = 1.0
    buffer = model.replay_buffer
    buffer.target_actions[:] = 0.0
    batch = buffer.sample_groups(30, 2)
    shift = model._ascend_target_actions(batch).numpy()
    for part, slope in zip((slice(0, 10), slice(10, 20), slice(20, 30)), slopes, strict=True):
        np.testing.assert_array_equal(np.sign(shift[part]), np.tile(slope, (10, 1)))


def test_the_actor_clones_the_target_actions(monkeypatch):
    model = make_trained()
    seen = []
    update = model._update_actor
    monkeypatch.setattr(model, "_update_actor", lambda *args: seen.append(args) or update(*args))
    model.train(gradient_steps=1, batch_size=30)
    ((batch, target_actions, noise),) = seen
    columns = np.repeat([EXPLORATION, MODE, MODE], 10)
    np.testing.assert_array_equal(target_actions.numpy(), model.replay_buffer.target_actions[batch.rows, columns])
    assert not np.array_equal(target_actions.numpy(), model.replay_buffer.actions[batch.rows, 0])
    # The loss is that of the noise in these actions
    model.mode_dropout = 0.0
    with th.no_grad():
        noisy = model.actor.schedule.add_noise(target_actions, noise.eps, noise.t)
        features = model.actor.features(batch.transitions.observations, model._contexts(batch))
        expected = (model.actor.predict_noise(features, noisy, noise.t) - noise.eps).square().mean()
    loss = update(batch, target_actions, noise)["actor_loss"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_categorical_targets_are_those_of_the_more_cautious_critic():
    model = make_trained(n_atoms=11, v_max=2.0, intrinsic_reward_scale=0.0)
    with th.no_grad():
        for _, target in model.policy.group_critics():
            for i, network in enumerate(target.q_networks):
                # One predicts a large return, the other a small one, in every state
                network[-1].weight.zero_()
                network[-1].bias.copy_(th.eye(11)[9 if i == 0 else 2] * 50.0)
    batch = model.replay_buffer.sample_groups(30, 2)
    data = batch.transitions
    dones = data.dones[:10].numpy()
    support = np.linspace(0.0, 2.0, 11)
    expected = 0.0
    with th.no_grad():
        logits = model.critic.logits(data.observations[:10], data.actions[:10]).log_softmax(dim=-1).numpy()
    for i in range(10):
        # Without the task's reward, which is not the exploration's
        value = (1.0 - dones[i, 0]) * model.gamma * support[2]
        position = value / 0.2
        low = int(np.floor(position))
        weights = np.zeros(11)
        weights[low] += low + 1 - position
        weights[min(low + 1, 10)] += position - low
        expected -= (logits[:, i] @ weights).sum() / 10
    metrics = model._update_critics(batch, model._draw_noise(data))
    assert metrics["exploration_critic_loss"].item() == pytest.approx(expected, rel=1e-4)


def test_target_actions_are_kept_and_moved_on():
    model = make_trained(target_action_steps=5)
    buffer = model.replay_buffer
    stored = [buffer.target_actions[:, column].copy() for column in (EXPLORATION, MODE)]
    model.train(gradient_steps=1, batch_size=30)
    moved = [
        (buffer.target_actions[:, column] != old).any(axis=1) for column, old in zip((EXPLORATION, MODE), stored, strict=True)
    ]
    assert 0 < moved[EXPLORATION].sum() <= 10
    assert 0 < moved[MODE].sum() <= 20
    assert np.abs(buffer.target_actions).max() <= 1.0


def test_embeddings_are_left_out_half_of_the_time_where_the_mode_passes_by():
    model = make_trained()
    goals = [mode.trajectory[-1] for mode in model.modes]
    # The start, and the goal of each mode
    places = th.as_tensor(np.stack([np.zeros(2), *goals]), dtype=th.float32)
    embeddings = model.actor.mode_embeddings
    for place, allowed in zip(places, ({1, 2}, {1}, {2}), strict=True):
        batch = SimpleNamespace(sizes=[1000, 2000, 3000], positions=place.expand(6000, -1))
        contexts = model._contexts(batch, 0.5)
        assert th.equal(contexts[:1000], embeddings[:1].expand(1000, -1))
        for mode, part in ((1, contexts[1000:3000]), (2, contexts[3000:])):
            dropped = (part == 0).all(dim=1)
            assert (0.45 < dropped.float().mean() < 0.55) if mode in allowed else not dropped.any()
            assert th.equal(part[~dropped], embeddings[mode].expand(int((~dropped).sum()), -1))
    assert len({tuple(row) for row in embeddings.tolist()}) == 3
    for probability, share in ((0.0, 0.0), (1.0, 1.0)):
        batch = SimpleNamespace(sizes=[0, 50, 0], positions=places[:1].expand(50, -1))
        assert (model._contexts(batch, probability)[:, 0] == 0).float().mean() == share


@pytest.mark.parametrize("steps", [0, 3])
def test_learning_rates_reach_all_critics(steps):
    model = make_trained(learning_rate=lambda progress: 1e-3 * progress, actor_learning_rate=5e-4)
    model._current_progress_remaining = 0.25
    model.train(gradient_steps=steps, batch_size=16)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in model._optimizers()]
    assert rates == pytest.approx([5e-4, 2.5e-4, 2.5e-4, 2.5e-4])


def test_targets_follow_all_critics():
    model = make_trained(tau=1.0)
    model.train(gradient_steps=1, batch_size=16)
    for critic, target in model.policy.group_critics():
        assert same(parameters(critic), parameters(target))
    model.tau = 0.0
    before = [parameters(target) for _, target in model.policy.group_critics()]
    model.train(gradient_steps=1, batch_size=16)
    assert all(same(old, parameters(target)) for old, (_, target) in zip(before, model.policy.group_critics(), strict=True))


# Modes


def test_modes_are_the_goals_and_are_told():
    model = make_trained(400)
    ends = [mode.trajectory[-1] for mode in model.modes]
    np.testing.assert_allclose(sorted(ends, key=lambda end: end[0]), [[-1, 0], [1, 0]], atol=0.46)
    successes = model.replay_buffer.successes()
    assert sum(mode.size for mode in model.modes) <= len(successes)
    for mode in model.modes:
        assert mode.size > 0
        assert mode.mean_return == 1.0
        assert mode.trajectory.shape[1] == 2
        assert math.isnan(mode.success_rate) or 0.0 <= mode.success_rate <= 1.0
    assert any(mode.success_rate > 0 for mode in model.modes)
    # Each is in the mode of its goal, and every failure in one of the two
    for trajectory in successes:
        if trajectory.mode >= 0:
            assert np.linalg.norm(trajectory.positions[-1] - ends[trajectory.mode]) < 1.0
    assigned = [trajectory.mode for trajectory in model.replay_buffer.trajectories.values() if not trajectory.success]
    assert {0, 1} <= set(assigned) <= {-1, 0, 1}


def test_predict_in_a_mode():
    model = make_trained()
    observation = np.zeros((4, 2), dtype=np.float32)
    with th.no_grad():
        model.actor.mode_embeddings.mul_(5.0)
    actions = [model.predict(observation, deterministic=True, mode=mode)[0] for mode in (None, 0, 1)]
    assert not np.allclose(actions[1], actions[2], atol=1e-3)
    assert not np.allclose(actions[0], actions[1], atol=1e-3)
    for mode in (0, 1, None):
        model.set_mode(mode)
        chosen = actions[0 if mode is None else mode + 1]
        np.testing.assert_array_equal(model.predict(observation, deterministic=True)[0], chosen)
        # The policy alone acts in the mode too, and the argument goes before the choice
        np.testing.assert_array_equal(model.policy.predict(observation, deterministic=True)[0], chosen)
        np.testing.assert_array_equal(model.predict(observation, deterministic=True, mode=1)[0], actions[2])
        np.testing.assert_array_equal(model.predict(observation, deterministic=True)[0], chosen)
    assert model.predict(observation[0], mode=0)[0].shape == (2,)


def test_before_any_success():
    model = make_model()
    assert model.modes == []
    action, _ = model.predict(np.zeros(2, dtype=np.float32))
    assert action.shape == (2,)
    th.testing.assert_close(model.actor.mode_context(None), model.actor.mode_embeddings[:1])


def test_the_chosen_mode_stays_the_same_when_numbers_change(monkeypatch):
    model = make_trained()
    model.set_mode(1)
    ends = [mode.trajectory[-1].copy() for mode in model.modes]
    embedding = model.actor.mode_embeddings[2].clone()
    critic = model.policy.mode_critics[1]
    # Mode 0 vanishes with its trajectories
    for trajectory in [t for t in model.replay_buffer.trajectories.values() if t.mode == 0]:
        model.replay_buffer._remove(trajectory)
    model._env_groups = [2]
    model.update_modes()
    assert len(model.modes) == 1
    assert model.mode == model.actor.mode == 0
    assert model._env_groups == [1]
    assert np.linalg.norm(model.modes[0].trajectory[-1] - ends[1]) < 1.0
    assert th.equal(model.actor.mode_embeddings[1], embedding)
    assert model.policy.mode_critics[0] is critic
    # And then itself: any mode
    for trajectory in [t for t in model.replay_buffer.trajectories.values() if t.mode == 0]:
        trajectory.mode = -1
    with pytest.warns(UserWarning, match="The mode that was chosen, 0, is gone"):
        model.update_modes()
    assert model.mode is None
    assert model._env_groups == [0]


def test_the_chosen_mode_is_followed_when_modes_merge():
    for mode in (0, 1):
        model = make_trained()
        model.mode = mode
        chosen = {trajectory.id for trajectory in model.replay_buffer.successes() if trajectory.mode == mode}
        model.cluster_threshold = 50.0
        model.update_modes()
        assert len(model.modes) == 1
        assert chosen <= {trajectory.id for trajectory in model.replay_buffer.successes() if trajectory.mode == 0}
        assert model.mode == model.actor.mode == 0


def test_assigning_the_mode_chooses_it():
    model = make_trained()
    model.mode = 1
    assert model.mode == model.actor.mode == 1
    observations = np.random.default_rng(0).uniform(-1.0, 1.0, (5, 2)).astype(np.float32)
    actions, expected = (model.predict(observations, deterministic=True, **kwargs)[0] for kwargs in ({}, {"mode": 1}))
    np.testing.assert_array_equal(actions, expected)
    with pytest.raises(ValueError, match="^mode must be None or an integer from 0 to 1, got 2$"):
        model.mode = 2
    assert model.mode == 1


def test_a_replay_buffer_of_another_model_in_place_of_the_own():
    """Its trajectories have the numbers of others, and its modes may have other numbers."""
    model, other = make_trained(), make_trained(seed=3)
    # In the midst of an episode, so that what comes next does not begin at the start
    while not model.replay_buffer._open[0]:
        model.learn(1, reset_num_timesteps=False)
    assert other.replay_buffer._open[0]
    goals = [float(np.sign(mode.trajectory[-1, 0])) for mode in model.modes]
    assert sorted(goals) == [-1.0, 1.0]
    buffer = other.replay_buffer
    if [float(np.sign(mode.trajectory[-1, 0])) for mode in other.modes] == goals:
        buffer.assign({id: 1 - one.mode for id, one in buffer.trajectories.items() if one.mode >= 0}, [1, 0])
        buffer.representatives.reverse()
    model.replay_buffer = buffer
    with pytest.warns(UserWarning, match="The modes of the replay buffer are not those of the model"):
        model.learn(8, reset_num_timesteps=False)
    model.update_modes()
    for mode, goal in zip(model.modes, goals, strict=True):
        assert np.sign(mode.trajectory[-1, 0]) == goal
    for trajectory in buffer.successes():
        if trajectory.mode >= 0:
            assert np.sign(trajectory.positions[-1, 0]) == goals[trajectory.mode]
    # The episode that the environments were in began in another buffer
    for one in buffer.trajectories.values():
        np.testing.assert_array_equal(buffer.observations[one.rows[0], 0], 0.0)
        np.testing.assert_array_equal(buffer.observations[one.rows[1:], 0], buffer.next_observations[one.rows[:-1], 0])


@pytest.mark.parametrize("duplicate", [deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"])
def test_a_copy_goes_on_in_the_same_episode(duplicate):
    model = make_trained().learn(1, reset_num_timesteps=False)
    while not model.replay_buffer._open[0]:
        model.learn(1, reset_num_timesteps=False)
    results = []
    for one in (duplicate(model), model):
        th.manual_seed(0)
        np.random.seed(0)
        one.learn(10, reset_num_timesteps=False)
        results.append((one.replay_buffer.observations[: one.replay_buffer.pos], parameters(one.actor)))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    assert same(results[0][1], results[1][1])


def test_new_modes_inherit_critics():
    model = make_model(learning_starts=1000).learn(200)
    assert model.modes == []
    model.update_modes()
    assert len(model.modes) == 2
    for critic, target in zip(model.policy.mode_critics, model.policy.mode_critic_targets, strict=True):
        assert critic is not model.critic
        assert same(parameters(critic), parameters(model.critic))
        assert same(parameters(target), parameters(model.critic_target))
        assert not any(parameter.requires_grad for parameter in target.parameters())
        assert critic.optimizer.param_groups[0]["lr"] == 3e-4
    model.set_logger(Logger(None, []))
    model.train(2, 16)
    assert all_differ(parameters(model.policy.mode_critics[0]), parameters(model.critic))
    critics = list(model.policy.mode_critics)
    model.update_modes()
    assert all(old is new for old, new in zip(critics, model.policy.mode_critics, strict=True))


def test_a_mode_that_splits_off_copies_the_critics_of_its_parent():
    model = make_trained()
    model.train(5, 30)
    policy = model.policy
    old = [parameters(critic) for pair in policy.group_critics() for critic in pair]
    embeddings = policy.actor.mode_embeddings.clone()
    assert all_differ(old[0], old[4])
    policy.inherit([Inheritance(1, True), Inheritance(1, False), Inheritance(None, False)])
    new = [parameters(critic) for pair in policy.group_critics() for critic in pair]
    assert len(new) == 8
    for i, source in enumerate((0, 1, 4, 5, 4, 5, 0, 1)):
        assert same(new[i], old[source])
    found = policy.actor.mode_embeddings
    assert th.equal(found[:2], embeddings[[0, 2]])
    assert len({tuple(row) for row in [*embeddings.tolist(), *found.tolist()]}) == 5
    # A copy learns on its own
    assert policy.mode_critics[0] is not policy.mode_critics[1]


def test_copies_begin_without_outcomes(monkeypatch):
    model = make_trained()
    for outcomes in model._outcomes:
        outcomes.extend([True, False])
    ids = [trajectory.id for trajectory in model.replay_buffer.successes()]
    half = len(ids) // 2
    first = [trajectory.id for trajectory in model.replay_buffer.successes() if trajectory.mode == 0]
    labels = np.array([0 if i in first[: len(first) // 2 + 1] else 1 if i in first else 2 for i in ids])
    assert half > 2
    monkeypatch.setattr("sb3_qsm.ddiffpg.ddiffpg.cluster", lambda *args: labels)
    model.update_modes()
    assert len(model.modes) == 3
    assert sorted(len(outcomes) > 0 for outcomes in model._outcomes) == [False, True, True]
    assert len(model._outcomes[2]) == 0


def test_failures_join_the_mode_that_they_are_nearest_to():
    model = make_trained()
    failures = [trajectory for trajectory in model.replay_buffer.trajectories.values() if not trajectory.success]
    assert len(failures) > 4
    for trajectory in failures:
        distances = [dtw_distance(trajectory.positions, mode.trajectory) for mode in model.modes]
        if trajectory.mode >= 0:
            assert trajectory.mode == int(np.argmin(distances))
    assert {trajectory.mode for trajectory in failures} >= {0, 1}


def test_fifteen_modes():
    """Each goal of fifteen is a mode, has a part of each batch and can be chosen."""
    env = DummyVecEnv([lambda: make_point(15)])
    model = make_model(env, learning_starts=10**6, buffer_size=20_000, cluster_threshold=None, batch_size=64)
    model.learn(1)
    buffer = model.replay_buffer
    buffer.discard_unfinished()
    generator = np.random.default_rng(0)
    for _ in range(5):
        for k in range(15):
            goal = 0.9 * np.array([np.cos(2 * np.pi * k / 15), np.sin(2 * np.pi * k / 15)])
            path = (np.linspace(0, 1, 5)[:, None] * goal + 0.01 * generator.standard_normal((5, 2))).astype(np.float32)
            for i in range(4):
                done, info = np.array([i == 3]), {"success": True}
                buffer.add(path[i : i + 1], path[i + 1 : i + 2], np.zeros((1, 2)), done.astype(float), done, [info])
    model.update_modes()
    assert len(model.modes) == 15
    assert {mode.size for mode in model.modes} <= {5, 6}
    assert buffer.sample_groups(64, 15).sizes == [4] * 16
    model.set_logger(Logger(None, []))
    model.train(2, 64)
    actions = [model.predict(np.zeros(2, np.float32), deterministic=True, mode=k)[0] for k in range(15)]
    # Each has an embedding of its own; of the actions that follow from it some may lie in the same corner
    assert len({tuple(embedding) for embedding in model.actor.mode_embeddings.tolist()}) == 16
    assert len({tuple(action) for action in actions}) > 5


def test_a_batch_too_small_for_the_modes():
    model = make_model(batch_size=2, learning_starts=1000).learn(200)
    with pytest.warns(UserWarning, match="batch_size=2 has no part for each of 2 modes"):
        model.update_modes()


def test_an_episode_that_a_callback_stopped_is_not_joined_to_the_next():
    model = make_model(train_freq=1).learn(200, callback=StopTrainingOnMaxEpisodes(5))
    before = set(model.replay_buffer.trajectories)
    model.learn(60, reset_num_timesteps=False)
    new = [trajectory for i, trajectory in model.replay_buffer.trajectories.items() if i not in before]
    assert len(new) > 3
    for trajectory in new:
        np.testing.assert_array_equal(trajectory.positions[0], 0.0)
        assert np.linalg.norm(np.diff(trajectory.positions, axis=0), axis=1).max() <= 0.6 + 1e-5


def test_random_actions_tell_nothing_of_the_modes():
    model = make_trained()
    for outcomes in model._outcomes:
        outcomes.clear()
    model.learning_starts = 60
    model.learn(60)
    assert [len(outcomes) for outcomes in model._outcomes] == [0, 0]
    model.learn(60, reset_num_timesteps=False)
    assert sum(len(outcomes) for outcomes in model._outcomes) > 0


def test_going_on_without_the_replay_buffer_warns(tmp_path):
    make_trained().save(tmp_path / "model")
    model = DDiffPG.load(tmp_path / "model", env=make_env())
    with pytest.warns(UserWarning, match="2 modes are known, but the replay buffer has no success"):
        model.learn(1, reset_num_timesteps=False)


@pytest.mark.parametrize(
    "space", [spaces.Discrete(3), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(3)], ids=lambda space: type(space).__name__
)
def test_discrete_observations(space):
    """They need a position function; here it is the number of the step."""
    model = make_model(
        DummyVecEnv([lambda: SuccessfulEnv(space, spaces.Box(-1, 1, (2,)))]),
        position=lambda observations: np.asarray(observations, dtype=np.float32).reshape(len(observations), -1),
        learning_starts=10,
    ).learn(60)
    assert model._n_updates > 0
    assert model.action_space.contains(model.predict(space.sample(), deterministic=True)[0])


class SuccessfulEnv(SpacesEnv):
    """Every episode succeeds."""

    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward, terminated, truncated, {**info, "success": True}


def test_a_shared_features_extractor_and_several_environments():
    model = make_model(make_env(2), policy_kwargs={"share_features_extractor": True}).learn(200)
    assert len(model.modes) == 2
    assert model._n_updates > 0


def test_deterministic_by_the_seed():
    results = []
    for seed in (1, 1, 2):
        env = make_env()
        env.seed(3)
        model = make_model(env, seed=seed).learn(200)
        results.append(th.cat([value.flatten() for values in all_parameters(model)[:3] for value in values]))
    assert th.equal(results[0], results[1])
    assert not th.equal(results[0], results[2])


# Logging and callbacks


@pytest.mark.parametrize("key", ["success", "is_success"])
def test_logged_names(tmp_path, key):
    env = gym.wrappers.TransformReward(make_point(), lambda reward: reward)
    step = env.step

    def with_one_key(action):
        *result, info = step(action)
        del info["success" if key == "is_success" else "is_success"]
        return (*result, info)

    env.step = with_one_key
    model = make_model(DummyVecEnv([lambda: env]), actor_learning_rate=1e-4)
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(250, log_interval=4)
    columns = read_csv(tmp_path / "progress.csv")
    names = {f"train/{name}" for name in TRAIN_METRICS | {"action_std", "actor_learning_rate"}}
    names |= {"modes/n_modes", "modes/success_rate_0", "modes/success_rate_1", "rollout/success_rate", "rollout/ep_rew_mean"}
    assert names <= set(columns)
    for name in names:
        assert math.isfinite(float(columns[name][-1])), name
    assert columns["modes/n_modes"][0] == "0"
    assert columns["modes/n_modes"][-1] == "2"
    # The reward is 1 for a success, and both are means over the last hundred episodes
    assert float(columns["rollout/success_rate"][-1]) == pytest.approx(float(columns["rollout/ep_rew_mean"][-1]), abs=1e-6)


def test_callbacks(tmp_path):
    evaluation = EvalCallback(
        make_env(), n_eval_episodes=2, eval_freq=50, log_path=str(tmp_path), best_model_save_path=str(tmp_path)
    )
    checkpoints = CheckpointCallback(100, str(tmp_path), save_replay_buffer=True)
    model = make_model().learn(1000, callback=CallbackList([evaluation, checkpoints, StopTrainingOnMaxEpisodes(40)]))
    # SB3 counts the last episode after the callbacks
    assert model._episode_num == 39
    assert len(evaluation.evaluations_timesteps) >= 2
    loaded = DDiffPG.load(tmp_path / "rl_model_100_steps.zip", env=make_env())
    loaded.load_replay_buffer(tmp_path / "rl_model_replay_buffer_100_steps.pkl")
    assert 90 <= loaded.replay_buffer.size() <= 100


# Spaces and wrappers


def test_pictures():
    model = make_model(
        make_picture_env(), "CnnPolicy", {"features_extractor_kwargs": {"features_dim": 8}}, position=position_in, batch_size=4
    )
    assert model.replay_buffer.positions.shape == (1000, 2)
    model.learn(200)
    # How many depends on the walks of the first steps; each leads to one of the goals at -1 and 1, and both are found
    ends = np.array([mode.trajectory[-1][0] for mode in model.modes])
    np.testing.assert_allclose(np.abs(ends), 1.0, atol=0.5)
    assert set(np.sign(ends)) == {-1.0, 1.0}
    observation = model.get_env().reset()
    assert model.predict(observation, mode=0)[0].shape == (1, 2)


def test_dictionaries():
    model = make_model(make_dict_env(), "MultiInputPolicy").learn(150)
    assert type(model.replay_buffer) is DictTrajectoryReplayBuffer
    assert model.replay_buffer.positions.shape == (1000, 2)
    assert len(model.modes) == 2


def test_vec_normalize():
    env = VecNormalize(make_env())
    model = make_model(env).learn(150)
    assert len(model.modes) == 2
    # Positions are the environment's
    ends = [mode.trajectory[-1] for mode in model.modes]
    np.testing.assert_allclose(np.linalg.norm(ends, axis=1), 1.0, atol=0.46)
    batch = model.replay_buffer.sample_groups(64, 2, env)
    np.testing.assert_allclose(batch.transitions.observations, env.normalize_obs(batch.positions.numpy()), atol=1e-5)


def test_evaluation():
    model = make_trained()
    counts = count_modes(model, make_point(), 10, seed=0)
    assert len(counts.episodes) == 10
    assert spaces.Box(-1.0, 1.0, (2,)).contains(model.predict(np.zeros(2, dtype=np.float32))[0])
