"""The sweep of benchmarks/: real environments, a real Ray, real kills."""

import csv
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

if not all(map(importlib.util.find_spec, ("filelock", "mujoco", "ray", "rliable", "sb3_contrib", "yaml"))):
    pytest.skip("the benchmarks need pip install 'sb3-qsm[benchmarks]'", allow_module_level=True)

import cells
import report
import sweep
import yaml
from cells import Cell, CellError, read_rows, train, write_rows
from filelock import FileLock
from matplotlib.image import imread
from rliable import metrics
from stable_baselines3 import SAC

from sb3_qsm import QSM
from sb3_qsm.common.checkpoint import RunCheckpointCallback, read_info

# The scripts of benchmarks/ are no part of the package, and the tracer makes their trainings slower
pytestmark = pytest.mark.no_cover

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SMALL = {"policy_kwargs": {"net_arch": [16]}, "learning_starts": 50, "batch_size": 16}

# A Pendulum whose first process is killed between an evaluation and the next checkpoint. The first environment that a process
# makes is that of the training.
MORTAL = """
import os, signal
from pathlib import Path
import gymnasium as gym
from gymnasium.envs.classic_control import PendulumEnv

class Mortal(PendulumEnv):
    made = steps = 0
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.mortal = Mortal.made == 0 and not Path("died").exists()
        Mortal.made += 1
    def step(self, action):
        self.steps += 1
        if self.mortal and self.steps == 325:
            Path("died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)

gym.register("Mortal-v0", Mortal, max_episode_steps=200)
"""

SWEEP = """
eval_freq: 100
eval_episodes: 2
checkpoint_freq: 200
settings:
  qsm-small: {kwargs: {policy_kwargs: {net_arch: [16]}, learning_starts: 50, batch_size: 16, diffusion_steps: 2}}
groups:
  tiny: {algos: [qsm-small], envs: ["mortal:Mortal-v0"], seeds: [3], timesteps: 500}
  long: {algos: [qsm-small], envs: [Pendulum-v1], seeds: [0, 1], timesteps: 1600}
"""


@pytest.fixture
def mortal(tmp_path, monkeypatch):
    """A folder with the sweep and its environment, which is the current one."""
    (tmp_path / "mortal.py").write_text(MORTAL)
    (tmp_path / "sweep.yml").write_text(SWEEP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def start(*arguments, log):
    with open(log, "a") as file:
        command = [sys.executable, str(BENCHMARKS / arguments[0]), *map(str, arguments[1:])]
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)


def unkilled(cell, folder):
    """The rows of the same cell by a process that nobody kills."""
    (folder / "mortal.py").exists() and (folder / "died").touch()
    train(cell, cell.path(folder / "unkilled"), "")
    return read_rows(cell.path(folder / "unkilled"), cell)


def assert_rows_come_once(rows, expected, checkpoint):
    """All steps once; until the checkpoint nothing can be told from a run that nobody killed."""
    assert [row["timesteps"] for row in rows] == [row["timesteps"] for row in expected]
    for row, other in zip(rows, expected, strict=True):
        if int(row["timesteps"]) <= checkpoint:
            for column in set(row) - {"train_seconds", "command"}:
                assert row[column] == other[column], column
    assert [row["resumed_from"] for row in rows] == [
        "0" if int(row["timesteps"]) <= checkpoint else str(checkpoint) for row in rows
    ]
    seconds = [float(row["train_seconds"]) for row in rows]
    assert seconds == sorted(seconds)


def test_the_cell_of_a_killed_worker_goes_on(mortal):
    process = start("sweep.py", "run", "sweep.yml", "--groups", "tiny", "--out", "out", "--nice", 2, log="log")
    try:
        assert process.wait(timeout=900) == 0, Path("log").read_text()
    finally:
        process.kill()
    log = Path("log").read_text()
    assert Path("died").exists()
    assert len(set(re.findall(r"pid=(\d+)", log))) == 2, log
    # Evaluated twice since the worker died before the next checkpoint
    assert log.count("after 300 of") == 2, log

    (cell,) = sweep.read_groups(mortal / "sweep.yml")["tiny"]
    sys.path.insert(0, str(mortal))
    try:
        expected = unkilled(cell, mortal)
    finally:
        sys.path.remove(str(mortal))
    rows = read_rows(cell.path(mortal / "out" / "raw"), cell)
    assert_rows_come_once(rows, expected, checkpoint=200)
    assert len({row["q_mean"] for row in rows}) == 5
    assert [path.name for path in (mortal / "out" / "raw").iterdir()] == [cell.path(mortal).name]
    command = "--groups tiny --only algo=qsm-small,env=mortal:Mortal-v0,seed=3 --out out"
    assert all(row["command"].endswith(f"sweep.py run sweep.yml {command}") for row in rows)
    assert rows[0]["torch"] and rows[0]["commit"] and rows[0]["cpu"]


