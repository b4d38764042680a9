"""A killed run goes on as if it had not been."""

import os
import random
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.callbacks import CallbackList, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.monitor import load_results
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

from sb3_qsm import QSM
from sb3_qsm.common.checkpoint import (
    CHECKPOINT_NAME,
    CheckpointError,
    RunCheckpointCallback,
    read_info,
    resume,
    save_checkpoint,
)

SMALL = {"learning_starts": 20, "batch_size": 16, "buffer_size": 500, "policy_kwargs": {"net_arch": [16, 16]}}
VARIANTS = {
    "defaults": {},
    "n_steps": {"n_steps": 3},
    "normalized": {},
    "two_envs": {"gradient_steps": -1},
    "two_processes": {"gradient_steps": 2},
    "full_buffer": {"buffer_size": 30},
    "schedule": {"actor_learning_rate": lambda progress: 1e-3 * progress, "policy_delay": 2, "exploration_noise": 0.3},
    "memory": {"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}},
}


def make_env(variant: str):
    n_envs = 2 if variant.startswith("two") else 1
    env = make_vec_env(
        "Pendulum-v1", n_envs=n_envs, seed=3, vec_env_cls=SubprocVecEnv if "processes" in variant else DummyVecEnv
    )
    return VecNormalize(env, gamma=0.9) if variant == "normalized" else env


def learner_state(model):
    """Every tensor that an update reads or writes, and every counter, by name."""
    state = {f"{name}.{key}": value for name, values in model.get_parameters().items() for key, value in flatten(values)}
    for name in model._get_torch_save_params()[1]:
        state[name] = getattr(model, name).clone()
    return {**state, "n_updates": model._n_updates, "num_timesteps": model.num_timesteps, "episodes": model._episode_num}


def flatten(values, prefix=""):
    if isinstance(values, dict):
        for key, value in values.items():
            yield from flatten(value, f"{prefix}{key}.")
    elif isinstance(values, (list, tuple)):
        for key, value in enumerate(values):
            yield from flatten(value, f"{prefix}{key}.")
    else:
        yield prefix, values.clone() if isinstance(values, th.Tensor) else values


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        same = th.equal(value, second[name]) if isinstance(value, th.Tensor) else value == second[name]
        assert same, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_updates_after_resume_are_those_without_it(tmp_path, variant):
    model = QSM("MlpPolicy", make_env(variant), seed=1, **{**SMALL, **VARIANTS[variant]})
    model.learn(61, callback=RunCheckpointCallback(1000, tmp_path))
    assert model.replay_buffer.full == (variant == "full_buffer")
    before = learner_state(model)
    model.train(gradient_steps=5, batch_size=16)
    expected = learner_state(model)
    with pytest.raises(AssertionError, match="policy"):  # else the test could not fail
        assert_same(before, expected)

    random.seed(0)
    np.random.seed(0)
    th.manual_seed(0)
    env = make_env(variant)
    again = resume(QSM, tmp_path, env)
    assert_same(learner_state(again), before)
    again.set_logger(model.logger)
    # The progress of a schedule belongs to the learner too
    assert again._current_progress_remaining == model._current_progress_remaining
    again.train(gradient_steps=5, batch_size=16)
    if variant != "memory":  # there the cut-off transition has to be marked as an end, see the page on resuming
        assert_same(learner_state(again), expected)
    if variant == "normalized":
        assert np.array_equal(env.obs_rms.mean, model.env.obs_rms.mean)
        assert env.ret_rms.var == model.env.ret_rms.var != 1.0
    env.close()
    model.env.close()
