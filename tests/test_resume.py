"""A killed run goes on as if it had not been."""

import os
import random
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
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
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


def small(**kwargs):
    # A new dictionary each time, since SB3 adds to policy_kwargs
    return {
        "learning_starts": 20,
        "batch_size": 16,
        "buffer_size": 500,
        "diffusion_steps": 3,
        "policy_kwargs": {"net_arch": [16, 16]},
        **kwargs,
    }


VARIANTS = {
    "defaults": {},
    "n_steps": {"n_steps": 1},
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
    model = QSM("MlpPolicy", make_env(variant), seed=1, **small(**VARIANTS[variant]))
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


def test_hindsight_replay_survives_and_the_cut_off_episode_is_never_replayed(tmp_path):
    def make():
        # Episodes of 7 steps: the run below stops inside one
        return make_vec_env(lambda: BitFlippingEnv(n_bits=7, continuous=True, max_steps=7), seed=0)

    her = {"replay_buffer_class": HerReplayBuffer, "replay_buffer_kwargs": {"n_sampled_goal": 2}}
    model = QSM("MultiInputPolicy", make(), seed=1, **small(), **her)
    model.learn(60, callback=RunCheckpointCallback(1000, tmp_path))
    model.train(gradient_steps=3, batch_size=16)
    again = resume(QSM, tmp_path, make())
    unfinished = again.replay_buffer.pos - 1
    assert again.replay_buffer.ep_length[unfinished] == 0
    again.set_logger(model.logger)
    again.train(gradient_steps=3, batch_size=16)
    assert_same(learner_state(again), learner_state(model))

    again.learn(40, reset_num_timesteps=False)
    buffer = again.replay_buffer
    assert buffer.ep_length[unfinished] == 0
    # Without the reset of the episode's start the next episode would have swallowed it
    assert buffer.ep_start[unfinished + 1] == unfinished + 1
    assert buffer.ep_length[unfinished + 1] > 0


def test_n_step_returns_stop_where_the_run_was_cut(tmp_path):
    model = QSM("MlpPolicy", make_env("n_steps"), n_steps=3, seed=1, **small())
    model.learn(61, callback=RunCheckpointCallback(1000, tmp_path))
    again = resume(QSM, tmp_path, make_env("n_steps"))
    again.learn(20, reset_num_timesteps=False)
    buffer = again.replay_buffer
    sample = buffer._get_samples(np.array([60, 59, 58, 61]))
    # gamma to the power of the steps in the return: 1 at the last transition before the cut, then 2, 3; 3 after it
    assert np.allclose(sample.discounts.flatten(), [0.99, 0.99**2, 0.99**3, 0.99**3])
    assert (sample.dones == 0).all()  # bootstrapped, as at a time limit


def test_other_n_steps_than_the_checkpoints(tmp_path):
    model = QSM("MlpPolicy", make_env("n_steps"), n_steps=3, seed=1, **small())
    model.learn(20, callback=RunCheckpointCallback(100, tmp_path))
    with pytest.raises(CheckpointError, match="replay buffer has n_steps=3, the model's n_steps=5"):
        resume(QSM, tmp_path, make_env("n_steps"), n_steps=5)


def test_learning_goes_on_with_every_counter(tmp_path):
    def callbacks(env):
        evaluation = EvalCallback(env, eval_freq=40, n_eval_episodes=1, log_path=str(tmp_path), deterministic=True, verbose=0)
        return [evaluation, RunCheckpointCallback(50, tmp_path)]

    def make(**kwargs):
        return make_vec_env("Pendulum-v1", seed=3, monitor_dir=str(tmp_path), monitor_kwargs=kwargs)

    model = QSM("MlpPolicy", make(), seed=1, **small())
    first = callbacks(make_vec_env("Pendulum-v1", seed=4))
    model.learn(410, callback=first)
    model.env.close()
    # As if killed at step 450, with an episode finished since the checkpoint
    with open(tmp_path / "0.monitor.csv", "a") as file:
        file.write("-1.0,200,99.0\n-1.0,2")
    info = read_info(tmp_path)
    assert info["num_timesteps"] == 410

    again = QSM.resume(tmp_path, make(override_existing=False), verbose=0)
    assert isinstance(again, QSM)
    assert again.num_timesteps == 410
    second = callbacks(make_vec_env("Pendulum-v1", seed=4))
    second[0].best_mean_reward = 1e9  # a new callback's memory must not count
    again.learn(600 - again.num_timesteps, callback=second, reset_num_timesteps=False)
    assert again.num_timesteps == 600
    assert again._n_updates == 600 - 20
    assert second[0].evaluations_timesteps == list(range(40, 601, 40))
    assert np.load(tmp_path / "evaluations.npz")["timesteps"].tolist() == list(range(40, 601, 40))
    assert second[0].best_mean_reward == max(map(np.mean, second[0].evaluations_results))
    again.env.close()
    results = load_results(str(tmp_path))
    assert results["l"].tolist() == [200, 200]  # the third episode began at step 411 and was not over at 600
    assert (np.diff(results["t"]) > 0).all()
    assert again._episode_num == 2


def test_start_states_do_not_repeat(tmp_path):
    model = QSM("MlpPolicy", make_env("defaults"), seed=1, **small())
    model.learn(61, callback=RunCheckpointCallback(1000, tmp_path))
    first_states = [model.replay_buffer.observations[0, 0]]
    again = resume(QSM, tmp_path, make_env("defaults"))
    again.learn(10, reset_num_timesteps=False)
    assert not np.allclose(again.replay_buffer.observations[61, 0], first_states[0])
    # The next start state is the one that the uninterrupted run's environment would have drawn next
    assert np.array_equal(again.replay_buffer.observations[61], model.env.reset())


def test_any_off_policy_algorithm(tmp_path):
    settings = {name: value for name, value in small().items() if name != "diffusion_steps"}
    model = SAC("MlpPolicy", make_env("defaults"), seed=1, **settings)
    model.learn(61, callback=RunCheckpointCallback(1000, tmp_path))
    model.train(gradient_steps=3, batch_size=16)
    again = resume(SAC, tmp_path, make_env("defaults"))
    again.set_logger(model.logger)
    again.train(gradient_steps=3, batch_size=16)
    assert_same(learner_state(again), learner_state(model))
    assert th.equal(again.log_ent_coef, model.log_ent_coef)


def test_a_checkpoint_is_never_half_written(tmp_path):
    """The process dies in the middle of the second write: the first checkpoint is still the newest and whole."""
    script = f"""
import os, sys
sys.path[:0] = {sys.path!r}
from sb3_qsm import QSM
from sb3_qsm.common import checkpoint
model = QSM("MlpPolicy", "Pendulum-v1", learning_starts=20, batch_size=16, buffer_size=500, policy_kwargs={{"net_arch": [16]}})
model.learn(30)
checkpoint.save_checkpoint(model, {str(tmp_path)!r})
model.learn(30, reset_num_timesteps=False)
real = checkpoint.pickle.dump
def dump(state, file, **kwargs):
    file.write(b"half of it")
    os.kill(os.getpid(), 9)
checkpoint.pickle.dump = dump
checkpoint.save_checkpoint(model, {str(tmp_path)!r})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    assert len(list(tmp_path.glob(f".{CHECKPOINT_NAME}.*.tmp"))) == 1  # else the test shows nothing
    assert read_info(tmp_path)["num_timesteps"] == 30
    env = make_env("defaults")
    model = resume(QSM, tmp_path, env)
    save_checkpoint(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT_NAME]


@pytest.fixture(scope="module")
def checkpoint_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    QSM("MlpPolicy", make_env("defaults"), **small()).learn(30, callback=RunCheckpointCallback(1000, folder))
    return folder


def test_refuses_what_is_no_checkpoint(tmp_path, checkpoint_folder):
    env = make_env("defaults")
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*expected a folder that holds checkpoint\.zip"):
        resume(QSM, tmp_path, env)
    (tmp_path / CHECKPOINT_NAME).write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="is not a checkpoint written by sb3_qsm"):
        resume(QSM, tmp_path, env)
    QSM("MlpPolicy", env, **small()).save(tmp_path / CHECKPOINT_NAME)  # a zip file, but a model
    with pytest.raises(CheckpointError, match="is not a checkpoint written by sb3_qsm"):
        resume(QSM, tmp_path, env)

    whole = (checkpoint_folder / CHECKPOINT_NAME).read_bytes()
    with zipfile.ZipFile(checkpoint_folder / CHECKPOINT_NAME) as archive:
        inside = archive.getinfo("replay_buffer.pkl").header_offset + 200
    (tmp_path / CHECKPOINT_NAME).write_bytes(whole[:inside] + bytes([whole[inside] ^ 1]) + whole[inside + 1 :])
    with pytest.raises(CheckpointError, match=r"damaged: wrong checksum of replay_buffer\.pkl"):
        resume(QSM, tmp_path, env)


def test_refuses_the_checkpoint_of_something_else(checkpoint_folder):
    before = (checkpoint_folder / CHECKPOINT_NAME).read_bytes()
    with pytest.raises(CheckpointError, match="is a checkpoint of QSM, not of SAC"):
        resume(SAC, checkpoint_folder, make_env("defaults"))
    with pytest.raises(CheckpointError, match="does not fit the environment: Observation spaces do not match"):
        resume(QSM, checkpoint_folder, make_vec_env("MountainCarContinuous-v0"))
    with pytest.raises(CheckpointError, match="n_envs=1, env has 2"):
        resume(QSM, checkpoint_folder, make_env("two_envs"))
    with pytest.raises(CheckpointError, match="env has VecNormalize, the checkpoint has not"):
        resume(QSM, checkpoint_folder, make_env("normalized"))
    # A new run must not overwrite an old one's
    with pytest.raises(CheckpointError, match="holds a checkpoint of QSM at step 30, this is QSM at step 0"):
        QSM("MlpPolicy", make_env("defaults"), **small()).learn(30, callback=RunCheckpointCallback(10, checkpoint_folder))
    with pytest.raises(ValueError, match="save_freq must be an integer >= 1, got 0"):
        RunCheckpointCallback(0, checkpoint_folder)
    assert (checkpoint_folder / CHECKPOINT_NAME).read_bytes() == before


def test_size_is_that_of_what_was_written(tmp_path):
    model = QSM("MlpPolicy", make_env("defaults"), **small(buffer_size=1_000_000))
    model.learn(30)
    save_checkpoint(model, tmp_path)
    assert (tmp_path / CHECKPOINT_NAME).stat().st_size < 1_000_000  # the whole buffer has 40 MB
    again = resume(QSM, tmp_path, make_env("defaults"))
    assert again.replay_buffer.observations.shape == (1_000_000, 1, 3)
    assert np.array_equal(again.replay_buffer.observations[:31], model.replay_buffer.observations[:31])


def test_first_random_actions_go_on(tmp_path):
    whole = QSM("MlpPolicy", make_env("defaults"), **small(learning_starts=100, seed=0)).learn(40)
    QSM("MlpPolicy", make_env("defaults"), **small(learning_starts=100, seed=0)).learn(
        20, callback=RunCheckpointCallback(20, tmp_path)
    )
    model = resume(QSM, tmp_path, make_env("defaults"))
    model.learn(20, reset_num_timesteps=False)
    np.testing.assert_array_equal(model.replay_buffer.actions[:40], whole.replay_buffer.actions[:40])


def test_environments_in_processes_of_their_own_need_no_monitor(tmp_path):
    def make():
        return SubprocVecEnv([lambda: gym.make("Pendulum-v1")] * 2)

    env = make()
    try:
        QSM("MlpPolicy", env, **small()).learn(30, callback=RunCheckpointCallback(10, tmp_path))
    finally:
        env.close()
    env = make()
    try:
        model = resume(QSM, tmp_path, env)
        model.learn(10, reset_num_timesteps=False, callback=RunCheckpointCallback(10, tmp_path))
    finally:
        env.close()
    assert read_info(tmp_path)["num_timesteps"] == 40


INTERVAL = 100


class WriteStep(BaseCallback):
    """Leave the step in a file, for who wants to know when the process was killed."""

    def _on_step(self):
        # In one write and never empty, so that a kill cannot come between
        descriptor = os.open(os.environ["SB3_QSM_TEST_STEP"], os.O_WRONLY | os.O_CREAT)
        os.pwrite(descriptor, b"%8d" % self.num_timesteps, 0)
        os.close(descriptor)
        return True


def start(*arguments, step_file):
    """Start ``sb3-qsm train`` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "sb3_qsm", "train", *map(str, arguments)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "SB3_QSM_TEST_STEP": str(step_file)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def newest(run):
    """Step of the newest checkpoint, which must be whole, or -1."""
    return read_info(run)["num_timesteps"] if (run / CHECKPOINT_NAME).is_file() else -1


def kill_again_and_again(folder, steps, kills, seed):
    """
    Train on Pendulum-v1, send SIGKILL at random moments, and train on to the end.

    Gives back the run's folder and a line for each kill: step resumed from, step when killed, step of the newest checkpoint.
    """
    rng = random.Random(seed)
    step_file, run = folder / "step", folder / "logs" / "qsm" / "Pendulum-v1_1"
    new = ["--env", "Pendulum-v1", "-n", steps, "-f", folder / "logs", "--checkpoint-freq", INTERVAL, "--eval-freq", 500]
    new += ["--eval-episodes", 1, "--seed", seed, "-params", "learning_starts:50", "batch_size:16", "diffusion_steps:2"]
    new += ["policy_kwargs:dict(net_arch=[16])", "callback:'tests.test_resume.WriteStep'"]
    lives = []
    for _ in range(kills):
        resumed_from = newest(run)
        process = start(*(["--resume", run] if lives else new), step_file=step_file)
        # Wait for checkpoints of its own, then strike anywhere in the interval that follows, writing included
        goal = max(resumed_from, 0) + INTERVAL * rng.randint(1, 5)
        deadline = time.monotonic() + 600
        while newest(run) < goal:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "waited too long"
            time.sleep(0.01)
        time.sleep(rng.random() * 0.3)
        process.kill()
        output, _ = process.communicate()
        assert process.returncode == -9, output
        killed_at = int(step_file.read_text())
        lives.append((resumed_from, killed_at, newest(run)))
        # At most one interval is lost; the step callbacks run before the transition is stored and learned from
        assert 0 <= killed_at - newest(run) <= INTERVAL + 1
        assert newest(run) > resumed_from
        if len(lives) > 1:
            assert f"Resuming at step {resumed_from} of {steps}" in output
    output, _ = (last := start("--resume", run, step_file=step_file)).communicate(timeout=900)
    assert last.returncode == 0, output
    assert f"Resuming at step {lives[-1][-1]} of {steps}" in output
    return run, lives


def check_finished(run, steps):
    model = QSM.load(run / "Pendulum-v1.zip")
    assert model.num_timesteps == steps
    assert model._n_updates == steps - 50
    assert np.load(run / "evaluations.npz")["timesteps"].tolist() == list(range(500, steps + 1, 500))
    results = load_results(str(run))
    # Every kill cuts an episode off; none is counted twice
    assert set(results["l"]) == {200}
    assert len(results) <= steps // 200
    assert (np.diff(results["t"]) > 0).all()
    # A finished run needs no checkpoint
    assert {path.name for path in run.iterdir() if path.is_file()} == {
        "0.monitor.csv",
        "Pendulum-v1.zip",
        "best_model.zip",
        "evaluations.npz",
    }


def test_killed_run_finishes_from_the_command_line(tmp_path):
    pytest.importorskip("rl_zoo3")
    run, lives = kill_again_and_again(tmp_path, steps=1000, kills=2, seed=1)
    assert len(lives) == 2
    check_finished(run, steps=1000)


@pytest.mark.slow
def test_ten_kills(tmp_path, capsys):
    pytest.importorskip("rl_zoo3")
    run, lives = kill_again_and_again(tmp_path, steps=8000, kills=10, seed=2)
    with capsys.disabled():
        print("\nresumed_from,killed_at,newest_checkpoint")
        for line in lives:
            print(*line, sep=",")
    check_finished(run, steps=8000)
