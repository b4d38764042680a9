"""Every subcommand, for real, with our algorithm."""

import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import huggingface_hub
import imageio.v3 as iio
import numpy as np
import pytest
import yaml
from huggingface_hub.errors import RemoteEntryNotFoundError
from stable_baselines3 import SAC
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_qsm import QSM, DDiffPG
from sb3_qsm.zoo.cli import COMMANDS
from tests.zoo.conftest import REPOSITORY, SHORT


def frames(file):
    video = iio.imread(file, plugin="FFMPEG")
    assert video.ndim == 4
    return video


def test_train_writes_what_rl_zoo3_writes(logs):
    run = logs / "qsm" / "Pendulum-v1_1"
    names = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert names == {
        "0.monitor.csv",
        "Pendulum-v1.zip",
        "Pendulum-v1/args.yml",
        "Pendulum-v1/command.txt",
        "Pendulum-v1/config.yml",
        "best_model.zip",
        "evaluations.npz",
        "rl_model_400_steps.zip",
    }
    model = QSM.load(run / "Pendulum-v1.zip")
    assert model.num_timesteps == 400
    assert model.diffusion_steps == 2
    assert np.load(run / "evaluations.npz")["timesteps"].tolist() == [200, 400]


def test_enjoy(cli, logs):
    status, out, err = cli("enjoy", "--env", "Pendulum-v1", "-f", logs, "--exp-id", 1, "--no-render", "-n", 400)
    assert status == 0, err
    assert "2 Episodes" in out
    assert str(logs / "qsm" / "Pendulum-v1_1" / "Pendulum-v1.zip") in out
    returns = [float(line.split()[-1]) for line in out.splitlines() if line.startswith("Episode Reward")]
    assert all(-2000 < value < 0 for value in returns)


def test_enjoy_a_safe_file(cli, logs, tmp_path):
    QSM.load(logs / "qsm" / "Pendulum-v1_1" / "Pendulum-v1.zip").save_safe(tmp_path / "pendulum")
    common = ("enjoy", "--env", "Pendulum-v1", "--no-render", "-n", 400)
    _, expected, _ = cli(*common, "-f", logs, "--exp-id", 1)
    status, out, err = cli(*common, "--safe", tmp_path / "pendulum.safetensors")
    assert status == 0, err
    assert f"Loading {tmp_path / 'pendulum.safetensors'}" in out
    assert "2 Episodes" in out
    assert out.partition("pendulum.safetensors")[2] == expected.partition("Pendulum-v1.zip")[2]


def test_enjoy_a_safe_file_with_statistics(cli, tmp_path, monkeypatch):
    env = VecNormalize(make_vec_env("Pendulum-v1"))
    model = QSM("MlpPolicy", env, learning_starts=500, buffer_size=500).learn(50)
    model.save_safe(tmp_path / "pendulum")
    seen = []
    real_predict = QSM.predict

    def predict(self, observation, *args, **kwargs):
        seen.append(observation)
        return real_predict(self, observation, *args, **kwargs)

    monkeypatch.setattr(QSM, "predict", predict)
    status, _, err = cli("enjoy", "--env", "Pendulum-v1", "--no-render", "-n", 5, "--safe", tmp_path / "pendulum.safetensors")
    assert status == 0, err
    first = make_vec_env("Pendulum-v1", seed=0).reset()
    np.testing.assert_array_equal(seen[0], env.normalize_obs(first))
    assert np.abs(seen[0] - first).max() > 0.1


def test_agents_that_only_play_have_no_replay_buffer(cli, logs, monkeypatch):
    sizes = []
    real_predict = QSM.predict

    def predict(self, *args, **kwargs):
        sizes.append(self.buffer_size)
        return real_predict(self, *args, **kwargs)

    monkeypatch.setattr(QSM, "predict", predict)
    cli("enjoy", "--env", "Pendulum-v1", "-f", logs, "--no-render", "-n", 3)
    assert sizes == [1, 1, 1]
    assert QSM.load(logs / "qsm" / "Pendulum-v1_1" / "Pendulum-v1.zip").buffer_size == 1_000_000


