"""What a user gets wrong is answered by one line, an exit status that is not 0, and nothing is overwritten."""

import difflib
import os
import shutil

import numpy as np
import optuna
import pytest

from sb3_qsm import QSM
from sb3_qsm.zoo.manager import constructor_arguments
from sb3_qsm.zoo.storage import open_storage
from tests.zoo.conftest import SHORT

PENDULUM = ("--env", "Pendulum-v1")
HERE = ("-f", "{tmp}/logs")
STUDY = ("--storage", "{tmp}/journal.log", "--study-name", "study")


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


BAD = {
    "unknown subcommand": (["trian"], ["unknown subcommand 'trian'; did you mean 'train'?", "record_video"]),
    "unknown env": (["train", "--env", "Pendulum-v9", *HERE], ["--env", "'Pendulum-v9'", "did you mean 'Pendulum-v1'?"]),
    "unknown env, playing": (["enjoy", "--env", "Pendulmu-v1", *HERE], ["--env", "'Pendulmu-v1'", "'Pendulum-v1'"]),
    "unknown algorithm": (["train", "--algo", "qms", *PENDULUM, *HERE], ["--algo", "'qms'", "qsm", "sac"]),
    "unknown option": (["train", *PENDULUM, *HERE, "--sede", "1"], ["--sede"]),
    "not a number": (["train", *PENDULUM, *HERE, "-n", "many"], ["--n-timesteps", "'many'"]),
    "unknown gym package": (["train", *PENDULUM, *HERE, "--gym-packages", "no_such"], ["--gym-packages", "'no_such'"]),
    "missing configuration": (
        ["train", *PENDULUM, *HERE, "-conf", "{tmp}/missing.yml"],
        ["--conf-file", "missing.yml", "No such file"],
    ),
    "configuration that is not shipped": (
        ["train", *PENDULUM, *HERE, "-conf", "qsm_papr"],
        ["--conf-file", "'qsm_papr'", "ddiffpg, qsm, qsm_paper"],
    ),
    "broken YAML": (
        ["train", *PENDULUM, *HERE, "-conf", "{tmp}/broken.yml"],
        ["--conf-file", "broken.yml", "in line 3, column 1"],
    ),
    "YAML of another shape": (["train", *PENDULUM, *HERE, "-conf", "{tmp}/list.yml"], ["--conf-file", "list.yml", "must map"]),
    "wrong name in YAML": (
        ["train", *PENDULUM, *HERE, "-conf", "{tmp}/wrong_name.yml"],
        ["'temprature'", "wrong_name.yml", "nearest valid one is 'temperature'"],
    ),
    "YAML without a policy": (["train", *PENDULUM, *HERE, "-conf", "{tmp}/no_policy.yml"], ["no_policy.yml has no policy"]),
    "YAML without a length": (["train", *PENDULUM, *HERE, "-conf", "{tmp}/no_length.yml"], ["has no n_timesteps"]),
    "number of environments": (["train", *PENDULUM, *HERE, "-params", "n_envs:'two'"], ["n_envs", "integer >= 1, got 'two'"]),
    "no environments": (["train", *PENDULUM, *HERE, "-params", "n_envs:0"], ["n_envs must be an integer >= 1, got 0"]),
    "no steps": (["train", *PENDULUM, *HERE, "-n", "0"], ["argument -n: must be an integer >= 1, got 0"]),
    "no evaluation": (["train", *PENDULUM, *HERE, "--eval-episodes", "0"], ["--eval-episodes", ">= 1, got 0"]),
    "unknown device": (["train", *PENDULUM, *HERE, "--device", "foo"], ["--device", "foo"]),
    "expression that fails": (["train", *PENDULUM, *HERE, "-params", "temperature:1/0"], ["NAME:VALUE", "division by zero"]),
    "text that is no Python": (
        ["train", *PENDULUM, *HERE, "-params", "policy_kwargs:'dict(net_arch=[64'"],
        ["SyntaxError", "never closed"],
    ),
    "unknown buffer": (
        ["train", *PENDULUM, *HERE, "-params", "replay_buffer_class:'HerReplyBuffer'"],
        ["NameError", "HerReplyBuffer"],
    ),
    "activation by name": (
        ["train", *PENDULUM, *HERE, "-params", "policy_kwargs:dict(activation_fn='relu')"],
        ["activation_fn must be a class, such as nn.SiLU, got 'relu'"],
    ),
    "wrong name": (
        ["train", *PENDULUM, *HERE, "-params", "learning_rat:0.1"],
        ["'learning_rat'", "nearest valid one is 'learning_rate'"],
    ),
    "wrong name of the policy": (
        ["train", *PENDULUM, *HERE, "-params", "policy_kwargs:dict(net_arhc=[8])"],
        ["'net_arhc'", "policy_kwargs", "nearest valid one is 'net_arch'"],
    ),
    "value that is no expression": (["train", *PENDULUM, *HERE, "-params", "sampler:ddim"], ["NAME:VALUE", "'ddim'"]),
    "value out of range": (
        ["train", *PENDULUM, *HERE, "-params", "temperature:-1"],
        ["temperature must be a number > 0, got -1"],
    ),
    "unknown schedule": (
        ["train", *PENDULUM, *HERE, "-params", "actor_learning_rate:'cosin_1'"],
        ["actor_learning_rate 'cosin_1'", "cosine_NUMBER_DECAYSTEPS"],
    ),
    "unknown schedule of both networks": (
        ["train", *PENDULUM, *HERE, "-params", "learning_rate:'cosine_1e-3'"],
        ["learning_rate 'cosine_1e-3'", "lin_NUMBER"],
    ),
    "log folder is a file": (["train", *PENDULUM, "-f", "{tmp}/a_file"], ["--log-folder", "a_file"]),
    # /proc takes no files from anybody, root included
    "log folder not writable": (["train", *PENDULUM, "-f", "/proc/logs"], ["--log-folder", "'/proc/logs'"]),
    "trained agent missing": (["train", *PENDULUM, *HERE, "-i", "{tmp}/no.zip"], ["--trained-agent", "no.zip' is not there"]),
    "trained agent of another kind": (
        ["train", *PENDULUM, *HERE, "-i", "{tmp}/a_file"],
        ["--trained-agent", "a_file' is not a file that ends in .zip"],
    ),
    "argument that the environment refuses": (
        ["train", *PENDULUM, *HERE, "--env-kwargs", "gravty:9.81"],
        ["argument --env-kwargs", "Pendulum-v1", "{'gravty': 9.81}", "unexpected keyword argument"],
    ),
    "argument that the environment of evaluations refuses": (
        ["train", *PENDULUM, *HERE, "--eval-env-kwargs", "gravty:9.81"],
        ["argument --eval-env-kwargs", "Pendulum-v1", "{'gravty': 9.81}", "unexpected keyword argument"],
    ),
    "resume from nothing": (["train", "--resume", "{tmp}/nowhere"], ["--resume", "nowhere"]),
    "resume from an empty folder": (["train", "--resume", "{tmp}/empty"], ["--resume", "empty", "not the folder of one run"]),
    "resume from a finished run": (
        ["train", "--resume", "{logs}/qsm/Pendulum-v1_1"],
        ["--resume", "no checkpoint", "the run is finished", "--trained-agent"],
    ),
    "resume from a foreign file": (
        ["train", "--resume", "{tmp}/foreign"],
        ["--resume", "is not a checkpoint written by sb3_qsm"],
    ),
    "resume with another length": (
        ["train", "--resume", "{logs}/qsm/Pendulum-v1_1", "-n", "10"],
        ["--resume", "--n-timesteps cannot be given", "--device"],
    ),
    "checkpoints of an on-policy algorithm": (
        ["train", "--algo", "ppo", *PENDULUM, *HERE, "--checkpoint-freq", "10"],
        ["--checkpoint-freq", "ppo", "off-policy"],
    ),
    "heartbeat": (["train", *PENDULUM, *HERE, "--heartbeat", "-1"], ["--heartbeat", ">= 0, got -1"]),
    "storage is nothing": (["train", "-optimize", *PENDULUM, *HERE, "--storage", "nonsense"], ["--storage", "'nonsense'"]),
    "storage without a kind": (
        ["train", "-optimize", *PENDULUM, *HERE, "--storage", "me:secret@host/db"],
        ["--storage", "'me:***@host/db'", "postgresql+psycopg://USER@HOST/DATABASE"],
    ),
    "storage unreachable": (
        ["train", "-optimize", *PENDULUM, *HERE, "--storage", "postgresql+psycopg://me:secret@127.0.0.1:1/db"],
        ["--storage", "cannot reach postgresql+psycopg://me:***@127.0.0.1:1/db"],
    ),
    "journal not writable": (
        ["train", "-optimize", *PENDULUM, *HERE, "--storage", "/proc/a/j.log"],
        ["--storage", "'/proc/a/j.log'"],
    ),
    "unknown study": (
        ["train", *PENDULUM, *HERE, "--storage", "{tmp}/journal.log", "--study-name", "other", "--trial-id", "1"],
        ["--study-name", "'other'", "there: study"],
    ),
    "missing journal": (
        ["train", *PENDULUM, *HERE, "--storage", "{tmp}/other.log", "--study-name", "study", "--trial-id", "1"],
        ["--storage", "other.log' is not there"],
    ),
    "missing database": (
        ["train", *PENDULUM, *HERE, "--storage", "sqlite:///{tmp}/none.db", "--study-name", "study", "--trial-id", "0"],
        ["--storage", "none.db' is not there"],
    ),
    "unknown trial": (["train", *PENDULUM, *HERE, *STUDY, "--trial-id", "7"], ["--trial-id", "trials 0 to 2, got 7"]),
    "unknown trial to begin with": (
        ["train", "-optimize", *PENDULUM, *HERE, *STUDY, "--trial-id", "7"],
        ["--trial-id", "trials 0 to 2, got 7"],
    ),
    "trial that has only begun": (
        ["train", *PENDULUM, *HERE, *STUDY, "--trial-id", "2"],
        ["--trial-id", "trial 2 (running) has no hyperparameters"],
    ),
    "no evaluation of a trial": (
        ["train", "-optimize", *PENDULUM, *HERE, "--n-evaluations", "0"],
        ["--n-evaluations", "got 0"],
    ),
    "no environment of evaluations": (["train", *PENDULUM, *HERE, "--n-eval-envs", "0"], ["--n-eval-envs", ">= 1, got 0"]),
    "unknown activation": (
        ["train", *PENDULUM, *HERE, "-params", "policy_kwargs:dict(activation_fn=nn.SiLUU)"],
        ["NAME:VALUE", "'SiLUU'"],
    ),
    "noise without its size": (["train", *PENDULUM, *HERE, "-params", "noise_type:'normal'"], ["KeyError: 'noise_std'"]),
    "unknown noise": (
        ["train", *PENDULUM, *HERE, "-params", "noise_type:'loud'", "noise_std:0.1"],
        ['RuntimeError: Unknown noise type "loud"', "(SB3_QSM_TRACEBACK=1 shows where)"],
    ),
    "unknown wrapper": (
        ["train", *PENDULUM, *HERE, "-params", "env_wrapper:'gymnasium.wrappers.NoSuch'"],
        ["AttributeError", "'NoSuch'"],
    ),
    "wrong name of the normalization": (
        ["train", *PENDULUM, *HERE, "-params", "normalize:'dict(nrom_obs=True)'"],
        ["TypeError", "'nrom_obs'"],
    ),
    "wrong name with an algorithm of Stable-Baselines3": (
        ["train", "--algo", "sac", *PENDULUM, *HERE, "-params", "temprature:1"],
        ["TypeError", "'temprature'"],
    ),
    "configuration of another program": (["train", *PENDULUM, *HERE, "-conf", "json"], ["AttributeError", "hyperparams"]),
    "resume with a default": (
        ["train", "--resume", "{logs}/qsm/Pendulum-v1_1", "--seed", "-1"],
        ["--resume", "--seed cannot be given"],
    ),
    "trial without a storage": (["train", *PENDULUM, *HERE, "--trial-id", "0"], ["--trial-id", "--storage and --study-name"]),
    "trial without a study": (
        ["train", *PENDULUM, *HERE, "--storage", "{tmp}/journal.log", "--trial-id", "0"],
        ["--trial-id", "--storage and --study-name"],
    ),
    "study that goes on with an agent": (
        ["train", "-optimize", *PENDULUM, *HERE, "-i", "{logs}/qsm/Pendulum-v1_1/Pendulum-v1.zip"],
        ["--trained-agent", "a study trains agents of its own"],
    ),
    "no trial": (["train", *PENDULUM, *HERE, *STUDY], ["--trial-id", "which trial"]),
    "trial of another algorithm": (["train", *PENDULUM, *HERE, *STUDY, "--trial-id", "1"], ["--trial-id", "trial 1", "qsm"]),
    "no agent": (
        ["enjoy", "--env", "MountainCarContinuous-v0", "-f", "{logs}"],
        ["No model found for qsm on MountainCarContinuous-v0"],
    ),
    "unknown device, playing": (
        ["enjoy", *PENDULUM, "-f", "{logs}", "--device", "foo"],
        ["RuntimeError", "device type", "foo"],
    ),
    "argument that the environment refuses, playing": (
        ["enjoy", *PENDULUM, "-f", "{logs}", "--no-render", "--env-kwargs", "gravty:9.81"],
        ["TypeError", "'gravty'"],
    ),
    "film of no training": (
        ["record_training", "--env", "MountainCarContinuous-v0", "-f", "{logs}"],
        ["--env", "MountainCarContinuous-v0_0' has no model to film"],
    ),
    "film into a folder of other things": (
        ["record_training", *PENDULUM, "-f", "{logs}", "-o", "{tmp}"],
        ["--output-folder", "would be emptied", "a_file"],
    ),
    "no safe file": (["enjoy", *PENDULUM, "--safe", "{tmp}/a_file"], ["--safe", "a_file", "ends in .safetensors"]),
    "safe file of something else": (
        ["enjoy", *PENDULUM, "--no-render", "--safe", "{tmp}/a.safetensors"],
        ["was not written by `save_safe`"],
    ),
    "safe file and another": (
        ["enjoy", *PENDULUM, "--safe", "{tmp}/a.safetensors", "--load-best"],
        ["--safe", "--load-best cannot be given"],
    ),
    "safe file and a folder": (
        ["enjoy", *PENDULUM, "--safe", "{tmp}/a.safetensors", "-f", "{logs}"],
        ["--safe", "--folder cannot be given"],
    ),
    "safe file of another algorithm": (
        ["enjoy", "--algo", "sac", *PENDULUM, "--safe", "{tmp}/a.safetensors"],
        ["--safe", "sac has no safe files, only qsm, ddiffpg"],
    ),
    "no agents": (["benchmark", "--log-dir", "{tmp}/nowhere", "--no-hub"], ["--log-dir", "nowhere"]),
    "no agent in a folder": (["benchmark", "--log-dir", "{tmp}/empty", "--no-hub"], ["--log-dir", "has no trained agent"]),
    "fewer episodes than are averaged": (
        ["plot_train", "-e", "Pendulum-v1", "-f", "{logs}"],
        ["--episode-window: 100", "no run of 'Pendulum-v1' by qsm in", "has more than 2"],
    ),
    "successes of a task without": (
        ["plot_train", "-e", "Pendulum-v1", "-f", "{logs}", "-y", "success", "-w", "1"],
        ["--y-axis", "monitor_kwargs"],
    ),
    "figures of one evaluation": (
        ["all_plots", "-e", "Pendulum-v1", "-f", "{logs}", "{tmp}/once", "-o", "{tmp}/results"],
        ["--env", "no run of 'Pendulum-v1' by qsm in", "once has two evaluations", "--eval-freq"],
    ),
    "figures of nothing that was evaluated": (
        ["all_plots", "-e", "Pendulum-v1", "-f", "{logs}", "-k", "success"],
        ["--key", "ep_lengths, results, timesteps, got 'success'"],
    ),
    "figures that end before the first evaluation": (
        ["all_plots", "-e", "Pendulum-v1", "-f", "{logs}", "-max", "100"],
        ["--max-timesteps", "at least 200", "got 100"],
    ),
    "figures with too few labels": (
        ["all_plots", "-e", "Pendulum-v1", "-f", "{logs}", "{logs}", "-l", "one"],
        ["--labels: 2 folders", "got 1"],
    ),
    "no figures": (["all_plots", "-f", "{logs}"], ["-e/--env"]),
    "figure of no run": (
        ["plot_train", "-e", "Pendulum-v1", "Hoper-v5", "-f", "{logs}"],
        ["--env", "no run of 'Hoper-v5' by qsm in", "there: Pendulum-v1"],
    ),
    "figure of another algorithm": (
        ["plot_train", "-a", "sac", "-e", "Pendulum-v1", "-f", "{logs}"],
        ["--env", "no run of 'Pendulum-v1' by sac in", "there: none"],
    ),
    "figure of no folder": (["plot_train", *PENDULUM, "-f", "{tmp}/nowhere"], ["--exp-folder", "nowhere' is no folder"]),
    "figures of no run": (
        ["all_plots", "-e", "Hoper-v5", "-f", "{logs}", "-o", "{tmp}/results"],
        ["--env", "no run of 'Hoper-v5' by qsm in", "there: Pendulum-v1"],
    ),
    "figures of no folder": (
        ["all_plots", *PENDULUM, "-f", "{logs}", "{tmp}/nowhere"],
        ["--exp-folders", "nowhere' is no folder"],
    ),
    "no results": (["plot_from_file", "-i", "{tmp}/nothing"], ["--input", "nothing.pkl"]),
    "results of something else": (["plot_from_file", "-i", "{tmp}/a_pickle"], ["--input", "not written by all_plots"]),
}