@pytest.mark.slow
def test_a_killed_sweep_goes_on(mortal):
    every = sweep.read_groups(mortal / "sweep.yml")["long"]
    paths = [cell.path(mortal / "out" / "raw") for cell in every]
    arguments = ("sweep.py", "run", "sweep.yml", "--groups", "long", "--out", "out", "--jobs", 2)
    process = start(*arguments, log="log")
    deadline = time.monotonic() + 900
    while not all(path.exists() and len(read_rows(path, cell)) >= 3 for path, cell in zip(paths, every, strict=True)):
        assert process.poll() is None, Path("log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = start(*arguments, log="log")
    try:
        assert again.wait(timeout=900) == 0, Path("log").read_text()
    finally:
        again.kill()
    for cell, path in zip(every, paths, strict=True):
        rows = read_rows(path, cell)
        checkpoint = int(rows[-1]["resumed_from"])
        assert checkpoint in range(200, 1600, 200)
        assert_rows_come_once(rows, unkilled(cell, mortal), checkpoint)
    before = [path.stat().st_mtime_ns for path in paths]
    third = start(*arguments, log="log3")
    assert third.wait(timeout=100) == 0
    assert "2 of 2 cells are finished" in Path("log3").read_text()
    assert [path.stat().st_mtime_ns for path in paths] == before


def test_a_killed_learning_curve_goes_on(mortal):
    """SB3's SAC, without Ray."""
    curve = ("--algo", "sac", "--env", "mortal:Mortal-v0", "--timesteps", 500, "--eval-freq", 100, "--eval-episodes", 2)
    small = '{"policy_kwargs": {"net_arch": [16]}, "learning_starts": 50, "batch_size": 16}'
    arguments = ("learning_curve.py", *curve, "--checkpoint-freq", 200, "--kwargs", small, "--out", "out", "--save")
    assert start(*arguments, log="log").wait(timeout=300) == -signal.SIGKILL, Path("log").read_text()
    assert start(*arguments, log="log").wait(timeout=300) == 0, Path("log").read_text()
    (path,) = Path("out").glob("*.csv")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["timesteps"] for row in rows] == ["100", "200", "300", "400", "500"]
    assert [row["resumed_from"] for row in rows] == ["0", "0", "200", "200", "200"]
    assert SAC.load(path.with_suffix(".zip")).num_timesteps == 500


@pytest.mark.parametrize("preset", cells.PRESETS)
def test_every_preset_trains_and_is_evaluated(tmp_path, preset):
    learns = preset != cells.RANDOM
    cell = Cell("Pendulum-v1", 0, 90 if learns else 0, preset, "s", SMALL if learns else {}, 60, 2)
    assert cell.path(tmp_path).name == f"{cell.algo}-s-Pendulum-v1-seed0-{cell.timesteps}.csv"
    train(cell, cell.path(tmp_path), "command")
    rows = read_rows(cell.path(tmp_path), cell)
    # The end is evaluated too, where the frequency does not divide it
    assert [row["timesteps"] for row in rows] == (["60", "90"] if learns else ["0"])
    assert -2000 < float(rows[-1][f"{cell.acting}_mean"]) < 0
    assert bool(rows[-1]["deterministic_mean"]) == learns
    assert bool(rows[-1]["actor_loss"]) == learns
    assert cell.acting == ("sampled" if preset in ("qsm-paper", "random") else "deterministic")
    before = cell.path(tmp_path).read_bytes()
    train(cell, cell.path(tmp_path), "another command")
    assert cell.path(tmp_path).read_bytes() == before


def test_the_evaluation_leaves_the_training_as_it_is(tmp_path):
    """With and without evaluations the last row is the same, and so is what the policy earns in an environment of its own."""
    often, once = (Cell("Pendulum-v1", 0, 120, "qsm", "s", SMALL, freq, 2) for freq in (30, 120))
    rows = []
    for cell in (often, once):
        path = cell.path(tmp_path / str(cell.eval_freq))
        train(cell, path, "")
        last = read_rows(path, cell)[-1]
        rows.append({column: last[column] for column in set(last) - {"train_seconds", "eval_freq"}})
    assert rows[0] == rows[1]