def test_record_video(cli, logs, tmp_path):
    status, _, err = cli("record_video", "--env", "Pendulum-v1", "-f", logs, "-n", 20, "-o", tmp_path, "--load-best")
    assert status == 0, err
    (video,) = tmp_path.glob("best-model-qsm-Pendulum-v1-*.mp4")
    pictures = frames(video)
    assert len(pictures) >= 20
    assert pictures.std() > 5  # not one colour
    assert np.abs(pictures[0].astype(int) - pictures[-1]).max() > 50  # the pendulum moved


def test_record_training_and_its_subprocesses(cli, logs):
    # best_model, the final one and a checkpoint: three processes that have to know the algorithm
    status, _, err = cli("record_training", "--env", "Pendulum-v1", "-f", logs, "--exp-id", 1, "-n", 10)
    assert status == 0, err
    videos = logs / "qsm" / "Pendulum-v1_1" / "videos"
    parts = sorted(path.name.split("-qsm")[0] for path in videos.glob("*.mp4") if path.name != "training.mp4")
    assert parts == ["best-model", "checkpoint-400", "final-model"]
    whole = frames(videos / "training.mp4")
    assert len(whole) >= 30
    # ffmpeg wrote a caption into each part, the checkpoint's first
    single = frames(next(videos.glob("checkpoint*.mp4")))
    assert np.abs(whole[0].astype(int) - single[0])[:40].max() > 100


def test_plot_train(cli, logs, tmp_path):
    status, out, err = cli("plot_train", "-e", "Pendulum-v1", "-f", logs, "-w", 1, "--save-figures", tmp_path)
    assert status == 0, err
    assert f"Saved {tmp_path / 'Training_Episodic_Reward.png'}" in out
    assert iio.imread(tmp_path / "Training_Episodic_Reward.png").std() > 5


def test_plots_of_an_environment_with_a_slash(cli, logs, tmp_path):
    shutil.copytree(logs / "qsm" / "Pendulum-v1_1", tmp_path / "logs" / "qsm" / "my-Pendulum-v1_1")
    shutil.copytree(logs / "qsm" / "Pendulum-v1_2", tmp_path / "logs" / "qsm" / "my-Pendulum-v1_2")
    options = ("-e", "my/Pendulum-v1", "-f", tmp_path / "logs", "--save-figures", tmp_path)
    status, _, err = cli("plot_train", *options, "-w", 1)
    assert status == 0, err
    status, _, err = cli("all_plots", *options, "-o", tmp_path / "results")
    assert status == 0, err
    with open(tmp_path / "results.pkl", "rb") as file:
        assert len(pickle.load(file)["my-Pendulum-v1"][f"QSM-{tmp_path / 'logs'}"]["last_evals"]) == 2


def test_all_plots_and_plot_from_file(cli, logs, tmp_path):
    data = tmp_path / "results"
    options = ("--no-million", "--save-figures", tmp_path)
    status, out, err = cli("all_plots", "-e", "Pendulum-v1", "-f", logs, "-o", data, *options)
    assert status == 0, err
    assert "QSM" in out
    with open(f"{data}.pkl", "rb") as file:
        results = pickle.load(file)["Pendulum-v1"]
    assert results[f"QSM-{logs}"]["timesteps"].tolist() == [200, 400]
    assert len(results[f"QSM-{logs}"]["last_evals"]) == 2

    status, _, err = cli("plot_from_file", "-i", data, "-o", tmp_path / "final.svg", "--save-figures", tmp_path)
    assert status == 0, err
    assert "<svg" in (tmp_path / "final.svg").read_text()
    assert {"Results_Pendulum-v1.png", "Sensitivity_plot.png"} <= {path.name for path in tmp_path.iterdir()}