@pytest.mark.parametrize("name", BAD)
def test_one_clear_line(cli, logs, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.yml").write_text("Pendulum-v1:\n  policy: [unclosed\n")
    (tmp_path / "list.yml").write_text("- Pendulum-v1\n")
    (tmp_path / "wrong_name.yml").write_text("default:\n  policy: MlpPolicy\n  n_timesteps: 10\n  temprature: 1.0\n")
    (tmp_path / "no_policy.yml").write_text("default:\n  n_timesteps: 10\n")
    (tmp_path / "no_length.yml").write_text("default:\n  policy: MlpPolicy\n")
    (tmp_path / "a_file").write_text("not to be overwritten")
    (tmp_path / "a.safetensors").write_text("not one")
    (tmp_path / "a_pickle.pkl").write_bytes(b"\x80\x05]\x94.")
    (tmp_path / "empty").mkdir()
    once = tmp_path / "once" / "qsm" / "Pendulum-v1_1"
    once.mkdir(parents=True)
    np.savez(once / "evaluations.npz", timesteps=[200], results=[[1.0, 2.0]], ep_lengths=[[200, 200]])
    shutil.copytree(logs / "qsm" / "Pendulum-v1_1", tmp_path / "foreign")
    shutil.copy(logs / "qsm" / "Pendulum-v1_1" / "Pendulum-v1.zip", tmp_path / "foreign" / "checkpoint.zip")
    study = optuna.create_study(storage=open_storage(str(tmp_path / "journal.log")), study_name="study")
    for _ in range(2):
        trial = study.ask()
        trial.suggest_float("learning_rate", 0, 1)
        study.tell(trial, 1.0)
    study.ask()
    before = {folder: contents(folder) for folder in (tmp_path, logs)}

    arguments, expected = BAD[name]
    status, _, err = cli(*(argument.format(tmp=tmp_path, logs=logs) for argument in arguments))
    assert status not in (0, None)
    lines = [line for line in err.splitlines() if "Warning" not in line and not line.startswith("  ")]
    assert len(lines) == 1, err
    assert lines[0].startswith("sb3-qsm")
    assert ": error: " in lines[0]
    for part in expected:
        assert part in lines[0]
    assert "secret" not in err
    for folder, files in before.items():
        after = contents(folder)
        assert {path: after.get(path) for path in files} == files
    # An empty run would be the newest one, which enjoy plays
    assert list((tmp_path / "logs").glob("*/*")) == []


def test_a_run_in_progress_is_not_resumed_a_second_time(cli, tmp_path):
    from filelock import FileLock

    run = tmp_path / "logs" / "qsm" / "Pendulum-v1_1"
    common = ("train", *PENDULUM, "-n", 60, "-f", tmp_path / "logs", "--eval-freq", -1, "--keep-checkpoint")
    status, _, err = cli(*common, *SHORT)
    assert status == 0, err
    before = contents(run)
    with FileLock(str(run / ".run.lock")):
        status, _, err = cli("train", "--resume", run)
    assert status == 2
    assert "--resume: another process is still training in" in err.splitlines()[-1]
    assert {name: data for name, data in contents(run).items() if name != ".run.lock"} == before


def test_a_training_that_learned_nothing_leaves_no_run(cli, tmp_path):
    """Pendulum has no successes, which DDiffPG knows at the end of the first episode."""
    pytest.importorskip("dtaidistance")
    options = ("-n", 500, "-f", tmp_path / "logs", "--eval-freq", -1, "--verbose", 0, "-params", "learning_starts:400")
    status, _, err = cli("train", "--algo", "ddiffpg", *PENDULUM, *options)
    assert status == 1
    assert "success" in err.splitlines()[-1]
    assert list((tmp_path / "logs" / "ddiffpg").iterdir()) == []


def test_numbers_that_yaml_takes_for_text(cli, tmp_path):
    (tmp_path / "own.yml").write_text("default:\n  policy: MlpPolicy\n  n_timesteps: 1e2\n  learning_rate: 5e-4\n")
    status, _, err = cli("train", *PENDULUM, "-f", tmp_path / "logs", "-conf", tmp_path / "own.yml", "--eval-freq", -1)
    assert status == 0, err
    model = QSM.load(tmp_path / "logs" / "qsm" / "Pendulum-v1_1" / "Pendulum-v1.zip")
    assert model.num_timesteps == 100
    assert model.lr_schedule(1.0) == 5e-4


def test_the_traceback_is_there_for_who_wants_it(cli, monkeypatch):
    monkeypatch.setenv("SB3_QSM_TRACEBACK", "1")
    with pytest.raises(Exception, match="unknown environment"):
        cli("train", "--env", "Pendulum-v9")


def test_nearest_name_is_the_nearest():
    names = constructor_arguments(QSM)
    assert {"temperature", "q_grad_coef", "learning_rate", "policy_kwargs", "buffer_size"} <= names
    assert difflib.get_close_matches("qgradcoef", sorted(names), n=1) == ["q_grad_coef"]
    assert os.path.sep not in "".join(names)