def test_a_goal_that_is_clearly_passed_stops_the_run(tmp_path):
    # Each step that the pole stands pays one
    cell = Cell("InvertedPendulum-v5", 0, 500, "sac", "s", SMALL, 20, 2, goal=0.5)
    train(cell, cell.path(tmp_path), "")
    rows = read_rows(cell.path(tmp_path), cell)
    assert [row["timesteps"] for row in rows] == ["20", "40", "60"]
    assert cell.finished(rows)
    assert not Cell("InvertedPendulum-v5", 0, 500, "sac", "s", SMALL, 20, 2, goal=5e3).finished(rows)
    assert not cell.finished(rows[:2])


def test_a_checkpoint_without_its_rows_is_of_no_use(tmp_path):
    cell = Cell("Pendulum-v1", 0, 90, "qsm", "s", SMALL, 30, 1)
    folder = cell.path(tmp_path).with_suffix(".checkpoint")
    QSM("MlpPolicy", "Pendulum-v1", learning_starts=50).learn(70, callback=RunCheckpointCallback(1000, folder))
    assert read_info(folder)["num_timesteps"] == 70
    train(cell, cell.path(tmp_path), "")
    assert [row["resumed_from"] for row in read_rows(cell.path(tmp_path), cell)] == ["0"] * 3


def test_two_processes_do_not_train_one_cell(tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "LOCK_TIMEOUT", 0.1)
    cell = Cell("Pendulum-v1", 0, 90, "qsm", "s", SMALL, 30, 1)
    folder = cell.path(tmp_path).with_suffix(".checkpoint")
    folder.mkdir()
    with FileLock(folder / ".lock"), pytest.raises(CellError, match="another process is training"):
        train(cell, cell.path(tmp_path), "")


def test_another_runs_rows_are_not_touched(tmp_path):
    first, second = (Cell("Pendulum-v1", 0, 30, "qsm", "s", {**SMALL, "gamma": gamma}, 30, 1) for gamma in (0.9, 0.99))
    path = first.path(tmp_path)
    train(first, path, "")
    before = path.read_bytes()
    with pytest.raises(CellError, match=r"is of a run with kwargs = .*0\.9,.*, not .*0\.99,"):
        train(second, path, "")
    assert path.read_bytes() == before
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


def test_another_runs_checkpoint_is_not_gone_on_with(tmp_path):
    """It has no row yet, so that only the checkpoint can tell."""
    first, second = (Cell("Pendulum-v1", 0, 90, "qsm", "s", {**SMALL, "gamma": gamma}, 30, 1) for gamma in (0.9, 0.99))
    path = first.path(tmp_path)
    folder = path.with_suffix(".checkpoint")
    QSM("MlpPolicy", "Pendulum-v1", learning_starts=50, gamma=0.9).learn(20, callback=RunCheckpointCallback(1000, folder))
    (folder / "cell.json").write_text(json.dumps(first.identity(), sort_keys=True))
    with pytest.raises(CellError, match=r"is the checkpoint of another run .*gamma.*0\.9.*delete it, or choose another --out"):
        train(second, path, "")
    assert read_info(folder)["num_timesteps"] == 20
    train(first, path, "")
    assert [row["resumed_from"] for row in read_rows(path, first)] == ["20"] * 3
    assert not folder.exists()


def test_a_checkpoint_that_a_finished_run_left_is_deleted(tmp_path):
    cell = Cell("Pendulum-v1", 0, 30, "qsm", "s", SMALL, 30, 1)
    path = cell.path(tmp_path)
    train(cell, path, "")
    path.with_suffix(".checkpoint").mkdir()
    train(cell, path, "")
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


def test_rerun_leaves_all_cells_while_one_is_being_trained(mortal, capsys):
    arguments = ["run", "sweep.yml", "--groups", "long", "--out", "out", "--rerun"]
    paths = [cell.path(mortal / "out" / "raw") for cell in sweep.read_groups(mortal / "sweep.yml")["long"]]
    assert len(paths) > 1
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("rows")
        path.with_suffix(".checkpoint").mkdir()
    with FileLock(paths[-1].with_suffix(".checkpoint") / ".lock"), pytest.raises(SystemExit):
        sweep.main(arguments)
    assert "another process is training" in capsys.readouterr().err
    assert [path.read_text() for path in paths] == ["rows"] * len(paths)


