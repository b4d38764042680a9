"""Registration, shipped hyperparameters, and shims that are still needed."""

import ast
import importlib
import importlib.util
import inspect
import subprocess
import sys
import venv
from pathlib import Path

import gymnasium as gym
import pytest
import requests
import yaml
from huggingface_hub.errors import HfHubHTTPError
from rl_zoo3.utils import ALGOS

from sb3_qsm import QSM
from sb3_qsm.zoo import ALGORITHMS, hyperparams_file, register
from sb3_qsm.zoo.cli import _ENV_PACKAGES
from sb3_qsm.zoo.manager import _ZOO_NAMES, constructor_arguments
from tests.zoo.conftest import REPOSITORY


def source(module):
    """Text of an rl_zoo3 module, without importing it."""
    return Path(importlib.util.find_spec(f"rl_zoo3.{module}").origin).read_text()


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)


def test_importing_the_package_imports_no_command_line():
    heavy = ["rl_zoo3", "optuna", "matplotlib", "seaborn", "pandas", "huggingface_hub"]
    done = run_python(f"import sys, sb3_qsm; print([name for name in {heavy} if name in sys.modules])")
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_register_changes_the_dictionaries_that_were_imported_before():
    done = run_python(
        "from rl_zoo3.utils import ALGOS; from rl_zoo3.train import ALGOS as of_train\n"
        "from rl_zoo3.exp_manager import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER\n"
        "assert 'qsm' not in ALGOS\n"
        "import sb3_qsm.zoo; sb3_qsm.zoo.register()\n"
        "print(ALGOS['qsm'].__name__, of_train is ALGOS, HYPERPARAMS_SAMPLER['qsm'].__name__, "
        "HYPERPARAMS_CONVERTER['qsm'].__name__, ALGOS['sac'].__name__)"
    )
    assert done.stdout.split() == ["QSM", "True", "sample_qsm_params", "convert_qsm_params", "SAC"], done.stderr


def settings(name):
    return yaml.safe_load(hyperparams_file(name).read_text())


@pytest.mark.parametrize("name", ["qsm", "qsm_paper", "ddiffpg"])
def test_shipped_names_are_known(name):
    known = {*_ZOO_NAMES, *constructor_arguments(ALGORITHMS[name.removesuffix("_paper")].algorithm)}
    for task, values in settings(name).items():
        assert set(values) <= known, task
        assert {"n_timesteps", "policy"} <= set(values), task


def test_shipped_tasks():
    tasks = set(settings("qsm"))
    locomotion = ("Ant", "HalfCheetah", "Hopper", "Humanoid", "HumanoidStandup", "Swimmer", "Walker2d")
    assert {f"{task}-{version}" for task in locomotion for version in ("v4", "v5")} <= tasks
    assert {"default", "Pendulum-v1", "MountainCarContinuous-v0", "dm_control/cheetah-run-v0", "FetchReach-v4"} <= tasks
    # Every task of gymnasium itself exists
    own = [task for task in tasks - {"default"} if not task.startswith(sum(_ENV_PACKAGES.values(), ()))]
    assert set(own) <= set(gym.registry)
    assert len(own) > 20


def test_paper_file_has_the_numbers_of_the_paper():
    paper = QSM.paper_hyperparameters()
    tasks = settings("qsm_paper")
    for task, values in tasks.items():
        for name, value in values.items():
            if name in ("n_timesteps", "policy", "env_wrapper", "policy_kwargs", "actor_learning_rate"):
                continue
            expected = 120 if name == "q_grad_coef" and task in STRONG else paper[name]
            assert value == expected, (task, name)
        missing = set(paper) - set(values) - {"learning_rate"}
        assert not missing, task
    assert set(tasks) >= STRONG


STRONG = {"dm_control/quadruped-walk-v0", "dm_control/humanoid-walk-v0"}


def test_paper_file_trains_the_paper_preset(cli, tmp_path):
    from torch import nn

    options = ("-n", 40, "-f", tmp_path, "--eval-freq", -1, "--verbose", 0, "-params", "learning_starts:30", "batch_size:8")
    status, out, err = cli("train", "--env", "Pendulum-v1", "--conf-file", "qsm_paper", *options)
    assert status == 0, err
    assert str(hyperparams_file("qsm_paper")) in out
    model = QSM.load(tmp_path / "qsm" / "Pendulum-v1_1" / "Pendulum-v1.zip")
    paper = QSM.paper_hyperparameters(total_timesteps=40)
    for name in set(paper) - {"learning_starts", "batch_size", "learning_rate", "actor_learning_rate", "policy_kwargs"}:
        assert getattr(model, name) == paper[name], name
    decay, expected = model.actor_learning_rate, paper["actor_learning_rate"]
    assert (decay.initial_value, decay.decay_steps) == (expected.initial_value, expected.decay_steps)
    assert (decay.total_timesteps, decay.learning_starts) == (40, 30)
    assert model.policy_kwargs == paper["policy_kwargs"]
    assert isinstance(nn.Mish(), model.policy_kwargs["activation_fn"])


