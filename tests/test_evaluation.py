"""Counting the modes of a policy."""

import math
import re

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

import sb3_qsm.envs  # noqa: F401 registers the environments
from sb3_qsm import QSM
from sb3_qsm.evaluation import count_modes, success_of

POINT = "sb3_qsm/NGoalPoint-v0"


class Compass:
    """Goes to the given goals of a circle of four in turn, an episode each; None stands for standing still."""

    def __init__(self, goals: list[int | None]) -> None:
        self.goals = goals
        self.plan: dict[int, int] = {}
        self.started = 0
        self.seen: list[np.ndarray] = []

    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        self.seen.append(observation)
        actions = []
        for i, start in enumerate(episode_start):
            if start:
                self.plan[i] = self.started
                self.started += 1
            goal = self.goals[self.plan[i] % len(self.goals)]
            angle = None if goal is None else goal * math.pi / 2
            actions.append((0.0, 0.0) if angle is None else (math.cos(angle), math.sin(angle)))
        return np.array(actions, dtype=np.float32), state


def test_counts_entropy_success_and_returns():
    found = count_modes(Compass([0, 0, 2, None]), gym.make(POINT), n_episodes=8)
    assert found.counts == {0: 4, 2: 2}
    assert list(found.counts) == [0, 2]
    assert found.success_rate == 0.75
    assert found.mean_returns == {0: pytest.approx(-1.5, abs=1e-5), 2: pytest.approx(-1.5, abs=1e-5)}
    # Standing still costs 1 in each of 15 steps
    assert found.mean_return == pytest.approx((6 * -1.5 + 2 * -15.0) / 8, abs=1e-5)
    assert found.entropy == pytest.approx(-(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)))
    assert found.relative_entropy(2) == pytest.approx(found.entropy / math.log(2))
    assert str(found).splitlines()[:2] == [
        "8 episodes, success rate 0.75, entropy 0.64 nats",
        "  mode 0: 4 episodes, return -1.5",
    ]


def test_entropy_of_no_one_and_all_modes():
    none, one, all_four = (count_modes(Compass(goals), gym.make(POINT), 4) for goals in ([None], [3], [0, 1, 2, 3]))
    assert (none.counts, none.entropy, none.success_rate) == ({}, 0.0, 0.0)
    assert (one.counts, one.entropy, one.relative_entropy(1), one.relative_entropy(4)) == ({3: 4}, 0.0, 1.0, 0.0)
    assert all_four.relative_entropy(4) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="n_modes must be at least the 4 modes that were found, got 3"):
        all_four.relative_entropy(3)


def test_episodes_hold_all_observations():
    (episode,) = count_modes(Compass([1]), gym.make(POINT), 1).episodes
    np.testing.assert_allclose(episode.observations, [[0.0, 0.25 * i] for i in range(5)], atol=1e-6)
    assert (episode.mode, episode.success) == (1, True)
    (failed,) = count_modes(Compass([None]), gym.make(POINT), 1).episodes
    assert len(failed.observations) == 16
    assert failed.mode is None


def test_several_environments_play_as_many_episodes_as_asked():
    env = make_vec_env(POINT, n_envs=3, seed=0)
    found = count_modes(Compass([0, 1, None]), env, n_episodes=10)
    assert len(found.episodes) == 10
    assert found.success_rate >= 0.6
    for episode in found.episodes:
        expected = episode.observations[-1][0] if episode.mode == 0 else episode.observations[-1][1]
        assert expected == pytest.approx(float(episode.success), abs=1e-5)


def test_observations_are_not_normalised_but_the_policy_gets_them_so():
    env = VecNormalize(DummyVecEnv([lambda: Monitor(gym.make(POINT))]), norm_reward=False)
    compass = Compass([0, 2])
    env.obs_rms.update(np.random.default_rng(0).normal(0.3, 0.5, (50, 2)))
    count_modes(compass, env, 4)
    (episode,) = count_modes(compass, env, 1).episodes
    np.testing.assert_allclose(episode.observations, [[0.25 * i, 0.0] for i in range(5)], atol=1e-5)
    assert not np.isclose(compass.seen[-1][0, 0], 0.75, atol=0.05)