def test_a_model_that_could_not_be_saved_is_not_lost(tmp_path, monkeypatch):
    cell = Cell("Pendulum-v1", 0, 60, "qsm", "s", SMALL, 30, 1, checkpoint_freq=40)
    path = cell.path(tmp_path)

    save = QSM.save

    def full(model, target, *args):
        if target == path.with_suffix(".zip"):
            raise OSError("No space left on device")
        save(model, target, *args)

    with monkeypatch.context() as patch:
        patch.setattr(QSM, "save", full)
        with pytest.raises(OSError, match="No space left"):
            train(cell, path, "", save=True)
    assert cell.finished(read_rows(path, cell))
    train(cell, path, "", save=True)
    assert QSM.load(path.with_suffix(".zip")).num_timesteps == 60
    rows = read_rows(path, cell)
    assert [row["timesteps"] for row in rows] == ["30", "60"]
    assert not path.with_suffix(".checkpoint").exists()
    # There is nothing to save it from
    path.with_suffix(".zip").unlink()
    train(cell, path, "", save=True)
    assert read_rows(path, cell) == rows


def test_rerun_without_ray_deletes_nothing(mortal, monkeypatch):
    cell = sweep.read_groups(mortal / "sweep.yml")["long"][0]
    path = cell.path(mortal / "out" / "raw")
    path.parent.mkdir(parents=True)
    path.write_text("rows")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "ray" else find(name, *rest))
    with pytest.raises(SystemExit, match="The sweep needs Ray"):
        sweep.main(["run", "sweep.yml", "--groups", "long", "--only", "seed=0", "--out", "out", "--rerun"])
    assert path.read_text() == "rows"


def test_control_suite_observations_are_flat_and_in_single_precision():
    pytest.importorskip("dm_control")
    pytest.importorskip("shimmy")
    env = cells.make_env("dm_control/cartpole-swingup-v0")
    assert (env.observation_space.shape, env.observation_space.dtype) == ((5,), np.float32)
    observation, _ = env.reset(seed=0)
    assert observation in env.observation_space
    env.close()


# --- The cells of a sweep


def test_the_shipped_sweep_has_the_cells_of_the_benchmark():
    groups = sweep.read_groups(BENCHMARKS / "sweeps" / "main.yml")
    main = groups["main"]
    assert {(cell.name, cell.seed) for cell in main} == {(algo, seed) for algo in ("qsm", "sac") for seed in (0, 1, 2)}
    assert len(main) == 36 and {cell.timesteps for cell in main} == {100_000}
    assert {cell.seed for cell in main[:12]} == {0}
    assert {cell.name for cell in groups["baselines"]} == {"td3", "tqc", "qsm-paper"}
    assert {cell.env for cell in groups["random"]} == {cell.env for cell in main} == {cell.env for cell in groups["baselines"]}
    goals = {cell.env: cell.goal for name in ("published", "published-swimmer") for cell in groups[name]}
    assert (goals["Hopper-v5"], goals["dm_control/dog-trot-v0"], len(goals)) == (1590, 187.5, 7)
    for cell in (cell for cells_ in groups.values() for cell in cells_):
        assert cell.timesteps % cell.eval_freq == 0 and (cell.eval_freq == 5000 and cell.eval_episodes >= 10)


def test_the_sweep_of_other_tasks_has_none_of_the_main_one():
    main, other = (sweep.read_groups(BENCHMARKS / "sweeps" / name) for name in ("main.yml", "other.yml"))
    envs = {cell.env for cell in other["other"]}
    assert len(envs) == 5 and envs == {cell.env for cell in other["random"]}
    assert envs.isdisjoint(cell.env for group in main.values() for cell in group)
    assert {cell.name for cell in other["other"]} == {"qsm", "sac"}


