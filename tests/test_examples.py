"""The scripts in examples/, run as a user runs them."""

import ast
import importlib.util
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from sb3_qsm import QSM
from sb3_qsm.common.checkpoint import read_info
from sb3_qsm.export import to_onnx
from tests.scripts import run_python

pytest.importorskip("mujoco")
image = pytest.importorskip("matplotlib.image")
imageio = pytest.importorskip("imageio.v2")
pytest.importorskip("imageio_ffmpeg")
pytest.importorskip("rich")

SCRIPT = Path(__file__).parents[1] / "examples" / "quickstart.py"


def run_quickstart(*args: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *args],
        env={**os.environ, "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=600,
        check=False,
    )


@pytest.fixture
def quickstart(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    # The script selects a renderer for its own process; here that must not outlast the test
    monkeypatch.setenv("MUJOCO_GL", os.environ.get("MUJOCO_GL", "disable"))
    spec = importlib.util.spec_from_file_location("quickstart", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_defaults_of_the_quickstart_are_the_documented_ones(quickstart: ModuleType, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["quickstart.py"])
    args = quickstart.parse_args()
    quickstart.check_id(args.env)
    page = (SCRIPT.parents[1] / "docs" / "quickstart.md").read_text("utf-8")
    for name in ("env", "timesteps", "seed", "out"):
        (default,) = re.findall(rf"\| `--{name}` \| `?([^`|]*?)`? \|", page)
        assert str(getattr(args, name)) == default


def test_quickstart_writes_model_curve_video_and_results(tmp_path: Path):
    out = tmp_path / "deep" / "run"
    finished = run_quickstart("--env", "InvertedPendulum-v5", "--timesteps", "300", "--seed", "1", "--out", str(out))
    assert finished.returncode == 0, finished.stderr
    assert "InvertedPendulum-v5 after 300 steps" in finished.stdout
    assert "random policy" in finished.stdout

    results = json.loads((out / "results.json").read_text())
    assert (results["timesteps"], results["seed"]) == (300, 1)
    # A random policy falls within a few steps, each of which pays 1
    assert 2 < results["random_mean_return"] < 20
    assert results["random_std_return"] > 0
    assert f"{results['mean_return']:.1f} ± {results['std_return']:.1f}" in finished.stdout

    model = QSM.load(out / "model.zip")
    assert model.num_timesteps == 300

    evaluations = np.load(out / "evaluations.npz")
    assert len(evaluations["timesteps"]) >= 10
    assert evaluations["timesteps"][-1] == 300

    curve = image.imread(out / "learning_curve.png")
    assert curve.shape[0] > 300
    assert curve.shape[1] > 500
    # Drawn in several colours
    assert len(np.unique((curve[..., :3] * 255).astype(int).reshape(-1, 3), axis=0)) > 50

    if (out / "video.mp4").exists():
        with imageio.get_reader(out / "video.mp4") as video:
            frames = [frame for _, frame in zip(range(20), video, strict=False)]
            assert video.count_frames() == 15 * 25  # seconds, and the task's frames a second
        assert all(frame.std() > 1 for frame in frames)
        assert any(np.abs(frame.astype(int) - frames[0]).max() > 20 for frame in frames)
    else:
        assert "nothing here can render" in finished.stdout


def test_a_warning_of_mujoco_is_shown_once(quickstart: ModuleType, capfd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import mujoco

    monkeypatch.chdir(tmp_path)
    falling = "<mujoco><worldbody><body><freejoint/><geom size='1'/></body></worldbody></mujoco>"
    model = mujoco.MjModel.from_xml_string(falling)
    previous = mujoco.get_mju_user_warning()
    try:
        quickstart.show_warnings_once()
        for n_steps in range(3):
            data = mujoco.MjData(model)
            mujoco.mj_step(model, data, n_steps)
            data.qvel[0] = np.nan
            mujoco.mj_step(model, data)
    finally:
        mujoco.set_mju_user_warning(previous)
    printed = capfd.readouterr()
    assert printed.out == ""
    assert re.fullmatch(r"MuJoCo warns: .*QVEL.*\n", printed.err)
    assert not any(tmp_path.iterdir())


def test_looking_for_a_renderer_writes_no_file(quickstart: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart.os, "environ", dict(quickstart.os.environ))
    # Of this task MuJoCo has a warning
    quickstart.find_renderer("HalfCheetah-v5")
    assert not any(tmp_path.iterdir())


def test_quickstart_without_a_renderer_says_so_and_succeeds(tmp_path: Path):
    out = tmp_path / "run"
    finished = run_quickstart("--env", "InvertedPendulum-v5", "--timesteps", "120", "--out", str(out), MUJOCO_GL="disable")
    assert finished.returncode == 0, finished.stderr
    (line,) = [line for line in finished.stdout.splitlines() if line.startswith("Video:")]
    assert "none, because nothing here can render InvertedPendulum-v5 (disable: " in line
    assert not (out / "video.mp4").exists()
    assert (out / "model.zip").exists()
    assert (out / "learning_curve.png").exists()


def test_quickstart_never_writes_to_a_folder_that_is_there(quickstart: ModuleType, tmp_path: Path):
    names = [quickstart.new_folder(tmp_path / "run").name for _ in range(3)]
    assert names == ["run", "run-2", "run-3"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--timesteps", "0"], "must be above 0, not 0"),
        (["--timesteps", "many"], "invalid positive_int value: 'many'"),
        (["--seed", "-1"], "must be between 0 and 2**32 - 1, not -1"),
        (["--env", "NoSuchTask-v0"], "NoSuchTask-v0 is not an environment that Gymnasium knows"),
        (["--env", "CartPole-v1"], "QSM needs continuous actions (a Box), and those of CartPole-v1 are Discrete(2)"),
    ],
)
def test_quickstart_names_what_is_wrong_with_its_arguments(
    quickstart: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    args: list[str],
    message: str,
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["quickstart.py", *args])
    with pytest.raises(SystemExit) as stopped:
        quickstart.main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_quickstart_says_which_folder_it_cannot_create(quickstart: ModuleType, tmp_path: Path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(quickstart.UserError, match="cannot create the folder"):
        quickstart.new_folder(tmp_path / "file" / "run")


def numbers(pattern: str, stdout: str) -> list[float]:
    """What the groups of a pattern are in the output; all of them finite."""
    found = re.search(pattern, stdout)
    assert found is not None, stdout
    values = [float(value) for value in found.groups()]
    assert np.isfinite(values).all(), stdout
    return values


def run_example(name: str, *args: str, folder: Path) -> str:
    """Run a script in a folder; returns what it printed."""
    finished = run_python(SCRIPT.with_name(name), args, folder)
    assert finished.returncode == 0, finished.stderr
    return str(finished.stdout)


def check_own_environment(folder: Path) -> None:
    before, after = numbers(
        r"before training (\S+), after 110 steps (\S+)", run_example("own_environment.py", "--timesteps", "110", folder=folder)
    )
    # At most five tens of degrees away, or one and a half, in each of 50 steps
    assert -50 * 7.6 < min(before, after) <= max(before, after) < 0


def check_goals(folder: Path) -> None:
    (share,) = numbers(r"reached in (\d+)% of 50 episodes", run_example("goals.py", "--timesteps", "120", folder=folder))
    assert 0 <= share <= 100


def check_images(folder: Path) -> None:
    stdout = run_example("images.py", "--timesteps", "115", folder=folder)
    assert "pictures of (3, 64, 64)" in stdout
    numbers(r"return (\S+) ± (\S+) after 115 steps", stdout)


def check_vectorized(folder: Path) -> None:
    stdout = run_example("vectorized.py", "--timesteps", "120", "--out", "run", folder=folder)
    mean, _ = numbers(r"return (\S+) ± (\S+) after 120 steps", stdout)
    assert -2000 < mean < -100  # of the task, not normalised
    assert QSM.load(folder / "run" / "model")._n_updates == 20  # those after learning_starts: one each step
    assert (folder / "run" / "vecnormalize.pkl").stat().st_size > 0


def check_callbacks(folder: Path) -> None:
    stdout = run_example("callbacks.py", "--timesteps", "204", "--out", "run", folder=folder)
    assert len(re.findall(r"^step \d+: return", stdout, re.MULTILINE)) == 4
    numbers(r"1 training episodes, the last return (\S+)", stdout)
    run = folder / "run"
    assert np.load(run / "evaluations.npz")["timesteps"].tolist() == [51, 102, 153, 204]
    checkpoints = {path.name for path in (run / "checkpoints").iterdir()}
    assert checkpoints == {f"qsm_{step}_steps.zip" for step in (51, 102, 153, 204)}
    assert image.imread(run / "actions.png").std() > 0.05


def check_tuning(folder: Path) -> None:
    pytest.importorskip("rl_zoo3")
    stdout = run_example("tuning.py", "--timesteps", "102", "--trials", "2", folder=folder)
    best, trial = numbers(r"best return (\S+) in trial (\d)", stdout)
    assert best < 0
    assert trial in (0, 1)
    found = re.search(r"QSM arguments: (.*)", stdout)
    assert found is not None
    QSM("MlpPolicy", "Pendulum-v1", **ast.literal_eval(found[1]), buffer_size=10)
    # The trial that is enqueued is the defaults
    source = SCRIPT.with_name("tuning.py").read_text()
    enqueued = re.search(r"enqueue_trial\((.*?)\n    \)", source, re.DOTALL)
    assert enqueued is not None
    first = importlib.import_module("sb3_qsm.zoo.hyperparams").convert_qsm_params(ast.literal_eval(enqueued[1].strip()))
    defaults = {name: parameter.default for name, parameter in inspect.signature(QSM).parameters.items()}
    assert first.pop("policy_kwargs") == {"net_arch": [256, 256]}
    assert QSM("MlpPolicy", "Pendulum-v1", buffer_size=10)._resolve_n_steps() == first.pop("n_steps")
    assert {name: defaults[name] for name in first} == pytest.approx(first)


def check_resume(folder: Path) -> None:
    script = [sys.executable, str(SCRIPT.with_name("resume.py")), "--save-freq", "50", "--out", "run"]
    killed = subprocess.Popen([*script, "--timesteps", "1000000"], cwd=folder, stdout=subprocess.DEVNULL)
    checkpoint, deadline = folder / "run" / "checkpoint.zip", time.monotonic() + 600
    while not checkpoint.exists() and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    reached = read_info(checkpoint)["num_timesteps"]
    assert reached % 50 == 0
    stdout = run_example("resume.py", "--out", "run", "--timesteps", str(reached + 5), folder=folder)
    assert f"going on after {reached} steps" in stdout
    assert f"done after {reached + 5} steps" in stdout
    assert QSM.load(folder / "run" / "model").num_timesteps == reached + 5


def check_export(folder: Path) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    (difference,) = numbers(
        r"at most (\S+) from the model's",
        run_example("export_onnx.py", "--timesteps", "105", "--out", "run", folder=folder),
    )
    assert difference < 1e-5
    observations = np.array([[1.0, 0.0, 0.0], [0.6, -0.8, 2.0]], np.float32)
    (actions,) = onnxruntime.InferenceSession(folder / "run" / "policy.onnx").run(["action"], {"observation": observations})
    expected, _ = QSM.load(folder / "run" / "model").predict(observations, deterministic=True)
    np.testing.assert_allclose(actions, expected, atol=1e-5)


def check_act(folder: Path) -> None:
    pytest.importorskip("onnxscript")
    to_onnx(QSM("MlpPolicy", "Pendulum-v1", buffer_size=10, diffusion_steps=2), folder / "policy.onnx")
    # The script as it stands, and after it a look at what it has imported
    code = (
        "import runpy, sys; sys.argv = ['act_onnx.py', 'policy.onnx', '--episodes', '1']\n"
        f"runpy.run_path({str(SCRIPT.with_name('act_onnx.py'))!r}, run_name='__main__')\n"
        "print('imported:', *{'torch', 'stable_baselines3', 'sb3_qsm', 'onnx'} & set(sys.modules))"
    )
    finished = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, encoding="utf-8", check=False)
    assert finished.returncode == 0, finished.stderr
    numbers(r"return (\S+) ± (\S+) over 1 episodes", finished.stdout)
    assert finished.stdout.splitlines()[-1] == "imported:"


def check_replanning(folder: Path) -> None:
    pytest.importorskip("dtaidistance")
    pytest.importorskip("gymnasium_robotics")
    assert "modes after 120 steps" in run_example("replanning.py", "--timesteps", "120", "--episodes", "1", folder=folder)


CHECKS = {
    "act_onnx.py": check_act,
    "callbacks.py": check_callbacks,
    "export_onnx.py": check_export,
    "goals.py": check_goals,
    "images.py": check_images,
    "own_environment.py": check_own_environment,
    "quickstart.py": lambda folder: None,  # by the tests above
    "replanning.py": check_replanning,
    "resume.py": check_resume,
    "tuning.py": check_tuning,
    "vectorized.py": check_vectorized,
}


@pytest.mark.parametrize("name", sorted({path.name for path in SCRIPT.parent.glob("*.py")} | CHECKS.keys()))
def test_example_does_what_it_promises(name: str, tmp_path: Path):
    assert name in CHECKS, f"examples/{name} has no test: write one and list it in CHECKS"
    CHECKS[name](tmp_path)


def test_replanning_changes_the_mode_where_it_is_blocked():
    """Mode 0 goes straight into the obstacle for ever, mode 1 above it."""
    pytest.importorskip("dtaidistance")
    spec = importlib.util.spec_from_file_location("replanning", SCRIPT.with_name("replanning.py"))
    replanning = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(replanning)

    class TwoWays:
        modes = (0, 1)

        def predict(self, observation, mode):
            x, y = observation
            if x > 0.5:
                action = [5.0 * (1.0 - x), -5.0 * y]  # to the goal
            elif mode == 1 and y < 0.35 and x < 0.4:
                action = [-1.0 if x > -0.5 else 0.0, 1.0]
            else:
                action = [1.0, 0.0]
            return np.clip(action, -1.0, 1.0), None

    env = replanning.gym.make("sb3_qsm/Corridor-v0", step_size=0.2, reward_type="sparse")
    assert replanning.replan(TwoWays(), env, 1) == (True, [1])
    assert replanning.replan(TwoWays(), env, 0, patience=10**6) == (False, [0])
    assert replanning.replan(TwoWays(), env, 0) == (True, [0, 1])