def test_returns_are_not_normalised_and_statistics_stay():
    env = VecNormalize(DummyVecEnv([lambda: Monitor(gym.make(POINT))]))
    count = count_modes(Compass([0]), gym.make(POINT), 3)
    before = env.obs_rms.mean.copy(), env.ret_rms.var
    assert count_modes(Compass([0]), env, 3).mean_return == pytest.approx(count.mean_return, abs=1e-5)
    assert env.training
    np.testing.assert_array_equal(env.obs_rms.mean, before[0])
    assert env.ret_rms.var == before[1]


def test_mode_key():
    env = gym.make("sb3_qsm/Corridor-v0", reward_type="sparse")

    class Above:
        def predict(self, observation, state=None, episode_start=None, deterministic=False):
            (position,) = observation
            target = np.array([-0.3, 0.4] if position[0] < -0.35 else [0.5, 0.4] if position[0] < 0.4 else [1.0, 0.0])
            return np.clip((target - position) * 10, -1, 1).astype(np.float32)[None], state

    assert count_modes(Above(), env, 2).counts == {0: 2}  # the route
    assert count_modes(Above(), env, 1, mode_key="goal").counts == {0: 1}
    assert count_modes(Above(), env, 1, mode_key=lambda info: ("route", info["route"])).counts == {("route", 0): 1}
    with pytest.raises(
        ValueError, match="count_modes needs 'way' in the info .*there: 'success', 'is_success', 'goal', 'route'"
    ):
        count_modes(Above(), env, 1, mode_key="way")


class Boxed(gym.Wrapper):
    """The goal as an array."""

    def __init__(self, size):
        super().__init__(gym.make(POINT))
        self.size = size

    def step(self, action):
        *rest, info = self.env.step(action)
        return *rest, {**info, **({"goal": np.full(self.size, info["goal"])} if "goal" in info else {})}


def test_a_mode_in_an_array():
    assert count_modes(Compass([2]), Boxed(1), 2).counts == {2: 2}
    with pytest.raises(ValueError, match=r"needs a name or a number as mode, got array\(\[2, 2\]\) in 'goal'"):
        count_modes(Compass([2]), Boxed(2), 2)


@pytest.mark.parametrize("algorithm", [QSM, SAC, PPO])
def test_models_of_sb3_and_the_seed(algorithm):
    model = algorithm("MlpPolicy", POINT, seed=0, device="cpu")
    before = th.get_rng_state()

    def paths(seed):
        return [np.array(episode.observations) for episode in count_modes(model, gym.make(POINT), 3, seed=seed).episodes]

    first, again, other = paths(1), paths(1), paths(2)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))
    assert th.equal(before, th.get_rng_state())


@pytest.mark.parametrize("n_episodes", [0, -1, 2.5, True])
def test_bad_number_of_episodes(n_episodes):
    with pytest.raises(ValueError, match=f"n_episodes must be an integer >= 1, got {n_episodes}"):
        count_modes(Compass([0]), gym.make(POINT), n_episodes)


def test_environment_without_success():
    model = QSM("MlpPolicy", "Pendulum-v1", device="cpu", buffer_size=10)
    message = (
        "the info at the end of an episode must have 'success' or 'is_success', True if the episode succeeded; there: 'Tim"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        count_modes(model, gym.make("Pendulum-v1", max_episode_steps=3), 1)


def test_success_is_the_first_flag_that_says_something():
    assert success_of({"success": None, "is_success": True})
    assert not success_of({"success": 0.0, "is_success": True})
    with pytest.raises(ValueError, match="^success in the info at the end of an episode must be True or False, got nan$"):
        success_of({"success": float("nan")})
    with pytest.raises(ValueError, match="must have 'success' or 'is_success'"):
        success_of({"success": None})