def test_list_and_only(mortal, capsys):
    arguments = ["list", "sweep.yml", "--out", "out", "--groups", "long"]
    assert sweep.main([*arguments, "--only", "seed=1,algo=qsm-small"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.split() == ["long", "qsm-small", "Pendulum-v1", "seed", "1", "not", "begun"]
    (_, cell) = sweep.read_groups(mortal / "sweep.yml")["long"]
    path = cell.path(mortal / "out" / "raw")
    path.parent.mkdir(parents=True)
    write_rows(path, [{**cell.identity(), "timesteps": "200", "deterministic_mean": "-1"}])
    assert sweep.main([*arguments, "--only", "seed=1", "--only", "seed=0"]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 2 and "seed 1    200 of 1,600 steps" in out


def test_compiled_updates_are_asked_for_in_the_file(mortal):
    path = mortal / "sweep.yml"
    path.write_text(
        SWEEP.replace("groups:", "compile: true\ngroups:").replace("[qsm-small], envs: [P", "[qsm, sac], envs: [P")
    )
    groups = sweep.read_groups(path)
    small = yaml.safe_load(SWEEP)["settings"]["qsm-small"]["kwargs"]
    assert groups["tiny"][0].kwargs == {"compile": True, **small}
    assert {cell.algo: cell.kwargs for cell in groups["long"]} == {"qsm": {"compile": True}, "sac": {}}
    path.write_text(SWEEP.replace("timesteps: 500", "timesteps: 500, compile: true"))
    groups = sweep.read_groups(path)
    assert [groups[name][0].kwargs.get("compile") for name in ("tiny", "long")] == [True, None]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("groups:", "compile: 1\ngroups:", "compile of group tiny must be true or false, got 1"),
        ("groups:", "grops:", "unknown key 'grops' in sweep.yml; known ones: checkpoint_freq, "),
        ("groups:", "- x", "cannot read sweep.yml"),
        ("seeds: [3], ", "", "group tiny lacks 'seeds'"),
        ("seeds: [3]", "seeds: 3", "seeds of group tiny must be a list, got 3"),
        ("seeds: [3]", "seeds: [-3]", "seed of qsm-small on mortal:Mortal-v0 must be an integer >= 0, got -3"),
        ("timesteps: 500", "timesteps: 1e3", "timesteps of qsm-small on mortal:Mortal-v0 must be an integer >= 1, got '1e3'"),
        ("[qsm-small], envs: [P", "[qsm-tiny], envs: [P", "unknown algorithm 'qsm-tiny' in group long; known ones: "),
        ("  qsm-small: {", "  small: {preset: qsm, ", "the name of setting 'small' must begin with its algorithm (qsm, sac"),
        ("kwargs: {", "kwarg: {", "unknown key 'kwarg' in setting qsm-small; known ones: kwargs, preset"),
        ("  qsm-small: {", "  qsm-small: {preset: qsm-pap, ", "unknown preset 'qsm-pap'; known ones: qsm, "),
        ('["mortal:Mortal-v0"]', "{Pendulum-v1: -5}", "goal of qsm-small on Pendulum-v1 must be a number above 0, got -5"),
    ],
)
def test_what_is_wrong_with_a_sweep_is_said_before_anything_runs(mortal, capsys, old, new, message):
    assert old in SWEEP
    (mortal / "sweep.yml").write_text(SWEEP.replace(old, new, 1))
    with pytest.raises(SystemExit) as stopped:
        sweep.main(["run", "sweep.yml", "--out", "out"])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (mortal / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nothing.yml"], "cannot read nothing.yml"),
        (["run", "sweep.yml", "--groups", "tin"], "unknown group 'tin'; known ones: tiny, long"),
        (["run", "sweep.yml", "--groups", "long", "--only", "seed=2"], "no cell is seed=2: seed is one of 0, 1"),
        (["run", "sweep.yml", "--only", "task=Hopper-v5"], "--only wants some of algo=NAME,env=NAME,seed=NUMBER, got 'task=H"),
        (["run", "sweep.yml", "--jobs", "0"], "--jobs must be above 0, not 0"),
        (["run", "nowhere.yml", "--groups", "long"], "unknown environment 'Pendulum-v99'"),
        (["report", "sweep.yml", "--include", "sweep.yml"], "sweep.yml lacks the marks"),
    ],
)
def test_what_is_wrong_with_the_command_line_is_said_before_anything_runs(mortal, capsys, arguments, message):
    (mortal / "nowhere.yml").write_text(SWEEP.replace("Pendulum-v1", "Pendulum-v99"))
    with pytest.raises(SystemExit) as stopped:
        sweep.main([*arguments, "--out", "out"])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (mortal / "out").exists()


# --- The report

