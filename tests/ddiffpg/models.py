"""Small models of DDiffPG on a point between goals."""

import copy
import json
import random
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_qsm.ddiffpg import DDiffPG
from sb3_qsm.envs import NGoalPointEnv

SMALL: dict[str, Any] = {
    "learning_starts": 20,
    "train_freq": 5,
    "batch_size": 16,
    "buffer_size": 1000,
    "diffusion_steps": 3,
    "clustering_freq": 60,
    "cluster_threshold": 0.8,
    "min_mode_size": 3,
    "target_action_steps": 2,
    "device": "cpu",
}
MAX_STEPS = 8


def make_point(n_goals: int = 2, **kwargs: Any) -> gym.Env:
    """A point that comes to a goal by chance in about every second episode."""
    env = NGoalPointEnv(n_goals, step_size=0.6, goal_radius=0.45, reward_type="sparse", **kwargs)
    return Monitor(gym.wrappers.TimeLimit(env, MAX_STEPS))


def make_env(n_envs: int = 1, **kwargs: Any) -> DummyVecEnv:
    env = DummyVecEnv([lambda: make_point(**kwargs)] * n_envs)
    env.seed(0)
    return env


def make_model(env=None, policy: str = "MlpPolicy", policy_kwargs=None, **kwargs: Any) -> DDiffPG:
    policy_kwargs = {"net_arch": [16], **(policy_kwargs or {})}
    return DDiffPG(policy, env or make_env(), policy_kwargs=policy_kwargs, **{"seed": 0, **SMALL, **kwargs})


#: By arguments, what was trained and the states that the global random numbers were left in
_TRAINED: dict[str, tuple[DDiffPG, th.Tensor, dict[str, Any], tuple[Any, ...]]] = {}


def make_trained(steps: int = 200, **kwargs: Any) -> DDiffPG:
    """A model that knows two modes. With arguments that can be written down it is trained once, and copied."""
    try:
        key = json.dumps([steps, kwargs])
    except TypeError:
        key = ""
    if key in _TRAINED:
        model, torch_state, numpy_state, python_state = _TRAINED[key]
        th.set_rng_state(torch_state)
        np.random.set_state(numpy_state)
        random.setstate(python_state)
        return copy.deepcopy(model)
    model = make_model(**kwargs).learn(steps)
    assert len(model.modes) == 2
    model.set_logger(Logger(None, []))
    if key:
        _TRAINED[key] = copy.deepcopy(model), th.get_rng_state(), np.random.get_state(legacy=False), random.getstate()
    return model


def picture_of(position) -> np.ndarray:
    """A white pixel where the point is."""
    picture = np.zeros((36, 36, 1), dtype=np.uint8)
    column, row = np.round((np.asarray(position) + 1.5) / 3.0 * 35).astype(int)
    picture[row, column] = 255
    return picture


def position_in(pictures) -> np.ndarray:
    """Where the white pixel is."""
    flat = np.asarray(pictures).reshape(len(pictures), -1).argmax(axis=1)
    return np.stack([flat % 36, flat // 36], axis=1) / 35 * 3.0 - 1.5


def make_picture_env() -> gym.Env:
    space = spaces.Box(0, 255, (36, 36, 1), np.uint8)
    return gym.wrappers.TransformObservation(make_point(), picture_of, space)


def make_dict_env() -> gym.Env:
    env = make_point()
    space = spaces.Dict({"achieved_goal": env.observation_space, "two": spaces.Discrete(2)})
    return gym.wrappers.TransformObservation(env, lambda position: {"achieved_goal": position, "two": 1}, space)
