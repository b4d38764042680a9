"""Optuna: the search space, and studies that outlive their workers."""

import csv
import os
import re
import signal
import subprocess
import sys
import time

import export_study
import gymnasium as gym
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import FixedTrial, TrialState
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.envs import BitFlippingEnv

import sb3_qsm.envs  # noqa: F401  registers the environments
from sb3_qsm import QSM, DDiffPG
from sb3_qsm.zoo import convert_ddiffpg_params, convert_qsm_params, sample_ddiffpg_params, sample_qsm_params
from sb3_qsm.zoo.storage import fail_dead_trials, open_storage
from tests.zoo.conftest import worker

PLAIN = {"using_her_replay_buffer": False, "her_kwargs": {}}
HER = {"using_her_replay_buffer": True, "her_kwargs": {}}
# Trials of about a second
TINY = [
    "--env",
    "Pendulum-v1",
    "-n",
    "60",
    "--eval-episodes",
    "1",
    "--no-optim-plots",
    "--num-threads",
    "1",
    "--n-startup-trials",
    "3",
]
TINY += ["--n-evaluations", "1", "-optimize", "--eval-env-kwargs", "max_episode_steps:20", "-params", "learning_starts:50"]


def sampled_params(seed, additional_args):
    """Parameters that the sampler drew, as a stored trial has them."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    trial = study.ask()
    sample_qsm_params(trial, 1, 1, additional_args)
    return trial.params


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**31), her=st.booleans())
def test_the_converter_gives_what_the_sampler_gave(seed, her):
    additional_args = HER if her else PLAIN
    params = sampled_params(seed, additional_args)
    sampled = sample_qsm_params(FixedTrial(params), 1, 1, additional_args)
    assert sampled == convert_qsm_params(params)
    assert params == sampled_params(seed, additional_args)  # neither of the two changed them


@pytest.mark.parametrize("seed", range(12))
def test_every_sample_can_be_trained(seed):
    params = convert_qsm_params(sampled_params(seed, PLAIN))
    # As small as the test has time for; everything else is as sampled
    params["policy_kwargs"]["net_arch"] = [8]
    model = QSM("MlpPolicy", "Pendulum-v1", learning_starts=10, **{**params, "batch_size": 8})
    model.learn(14)
    assert model._n_updates == 4
    assert (model.q_grad_coef is None) == (sampled_params(seed, PLAIN)["gradient_scale"] == "temperature")


@pytest.mark.parametrize("seed", range(3))
def test_every_sample_of_ddiffpg_can_be_trained(seed):
    pytest.importorskip("dtaidistance")
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed)).ask()
    sampled = sample_ddiffpg_params(trial, 1, 1, PLAIN)
    params = convert_ddiffpg_params(trial.params)
    assert params == sampled
    assert trial.user_attrs == {"gamma": params["gamma"], "batch_size": params["batch_size"]}
    params["policy_kwargs"]["net_arch"] = [8]
    env = gym.make("sb3_qsm/NGoalPoint-v0")
    model = DDiffPG("MlpPolicy", env, learning_starts=10, **{**params, "batch_size": 8})
    model.learn(14)
    assert model._n_updates == 4


def test_samples_of_hindsight_replay_can_be_trained():
    params = convert_qsm_params(sampled_params(0, HER))
    params["policy_kwargs"]["net_arch"] = [8]
    env = BitFlippingEnv(n_bits=3, continuous=True, max_steps=3)
    model = QSM(
        "MultiInputPolicy", env, learning_starts=10, replay_buffer_class=HerReplayBuffer, **{**params, "batch_size": 8}
    )
    model.learn(14)
    assert model.replay_buffer.n_sampled_goal == params["replay_buffer_kwargs"]["n_sampled_goal"]


def test_space_covers_what_matters():
    seen = [convert_qsm_params(sampled_params(seed, PLAIN)) for seed in range(60)]
    for name, values in {
        "noise_schedule": {"cosine", "vp", "linear"},
        "sampler": {"ddpm", "ddpm_x0", "ddim"},
        "score_target": {"denoised", "noised", "clean", "paper"},
        "n_steps": {1, 2, 3, 5},
    }.items():
        assert {params[name] for params in seen} == values
    assert {params["q_grad_coef"] is None for params in seen} == {True, False}
    for name in (
        "temperature",
        "prior_std",
        "learning_rate",
        "tau",
        "gamma",
        "batch_size",
        "diffusion_steps",
        "exploration_noise",
    ):
        assert len({params[name] for params in seen}) > 5, name
    assert len({tuple(params["policy_kwargs"]["net_arch"]) for params in seen}) == 4


def test_study_report_and_training_of_the_best_trial(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    storage = tmp_path / "study" / "journal.log"
    where = ("--storage", storage, "--study-name", "pendulum", "-f", tmp_path / "logs")
    status, _, err = cli("train", *TINY, "--n-trials", 3, "--pruner", "none", "--sampler", "random", "--seed", 1, *where)
    assert status == 0, err
    (report,) = (tmp_path / "logs" / "qsm").glob("report_*.csv")
    assert len(report.read_text().splitlines()) == 1 + 3

    study = optuna.load_study(study_name="pendulum", storage=open_storage(str(storage)))
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 3
    # Trial 0 is one like every other
    for number in (0, study.best_trial.number):
        options = ("--trial-id", number, "-n", 30, "--eval-freq", -1, "--env", "Pendulum-v1", "--seed", 1)
        status, _, err = cli("train", *where, *options)
        assert status == 0, err
        run = max((tmp_path / "logs" / "qsm").glob("Pendulum-v1_*"), key=lambda path: int(path.name.split("_")[-1]))
        model = QSM.load(run / "Pendulum-v1.zip")
        expected = convert_qsm_params(study.trials[number].params)
        assert model.policy_kwargs["net_arch"] == expected["policy_kwargs"]["net_arch"]
        names = ("gamma", "tau", "diffusion_steps", "noise_schedule", "score_target", "prior_std", "q_grad_coef")
        for name in names:
            assert getattr(model, name) == expected[name], name


def study_of(cli, tmp_path, *options):
    """Run a small study and load it."""
    where = ["--storage", tmp_path / "journal.log", "--study-name", "small", "-f", tmp_path / "logs", "--sampler", "random"]
    status, _, err = cli("train", *TINY, "--pruner", "none", "--seed", 1, *where, *options)
    assert status == 0, err
    return optuna.load_study(study_name="small", storage=open_storage(str(tmp_path / "journal.log")))


def test_fixed_parameters_are_not_searched(cli, tmp_path):
    fixed = {"net_arch": "small", "batch_size_pow": 5, "diffusion_steps": 3, "tau": 0.01}
    texts = [f"{name}:{value}" for name, value in fixed.items()]
    study = study_of(cli, tmp_path, "--n-trials", 4, "--fixed", *texts)
    assert len(study.trials) == 4
    for trial in study.trials:
        assert {name: trial.params[name] for name in fixed} == fixed
        assert trial.params.keys() == sampled_params(0, PLAIN).keys()
    assert len({trial.params["learning_rate"] for trial in study.trials}) == 4
    # No run is left in which `enjoy` would look for a model
    assert [path.name for path in (tmp_path / "logs" / "qsm").glob("Pendulum-v1_*")] == []
    assert convert_qsm_params(study.trials[0].params)["policy_kwargs"]["net_arch"] == [64, 64]


def test_a_buffer_without_n_step_returns_is_searched_without_them(cli, tmp_path):
    given = ["optimize_memory_usage:True", "replay_buffer_kwargs:dict(handle_timeout_termination=False)"]
    study = study_of(cli, tmp_path, "--n-trials", 4, "-params", "learning_starts:50", *given)
    assert [(trial.state, trial.params["n_steps"]) for trial in study.trials] == [(TrialState.COMPLETE, 1)] * 4
    assert "n_steps" not in sampled_params(0, HER)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fixed", "tau"], "argument --fixed: 'tau' is not NAME:VALUE"),
        (
            ["--fixed", "tua:0.01"],
            "unknown name in --fixed, of what is searched for qsm: 'tua'; the nearest valid one is 'tau'",
        ),
        (["--fixed", "tau:2"], "argument --fixed: tau must be a value that is searched (0.001 to 0.08), got '2'"),
        (["--fixed", "tau:nan"], "argument --fixed: tau must be a value that is searched (0.001 to 0.08), got 'nan'"),
        (
            ["--fixed", "diffusion_steps:2.5"],
            "argument --fixed: diffusion_steps must be a value that is searched (2 to 20), got '2.5'",
        ),
        (
            ["--fixed", "tau:0.01", "net_arch:huge"],
            "argument --fixed: net_arch must be a value that is searched (small, medium, big, verybig), got 'huge'",
        ),
        (
            ["--fixed", "n_steps:3", "-params", "optimize_memory_usage:True"],
            "argument --fixed: n_steps must be 1 with optimize_memory_usage or a replay_buffer_class, got 3: such a buffer "
            "has no n-step returns",
        ),
    ],
)
def test_bad_fixed_parameters_are_refused_before_the_first_trial(cli, tmp_path, options, message):
    storage = tmp_path / "journal.log"
    where = ["--storage", storage, "--study-name", "bad", "-f", tmp_path / "logs"]
    status, _, err = cli("train", *TINY, *where, *options)
    assert status == 2
    assert err.splitlines()[-1] == f"sb3-qsm train: error: {message}"
    assert optuna.get_all_study_names(open_storage(str(storage))) == []


def test_fixed_parameters_are_those_of_a_study(cli, tmp_path):
    status, _, err = cli("train", "--env", "Pendulum-v1", "-n", 100, "-f", tmp_path, "--fixed", "tau:0.01")
    assert status == 2
    message = "argument --fixed: needs -optimize; a single training takes its hyperparameters from -params"
    assert err.splitlines()[-1] == f"sb3-qsm train: error: {message}"
    assert list(tmp_path.iterdir()) == []


def test_exported_study(cli, tmp_path, capfd):
    study = study_of(cli, tmp_path, "--n-trials", 3, "--n-evaluations", 2)
    journal, out = tmp_path / "journal.log", tmp_path / "out"
    study.ask()
    with pytest.raises(SystemExit):
        export_study.main([str(journal), "small", "--out", str(out)])
    assert "trials that are not finished: [3]" in capfd.readouterr().err
    study.tell(3, state=TrialState.FAIL)
    for name, message in ((["none.log", "small"], "no file 'none.log'"), ([str(journal), "tall"], "there: small")):
        with pytest.raises(SystemExit):
            export_study.main([*name, "--out", str(out)])
        assert message in capfd.readouterr().err
    assert not out.exists()

    for _ in range(2):  # the second time in place of the first
        export_study.main([str(journal), "small", "--out", str(out)])
    assert sorted(path.name for path in out.iterdir()) == ["small.csv", "small.log"]
    assert "worker" in journal.read_text()
    assert "worker_id" in (text := (out / "small.log").read_text()) and '"worker"' not in text
    copied = optuna.load_study(study_name="small", storage=open_storage(str(out / "small.log")))
    assert copied.user_attrs == study.user_attrs
    for one, other in zip(copied.trials, study.trials, strict=True):
        assert (one.number, one.state, one.value, one.params) == (other.number, other.state, other.value, other.params)
        assert one.intermediate_values == other.intermediate_values
    with (out / "small.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["state"] for row in rows] == ["COMPLETE"] * 3 + ["FAIL"]
    for row, trial in zip(rows[:3], study.trials, strict=False):
        assert float(row["value"]) == trial.value == float(row["evaluation_2"])
        assert float(row["params_tau"]) == trial.params["tau"]


BROKEN_ENV = """
import gymnasium as gym
import numpy as np

