"""The scripts in examples/, run as a user runs them."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from sb3_qsm import QSM

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


def test_quickstart_writes_model_curve_video_and_results(tmp_path: Path):
    out = tmp_path / "deep" / "run"
    finished = run_quickstart("--timesteps", "300", "--seed", "1", "--out", str(out))
    assert finished.returncode == 0, finished.stderr
    assert "InvertedDoublePendulum-v5 after 300 steps" in finished.stdout
    assert "random policy" in finished.stdout

    results = json.loads((out / "results.json").read_text())
    assert (results["timesteps"], results["seed"]) == (300, 1)
    # A random policy falls within a few steps, each of which pays at most 10
    assert 20 < results["random_mean_return"] < 120
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
            assert video.count_frames() == 15 * 20  # seconds, and the task's frames a second
        assert all(frame.std() > 1 for frame in frames)
        assert any(np.abs(frame.astype(int) - frames[0]).max() > 20 for frame in frames)
    else:
        assert "nothing here can render" in finished.stdout


def test_quickstart_without_a_renderer_says_so_and_succeeds(tmp_path: Path):
    out = tmp_path / "run"
    finished = run_quickstart("--timesteps", "120", "--out", str(out), MUJOCO_GL="disable")
    assert finished.returncode == 0, finished.stderr
    (line,) = [line for line in finished.stdout.splitlines() if line.startswith("Video:")]
    assert "none, because nothing here can render InvertedDoublePendulum-v5 (disable: " in line
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


def test_replanning():
    pytest.importorskip("dtaidistance")
    script = SCRIPT.with_name("replanning.py")
    finished = subprocess.run(
        [sys.executable, str(script), "--timesteps", "120", "--episodes", "1"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert "modes after 120 steps" in finished.stdout


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

    env = replanning.gym.make(replanning.ENV, **replanning.OPTIONS)
    assert replanning.replan(TwoWays(), env, 1) == (True, [1])
    assert replanning.replan(TwoWays(), env, 0, patience=10**6) == (False, [0])
    assert replanning.replan(TwoWays(), env, 0) == (True, [0, 1])