COMPARISON = """
eval_freq: 100
groups:
  random: {algos: [random], envs: [Pendulum-v1, CartPole-v1], seeds: [0], timesteps: 0}
  main: {algos: [qsm, sac], envs: [Pendulum-v1, CartPole-v1], seeds: [0, 1, 2], timesteps: 200}
  baselines: {algos: [td3], envs: [Pendulum-v1, CartPole-v1], seeds: [0], timesteps: 200}
  more: {algos: [tqc], envs: [CartPole-v1], seeds: [0, 1, 2], timesteps: 200}
  published: {algos: [qsm], envs: {Hopper-v5: 10, Ant-v5: 7}, seeds: [0], timesteps: 1000}
"""
# Returns at the evaluations, by seed
RETURNS = {
    ("random", "Pendulum-v1"): [[0]],
    ("random", "CartPole-v1"): [[-100]],
    ("sac", "Pendulum-v1"): [[20, 90], [30, 100], [10, 110]],
    ("sac", "CartPole-v1"): [[-50, 0], [-60, 100], [-70, 200]],
    ("qsm", "Pendulum-v1"): [[50, 150], [60, 160], [40, 170]],
    ("qsm", "CartPole-v1"): [[0, 100], [100, 300], [50, 500]],
    ("td3", "Pendulum-v1"): [[30, 40]],
    ("td3", "CartPole-v1"): [[35]],
    ("tqc", "CartPole-v1"): [[10, 300], [20], []],
    ("qsm", "Hopper-v5"): [[5, 10.5, 12, 11.5, 14]],
}


@pytest.fixture
def comparison(tmp_path):
    (tmp_path / "sweep.yml").write_text(COMPARISON)
    for cell in (cell for group in sweep.read_groups(tmp_path / "sweep.yml").values() for cell in group):
        values = RETURNS.get((cell.name, cell.env), [[]] * 3)[cell.seed]
        if values:
            path = cell.path(tmp_path / "out" / "raw")
            path.parent.mkdir(parents=True, exist_ok=True)
            origin = {"commit": "1234567", "resumed_from": "0"}
            rows = [
                {**cell.identity(), **origin, "timesteps": str(step), f"{cell.acting}_mean": str(value)}
                for step, value in zip(cell.steps, values, strict=False)
            ]
            write_rows(path, rows)
    return tmp_path


def test_report_has_the_numbers_worked_out_by_hand(comparison, monkeypatch):
    monkeypatch.setattr(report, "BOOTSTRAPS", 300)
    page = comparison / "docs" / "page.md"
    page.parent.mkdir()
    after = f"the block between `{report.BEGIN}` and `{report.END}` is renewed"
    page.write_text(f"before\n\n{report.BEGIN}\nold\n{report.END}\n\n{after}\n")
    arguments = ["report", str(comparison / "sweep.yml"), "--out", str(comparison / "out"), "--include", str(page)]
    assert sweep.main(arguments) == 0
    text = (comparison / "out" / "README.md").read_text()

    # Means 160 and 300; standard deviations 10, and 200 with n - 1 = 2
    assert "| task | QSM, 3 seeds | SAC, 3 seeds | TD3, 1 seed | TQC, 3 seeds | random policy |" in text
    assert "| Pendulum-v1 | 160 ± 10.0 | 100 ± 10.0 | 40.0 |  | 0.0 |" in text
    tqc = "300 (1 of 3 seeds); seed 1 at 100 steps: 20.0; seed 2 not begun"
    assert f"| CartPole-v1 | 300 ± 200 | 100 ± 100 | seed 0 at 100 steps: 35.0 | {tqc} | -100 |" in text
    # QSM's scores: 1.5, 1.6, 1.7 by Pendulum's scale of 100, and 1, 2, 3 by CartPole's of 200. Without the lowest and the
    # highest of the six their mean is 1.7. Of 9 pairs with SAC's runs QSM wins 9, and 7 with one tie: (1 + 7.5 / 9) / 2 = 0.92
    (line,) = re.findall(r"\| QSM \| 1\.70 \[(.*), (.*)\] \| 1\.60 \(Pend.*\) \| 0\.92 \[(.*), (.*)\] \| 2 of 2 \| 3 \|", text)
    low, high, low_p, high_p = map(float, line)
    assert 1.0 <= low < 1.7 < high <= 2.6
    assert 0.5 < low_p < 0.92 < high_p <= 1.0
    # SAC's: 0.9, 1, 1.1, and 0.5, 1, 1.5
    assert re.search(r"\| SAC \| 1\.00 \[0\..*\] \|  \|  \| 2 of 2 \| 3 \|", text)
    # Of TD3 one task is finished, with one seed: no interval
    assert "| TD3 | 0.40 | 0.40 (Pendulum-v1) | 0.00 | 1 of 2 | 1 |" in text
    assert "| Hopper-v5 | 10 | 14.0 at 500 | 200 | 14.0 at 500, clearly passed |" in text
    assert "| Ant-v5 | 7 |" in text and text.count("not begun") == 2
    assert "17 of the 21 runs covered here are finished. 0 went on from a checkpoint" in text

    assert "steps, mean ± standard deviation over seeds:" in text and "with 95 % confidence intervals:" in text

    included = page.read_text()
    assert included.startswith(f"before\n\n{report.BEGIN}\n") and included.endswith(f"{report.END}\n\n{after}\n")
    assert "| Pendulum-v1 | 160 ± 10.0 |" in included and "old" not in included
    pictures = re.findall(r"!\[.*\]\((.*)\)", included)
    assert pictures == [f"../out/{name}.png" for name in ("curves", "aggregate", "published")]
    for picture in pictures:
        pixels = imread(page.parent / picture)
        assert pixels.shape[1] > 500 and len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 30

    # The same CSVs give the same bytes
    before = {path: path.read_bytes() for path in (comparison / "out").glob("*.*")}
    assert sweep.main(arguments) == 0
    assert before == {path: path.read_bytes() for path in (comparison / "out").glob("*.*")}
    assert page.read_text() == included