def test_benchmark_and_its_subprocess(cli, logs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ("--no-hub", "-n", 200, "--num-threads", 1)
    status, _, err = cli("benchmark", "--log-dir", logs, "--benchmark-dir", tmp_path / "bench", *options)
    assert status == 0, err
    rows = [line for line in (tmp_path / "benchmark.md").read_text().splitlines() if line.startswith("|qsm")]
    assert len(rows) == 1
    assert "Pendulum-v1" in rows[0]


class Hub:
    """The hub at its client's boundary: what was uploaded lies in a folder, and can be downloaded from there."""

    def __init__(self, folder):
        self.folder = folder
        self.calls = []

    def install(self, monkeypatch):
        monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda _, **kwargs: self.calls.append(kwargs["repo_id"]))
        monkeypatch.setattr(
            huggingface_hub.HfApi, "snapshot_download", lambda _, **kwargs: Path(kwargs["local_dir"]).mkdir(parents=True)
        )
        monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", self.upload)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.download)

    def upload(self, *, repo_id, folder_path, commit_message):
        self.calls.append(commit_message)
        Path(folder_path).rename(self.folder)

    def download(self, repo_id, filename, **kwargs):
        self.calls.append(filename)
        if not (self.folder / filename).is_file():
            import httpx2 as httpx

            response = httpx.Response(404, request=httpx.Request("GET", f"https://huggingface.co/{repo_id}/{filename}"))
            raise RemoteEntryNotFoundError("404 Client Error", response=response)
        return str(self.folder / filename)