class Broken(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (2,))
    action_space = gym.spaces.Box(-1, 1, (1,))
    made = 0

    def __init__(self):
        Broken.made += 1
        # The command makes one environment, each trial two; those of every second trial are broken
        self.broken = Broken.made // 2 % 2 == 0
        self.steps = 0

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.steps += 1
        reward = float("nan") if self.broken and self.steps > WHEN else 1.0
        return np.zeros(2, np.float32), reward, False, self.steps >= 10, {}

gym.register(f"{__name__}-v0", Broken)
"""


@pytest.mark.parametrize("when", [0, 9])
def test_trials_that_are_not_finite_are_pruned(cli, tmp_path, monkeypatch, when):
    # At once the critic's loss is not finite; in a trial too short to learn from it the return is not
    (tmp_path / f"broken_env_{when}.py").write_text(BROKEN_ENV.replace("WHEN", str(when)))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    options = ["--env", f"broken_env_{when}-v0", "--gym-packages", f"broken_env_{when}", "-n", "40", "--eval-episodes", "1"]
    options += ["--n-evaluations", "1", "--pruner", "none", "--sampler", "random", "--no-optim-plots", "-optimize"]
    starts = 10 if when == 0 else 100
    where = ["--storage", tmp_path / "journal.log", "--study-name", "broken", "-f", tmp_path / "logs"]
    status, _, err = cli("train", *options, "--n-trials", 4, *where, "-params", f"learning_starts:{starts}")
    assert status == 0, err
    study = optuna.load_study(study_name="broken", storage=open_storage(str(tmp_path / "journal.log")))
    states = [trial.state for trial in study.trials]
    assert states.count(TrialState.PRUNED) >= 1
    assert states.count(TrialState.COMPLETE) >= 1
    assert states.count(TrialState.PRUNED) + states.count(TrialState.COMPLETE) == 4
    assert len(list((tmp_path / "logs" / "qsm").glob("report_*.csv"))) == 1


def test_a_study_without_a_finished_trial_says_so(cli, tmp_path, monkeypatch):
    (tmp_path / "always_broken_env.py").write_text(BROKEN_ENV.replace("WHEN", "0").replace("% 2 == 0", ">= 0"))
    monkeypatch.syspath_prepend(tmp_path)
    options = [
        "--env",
        "always_broken_env-v0",
        "--gym-packages",
        "always_broken_env",
        "-n",
        "20",
        "--eval-episodes",
        "1",
        "-f",
        tmp_path,
    ]
    options += ["--n-evaluations", "1", "--no-optim-plots", "-optimize", "--n-trials", 2, "-params", "learning_starts:10"]
    status, _, err = cli("train", *options)
    assert status == 2
    assert err.splitlines()[-1] == "sb3-qsm train: error: no trial was completed: 2 pruned"


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.1)


@pytest.mark.parametrize("kind", ["postgres", "journal"])
def test_a_killed_worker_loses_its_trial_only(request, tmp_path, kind):
    url = request.getfixturevalue("postgres") if kind == "postgres" else str(tmp_path / "journal.log")
    total = 8
    where = ["--storage", url, "--study-name", kind, "-f", tmp_path / "logs", "--max-total-trials", total, "--heartbeat", 1]
    options = [*TINY, "--pruner", "none"]
    workers = [worker(*options, *where, "--seed", seed) for seed in (1, 2)]
    try:
        storage = open_storage(url)
        wait_for(lambda: kind in optuna.get_all_study_names(storage))
        study = optuna.load_study(study_name=kind, storage=storage)

        def trials_of(process, state):
            return [t for t in study.get_trials(states=(state,)) if t.user_attrs.get("worker", {}).get("pid") == process.pid]

        wait_for(lambda: trials_of(workers[0], TrialState.COMPLETE) and trials_of(workers[0], TrialState.RUNNING))
        os.kill(workers[0].pid, signal.SIGKILL)
        assert workers[0].wait() == -signal.SIGKILL
        finished = {t.number: t.value for t in study.get_trials(states=(TrialState.COMPLETE,))}
        output, _ = workers[1].communicate(timeout=240)
        assert workers[1].returncode == 0, output
    finally:
        for process in workers:
            process.kill()
            process.wait()
    trials = study.get_trials()
    states = [trial.state for trial in trials]
    assert states.count(TrialState.COMPLETE) == total
    assert states.count(TrialState.FAIL) == len(trials) - total == 1
    lost = next(trial for trial in trials if trial.state == TrialState.FAIL)
    assert lost.user_attrs["worker"]["pid"] == workers[0].pid
    # What was finished before the kill is as it was
    assert finished
    assert all(trials[number].value == value for number, value in finished.items())
    assert len(list((tmp_path / "logs" / "qsm").glob("report_*.csv"))) >= 1


def test_a_sample_that_does_not_go_with_what_is_given_is_pruned(cli, tmp_path):
    """Half of the trials have fewer diffusion steps than are asked for in acting; the study goes on."""
    status, out, err = cli(
        *("train", "--env", "Pendulum-v1", "-optimize", "-n", 110, "--n-trials", 6, "--n-evaluations", 1),
        *("--eval-episodes", 1, "--no-optim-plots", "--seed", 1, "-f", tmp_path),
        *("-params", "learning_starts:100", "sampling_steps:10", "--fixed", "net_arch:small", "batch_size_pow:5"),
    )
    assert status == 0, err
    pruned = re.findall(
        r"Trial \d+ pruned: sampling_steps must be None or an integer from 1 to diffusion_steps=\d+, got 10", out
    )
    assert 1 <= len(pruned) <= 5


def test_an_interrupt_ends_a_study_with_trials_of_dead_workers(cli, tmp_path, monkeypatch):
    from rl_zoo3.exp_manager import ExperimentManager

    from sb3_qsm.zoo.storage import this_machine

    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    study = optuna.create_study(study_name="study", storage=open_storage(str(tmp_path / "journal.log")), direction="maximize")
    study.tell(study.ask(), 1.0)
    study.ask().set_user_attr("worker", {"machine": this_machine(), "host": "here", "pid": gone.pid})
    begun = []

    def interrupted(self, trial):
        begun.append(trial.number)
        raise KeyboardInterrupt

    monkeypatch.setattr(ExperimentManager, "objective", interrupted)
    options = ("--storage", tmp_path / "journal.log", "--study-name", "study", "--max-total-trials", 5, "--no-optim-plots")
    cli("train", "--env", "Pendulum-v1", "-f", tmp_path / "logs", "-optimize", *options)
    assert begun == [2]


def test_trials_of_living_workers_are_left_alone(tmp_path):
    study = optuna.create_study(storage=open_storage(str(tmp_path / "journal.log")))
    mine, elsewhere, unmarked = study.ask(), study.ask(), study.ask()
    from sb3_qsm.zoo.storage import mark_worker

    mark_worker(mine)
    elsewhere.set_user_attr("worker", {"machine": "another", "host": "another", "pid": 1 << 30})
    assert fail_dead_trials(study) == (0, 2)
    assert [trial.state for trial in study.trials] == [TrialState.RUNNING] * 3
    assert unmarked.number == 2


@pytest.mark.slow
def test_twenty_trials_by_two_workers_one_killed_half_way(postgres, tmp_path):
    """The long form, with the whole search space on Pendulum-v1."""
    where = ["--storage", postgres, "--study-name", "twenty", "-f", tmp_path, "--max-total-trials", 20, "--heartbeat", 2]
    options = ["--env", "Pendulum-v1", "-n", 500, "--n-evaluations", 2, "--eval-episodes", 2, "--n-startup-trials", 5]
    options += ["-optimize", "--no-optim-plots", "--num-threads", 1]
    workers = [worker(*options, *where, "--seed", seed, "-params", "learning_starts:200") for seed in (1, 2)]
    try:
        storage = open_storage(postgres)
        wait_for(lambda: "twenty" in optuna.get_all_study_names(storage))
        study = optuna.load_study(study_name="twenty", storage=storage)
        done = (TrialState.COMPLETE, TrialState.PRUNED)
        wait_for(lambda: len(study.get_trials(states=done)) >= 9, seconds=1800)
        workers[1].kill()
        output, _ = workers[0].communicate(timeout=3600)
        assert workers[0].returncode == 0, output
    finally:
        for process in workers:
            process.kill()
            process.wait()
    assert len(study.get_trials(states=done)) == 20
    assert not study.get_trials(states=(TrialState.RUNNING,))