def test_one_seed_is_not_reported_with_intervals(comparison):
    arguments = ["report", str(comparison / "sweep.yml"), "--only", "seed=0", "--out", str(comparison / "out")]
    assert sweep.main(arguments) == 0
    text = (comparison / "out" / "README.md").read_text()
    assert "![Learning curves, one seed](curves.png)" in text
    assert "One seed gives no confidence intervals" in text
    assert "±" not in text and "95 %" not in text
    # Pendulum: 150 by SAC's 90; CartPole: 100 by SAC's 0, from the random policy's -100 on
    assert "| QSM | 1.83 | 1.67 (Pendulum-v1) | 1.00 | 2 of 2 | 1 |" in text
    # A task that was not begun has no picture of its own
    two = imread(comparison / "out" / "curves.png").shape
    for path in (comparison / "out" / "raw").glob("*CartPole*"):
        path.unlink()
    assert sweep.main(arguments) == 0
    assert imread(comparison / "out" / "curves.png").shape[1] < 0.7 * two[1]


def test_a_run_of_the_comparison_can_pass_a_published_return():
    def rows(cell, *values):
        return [
            {**cell.identity(), "timesteps": str(step), "deterministic_mean": str(value)}
            for step, value in zip(cell.steps, values, strict=False)
        ]

    goal = Cell("Hopper-v5", 0, 1000, eval_freq=100, goal=10)
    same = Cell("Hopper-v5", 0, 600, eval_freq=100)
    others = [
        Cell("Hopper-v5", 1, 600, eval_freq=100),
        Cell("Hopper-v5", 0, 600, kwargs={"gamma": 0.9}, eval_freq=100),
        Cell("Hopper-v5", 0, 600, eval_freq=50),
        Cell("Walker2d-v5", 0, 600, eval_freq=100),
        Cell("Hopper-v5", 0, 600, "sac", eval_freq=100),
    ]
    runs = {goal: [], same: rows(same, 1, 12, 12, 13, 14, 2), **{cell: rows(cell, 20, 20, 20) for cell in others}}
    # Above 11 three times running after 400 steps, whatever came later
    shown = report.published_runs(runs)
    assert list(shown) == [goal] and shown[goal] == runs[same][:4]
    line = "| Hopper-v5 | 10 | 13.0 at 400 | 200 | 13.0 at 400, clearly passed (the run of 600 steps) |"
    assert line in report.published_table(shown)
    # While it has not passed it is shown as far as it is, and its own as soon as there is one
    for values, state in (((12, 12), "12.0 at 200, unfinished"), ((1, 2, 3, 4, 5, 12), "12.0 at 600, not clearly passed")):
        runs[same] = rows(same, *values)
        shown = report.published_runs(runs)
        assert shown[goal] == runs[same]
        assert f"| {state} (the run of 600 steps) |" in report.published_table(shown)
    runs[goal] = rows(goal, 5)
    assert report.published_runs(runs)[goal] == runs[goal]
    runs[same], runs[goal] = rows(same, 12, 12, 12), rows(goal, 1, 2, 12, 12, 12)
    assert report.published_runs(runs)[goal] == runs[goal]
    assert "12.0 at 500, clearly passed |" in report.published_table(report.published_runs(runs))
    del runs[same], runs[goal]
    assert report.published_runs({goal: [], **runs}) == {goal: []}
    own = Cell("Hopper-v5", 0, 1000, kwargs={"gamma": 0.9, "compile": True}, eval_freq=100, goal=10.0)
    assert "| Hopper-v5, `gamma=0.9` | 10 | 5.0 at 100 |" in report.published_table({own: rows(own, 5)})