@pytest.mark.parametrize("task", ["dm_control/cartpole-swingup-v0", "FetchReach-v4", "PointMaze_UMaze-v3"])
def test_tasks_of_other_packages(cli, tmp_path, task):
    package = next(package for package, prefixes in _ENV_PACKAGES.items() if task.startswith(prefixes))
    pytest.importorskip("dm_control" if package == "shimmy" else package, reason=f"{package} is not installed")
    gym.register_envs(importlib.import_module(package))
    try:
        gym.make(task).close()
    except AssertionError:
        # Fetch of gymnasium-robotics 1.4.2 with mujoco 3.17
        pytest.skip(f"{package} cannot make {task} with the mujoco installed here")
    # HER replays whole episodes only: 50 steps in FetchReach, 300 in PointMaze_UMaze
    starts = 310 if task.startswith("PointMaze") else 60
    options = ("-n", starts + 10, "-f", tmp_path, "--eval-freq", -1, "--verbose", 0)
    network = ("-params", f"learning_starts:{starts}", "batch_size:8", "diffusion_steps:2", "policy_kwargs:dict(net_arch=[8])")
    status, _, err = cli("train", "--env", task, *options, *network)
    assert status == 0, err
    (model,) = (tmp_path / "qsm").glob("*/*.zip")
    loaded = QSM.load(model, env=None) if package == "shimmy" else None
    assert loaded is None or loaded._n_updates == 10
    if package != "shimmy":
        (monitor,) = (tmp_path / "qsm").glob("*/0.monitor.csv")
        assert "success" in monitor.read_text().splitlines()[1]


@pytest.mark.slow
def test_hyperparameters_are_in_the_wheel(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)], cwd=REPOSITORY, check=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    venv.create(tmp_path / "venv", system_site_packages=False, with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--no-deps", "-q", wheel], check=True)
    # The package itself needs torch, which the new environment has not: find its folder without importing it
    code = (
        "import importlib.util, pathlib; spec = importlib.util.find_spec('sb3_qsm');"
        "folder = pathlib.Path(spec.origin).parent / 'hyperparams'; print(sorted(path.name for path in folder.iterdir()))"
    )
    done = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert {"ddiffpg.yml", "qsm.yml", "qsm_paper.yml"} <= set(ast.literal_eval(done.stdout))


def test_one_line_adds_an_algorithm():
    before = dict(ALGORITHMS)
    ALGORITHMS["copy"] = ALGORITHMS["qsm"]
    try:
        register()
        assert ALGOS["copy"] is QSM
    finally:
        ALGORITHMS.clear()
        ALGORITHMS.update(before)
        ALGOS.pop("copy", None)


# --- Shims: each test fails once rl_zoo3 no longer needs it; then the shim can go


def test_shim_generate_metadata():
    assert "import _evaluate_agent, _generate_replay, generate_metadata" in source("push_to_hub")
    done = run_python("import huggingface_sb3; from huggingface_sb3.push_to_hub import generate_metadata")
    assert "cannot import name 'generate_metadata'" in done.stderr


def test_shim_hub_errors():
    assert "from requests.exceptions import HTTPError" in source("load_from_hub")
    assert not issubclass(HfHubHTTPError, requests.exceptions.HTTPError)


def test_shim_subprocesses():
    assert '["python", "-m", "rl_zoo3.record_video"' in source("record_training")
    assert '["python", "enjoy.py"' in source("benchmark")


def test_shim_names_of_folders():
    assert 'log_path = os.path.join(args.log_dir, algo, f"{env_id}_{exp_id}", env_id)' in source("benchmark")


def test_shim_success_of_goal_tasks():
    assert '"success": "is_success"' in source("plots.plot_train")


def test_shim_ffmpeg():
    assert 'os.system(f"ffmpeg -f concat' in source("record_training")


def test_shim_small_replay_buffers():
    for script in ("enjoy", "record_video", "push_to_hub"):
        assert 'off_policy_algos = ["qrdqn", "dqn", "ddpg", "sac", "her", "td3", "tqc"]' in source(script)


def test_shim_trial_zero():
    assert "if self.storage and self.study_name and self.trial_id:" in source("exp_manager")


def test_shim_undeclared_dependencies():
    from importlib.metadata import requires

    declared = {
        requirement.split(";")[0].strip().lower() for requirement in requires("rl_zoo3") if "extra ==" not in requirement
    }
    names = {"".join(c if c.isalnum() or c in "-_" else " " for c in requirement).split()[0] for requirement in declared}
    for name, module in {"requests": "load_from_hub", "pandas": "benchmark"}.items():
        assert name in source(module)
        assert name not in names


def test_shim_heartbeat():
    # A URL goes to Optuna as it is, whose storage then has no heartbeat
    assert "heartbeat" not in source("exp_manager")
    optuna_get_storage = inspect.getsource(importlib.import_module("optuna.storages").get_storage)
    assert "heartbeat" not in optuna_get_storage