def test_push_to_hub_and_load_from_hub(cli, logs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub = Hub(tmp_path / "on-the-hub")
    hub.install(monkeypatch)
    options = ("-orga", "somebody", "-m", "A pendulum", "-n", 20)
    status, _, err = cli("push_to_hub", "--env", "Pendulum-v1", "-f", logs, "--exp-id", 1, *options)
    assert status == 0, err
    assert hub.calls == ["somebody/qsm-Pendulum-v1", "A pendulum"]
    card = (hub.folder / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["library_name"] == "stable-baselines3"
    assert metadata["model-index"][0]["name"] == "QSM"
    assert metadata["model-index"][0]["results"][0]["dataset"]["name"] == "Pendulum-v1"
    assert frames(hub.folder / "replay.mp4").std() > 5
    with zipfile.ZipFile(hub.folder / "qsm-Pendulum-v1.zip") as archive:
        assert archive.testzip() is None

    hub.calls.clear()
    arguments = ("load_from_hub", "--env", "Pendulum-v1", "-f", tmp_path / "loaded", "-orga", "somebody")
    status, _, err = cli(*arguments)
    assert status == 1
    assert err.startswith("sb3-qsm load_from_hub: error: You are about to download a model")
    assert err.count("\n") == 1
    monkeypatch.setenv("TRUST_REMOTE_CODE", "True")
    status, out, err = cli(*arguments)
    assert status == 0, err
    assert "No normalization file" in out  # the 404 in between
    loaded = tmp_path / "loaded" / "qsm" / "Pendulum-v1_1"
    assert QSM.load(loaded / "Pendulum-v1.zip").num_timesteps == 400
    status, out, err = cli("enjoy", "--env", "Pendulum-v1", "-f", tmp_path / "loaded", "--no-render", "-n", 200)
    assert status == 0, err


def test_plot_policy(cli, logs, tmp_path):
    arguments = ("plot_policy", "--env", "Pendulum-v1", "-f", logs, "--exp-id", 1, "-o", tmp_path / "pictures")
    status, out, err = cli(*arguments)
    assert status == 0, err
    assert str(logs / "qsm" / "Pendulum-v1_1" / "Pendulum-v1.zip") in out
    assert "No trajectories: the info at the end of an episode must have 'success'" in out
    files = sorted((tmp_path / "pictures").iterdir())
    assert [file.name for file in files] == ["actions.png", "reverse_process.png", "score_field.png"]
    for file in files:
        assert f"Saved {file}" in out
        assert iio.imread(file).std() > 10
    status, _, err = cli(*arguments, "-n", -1)
    assert status == 2
    assert err == "sb3-qsm plot_policy: error: argument -n/--n-episodes: must be an integer >= 0, got -1\n"


def test_plot_policy_in_an_environment_with_modes(cli, tmp_path):
    env = "sb3_qsm/NGoalPoint-v0"
    options = ("-n", 200, "-f", tmp_path, "--eval-freq", -1, "--verbose", 0, "--env-kwargs", "n_goals:3")
    status, _, err = cli("train", "--env", env, *options, *SHORT)
    assert status == 0, err
    status, out, err = cli("plot_policy", "--env", env, "-f", tmp_path, "-n", 3)
    assert status == 0, err
    assert "3 episodes, success rate" in out
    (picture,) = tmp_path.glob("qsm/*/plots/trajectories.png")
    assert iio.imread(picture).std() > 10


def test_ddiffpg_from_training_to_resuming(cli, tmp_path):
    pytest.importorskip("dtaidistance")
    common = ("--algo", "ddiffpg", "--env", "sb3_qsm/NGoalPoint-v0", "-f", tmp_path, "--verbose", 0)
    options = ("-n", 60, "--eval-freq", -1, "--checkpoint-freq", 30, "--keep-checkpoint")
    network = ("-params", "learning_starts:30", "policy_kwargs:dict(net_arch=[16])")
    status, out, err = cli("train", *common, *options, *network)
    assert status == 0, err
    assert "hyperparams/ddiffpg.yml" in out
    (run,) = (tmp_path / "ddiffpg").glob("*_1")
    model = DDiffPG.load(next(run.glob("*Point-v0.zip")), env=None)
    assert (model.target_action_steps, model.num_timesteps) == (5, 60)
    status, out, err = cli("enjoy", *common, "--no-render", "-n", 30)
    assert status == 0, err
    status, out, err = cli("train", "--resume", run)
    assert status == 0, err
    assert "Resuming at step 60 of 60" in out


def test_other_algorithms_work_as_in_rl_zoo3(cli, tmp_path):
    network = ("-params", "learning_starts:50", "policy_kwargs:dict(net_arch=[16])")
    common = ("--env", "Pendulum-v1", "-n", 60, "-f", tmp_path, "--eval-freq", -1, "--verbose", 0)
    status, out, err = cli("train", "--algo", "sac", *common, *network)
    assert status == 0, err
    assert "rl_zoo3/hyperparams/sac.yml" in out
    assert isinstance(SAC.load(tmp_path / "sac" / "Pendulum-v1_1" / "Pendulum-v1.zip"), SAC)
    assert not (tmp_path / "sac" / "Pendulum-v1_1" / "checkpoint.zip").exists()


def test_as_a_module_with_two_processes_of_environments(tmp_path):
    command = [
        sys.executable,
        "-m",
        "sb3_qsm",
        "train",
        "--env",
        "Pendulum-v1",
        "-n",
        "60",
        "-f",
        str(tmp_path),
        "--eval-freq",
        "-1",
    ]
    extra = ["--vec-env", "subproc", *SHORT, "n_envs:2"]
    done = subprocess.run([*command, *extra], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "hyperparams/qsm.yml" in done.stdout
    run = tmp_path / "qsm" / "Pendulum-v1_1"
    assert sorted(path.name for path in run.glob("*.monitor.csv")) == ["0.monitor.csv", "1.monitor.csv"]


def test_help_names_every_subcommand(cli):
    status, out, _ = cli("--help")
    assert status == 0
    for name, text in COMMANDS.items():
        assert f"{name} " in out
        assert text in out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_subcommand_names_our_default(cli, command):
    with pytest.raises(SystemExit) as exit_:
        cli(command, "--help")
    assert exit_.value.code == 0


def test_a_goal_task_goes_on_and_is_drawn(cli, tmp_path):
    """With `monitor_kwargs` as text in the configuration, as all goal tasks of qsm.yml have it."""
    pytest.importorskip("gymnasium_robotics")
    options = ["--eval-freq", -1, "-f", tmp_path, "--checkpoint-freq", 100, "--keep-checkpoint"]
    params = ["-params", "learning_starts:340", "batch_size:8"]
    status, _, err = cli("train", "--env", "PointMaze_UMaze-v3", "-n", 310, *options, *params)
    assert status == 0, err
    run = tmp_path / "qsm" / "PointMaze_UMaze-v3_1"
    status, _, err = cli("train", "--resume", run)
    assert status == 0, err
    status, _, err = cli("plot_policy", "--env", "PointMaze_UMaze-v3", "-f", tmp_path, "-n", 0, "-o", tmp_path / "pictures")
    assert status == 0, err
    assert {path.name for path in (tmp_path / "pictures").iterdir()} >= {"actions.png", "score_field.png"}