def test_report_without_a_single_row_says_so(comparison):
    arguments = ["report", str(comparison / "sweep.yml"), "--out", str(comparison / "empty")]
    assert sweep.main(arguments) == 0
    text = (comparison / "empty" / "README.md").read_text()
    assert "| Pendulum-v1 | not begun | not begun | not begun |  |  |" in text
    assert "No task has a normalised score yet" in text
    assert "0 of the 21 runs covered here are finished." in text
    assert [path.name for path in (comparison / "empty").iterdir()] == ["README.md"]


def test_runs_of_different_lengths_are_not_compared(comparison, capsys):
    text = COMPARISON.replace("seeds: [0], timesteps: 200", "seeds: [0], timesteps: 300")
    (comparison / "sweep.yml").write_text(text)
    with pytest.raises(SystemExit):
        sweep.main(["report", str(comparison / "sweep.yml"), "--out", str(comparison / "empty")])
    assert "the runs to compare have different lengths ([200, 300])" in capsys.readouterr().err
    assert not (comparison / "empty").exists()


def test_runs_are_compared_at_the_steps_that_all_have(tmp_path):
    """Where groups are evaluated more or less often."""
    runs = {}
    for env, eval_freq in (("Pendulum-v1", 50), ("CartPole-v1", 100)):
        random = Cell(env, 0, 0, "random", "default", {}, 100, 2)
        runs[random] = [{f"{random.acting}_mean": "0", "timesteps": "0"}]
        for algo, factor in (("sac", 1.0), ("qsm", 2.0)):
            cell = Cell(env, 0, 200, algo, "default", {}, eval_freq, 2)
            runs[cell] = [{f"{cell.acting}_mean": str(factor * step), "timesteps": str(step)} for step in cell.steps]
    results = report.Results(runs)
    assert results.tasks("qsm") == ["Pendulum-v1", "CartPole-v1"]
    np.testing.assert_allclose(results.scores("qsm", results.tasks("qsm")), [[[1.0, 2.0], [1.0, 2.0]]])
    assert results.steps.tolist() == [100, 200]
    for draw in (report.draw_curves, report.draw_aggregate):
        assert draw(results, tmp_path / "picture.png").is_file()
    assert "| QSM | 2.00 | 2.00 (Pendulum-v1) | 1.00 | 2 of 2 | 1 |" in report.comparison_tables(results)


def test_the_zero_is_the_mean_over_the_random_policys_seeds(tmp_path):
    random = [Cell("Pendulum-v1", seed, 0, "random", "default", {}, 100, 2) for seed in (0, 1)]
    runs = {
        cell: [{f"{cell.acting}_mean": value, "timesteps": "0"}] for cell, value in zip(random, ("0", "-100"), strict=True)
    }
    assert report.Results(runs).random == {"Pendulum-v1": -50.0}


def test_tasks_without_a_common_seed_are_not_aggregated(comparison, capsys):
    text = COMPARISON.replace(
        "baselines: {algos: [td3], envs: [Pendulum-v1, CartPole-v1], seeds: [0]",
        "baselines: {algos: [td3], envs: [Pendulum-v1], seeds: [0]",
    )
    text += "  odd: {algos: [td3], envs: [CartPole-v1], seeds: [1], timesteps: 200}\n"
    (comparison / "sweep.yml").write_text(text)
    (cell,) = sweep.read_groups(comparison / "sweep.yml")["odd"]
    rows = [
        {**cell.identity(), "timesteps": str(step), f"{cell.acting}_mean": "1", "resumed_from": "0"} for step in cell.steps
    ]
    write_rows(cell.path(comparison / "out" / "raw"), rows)
    with pytest.raises(SystemExit):
        sweep.main(["report", str(comparison / "sweep.yml"), "--out", str(comparison / "out")])
    assert "td3 has no seed that is finished on all of Pendulum-v1, CartPole-v1" in capsys.readouterr().err


def test_statistics_are_those_of_rliable():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(3, 6)), rng.normal(size=(5, 6)).round(1)
    second[0] = first[0]
    assert report.iqm(first[..., None]) == pytest.approx([metrics.aggregate_iqm(first)], rel=1e-12)
    expected = metrics.probability_of_improvement(first, second)
    assert report.probability_of_improvement(first, second) == pytest.approx([expected], rel=1e-12)
    curves = rng.normal(size=(3, 6, 4))
    assert report.iqm(curves) == pytest.approx([metrics.aggregate_iqm(curves[..., i]) for i in range(4)], rel=1e-12)
