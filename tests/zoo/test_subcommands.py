"""Every subcommand, for real, with our algorithm."""

import pickle
import re
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
from sb3_qsm.common.checkpoint import read_info
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

    options = ("--no-display", "--save-figures", tmp_path / "figures")
    status, _, err = cli("all_plots", "-e", "Pendulum-v1", "-f", logs, tmp_path, *options)
    assert status == 0, err
    assert f"No run of Pendulum-v1 by qsm in {tmp_path}: the table has 0.0 there" in err
    assert iio.imread(tmp_path / "figures" / "Results_Pendulum-v1.png").std() > 5


def test_successes_of_goal_tasks_are_plotted(cli, logs, tmp_path):
    """The mazes of gymnasium-robotics have `success` in their info, the Fetch tasks `is_success`."""
    for name in ("success", "is_success"):
        run = tmp_path / name / "qsm" / "Maze-v3_1"
        run.mkdir(parents=True)
        rows = "".join(f"{-step},{step},{step},{step % 2}.0\n" for step in range(1, 9))
        (run / "0.monitor.csv").write_text(f'#{{"t_start": 0.0, "env_id": "Maze-v3"}}\nr,l,t,{name}\n{rows}')
        options = ("-w", 2, "-y", "success", "--save-figures", tmp_path / name)
        status, _, err = cli("plot_train", "-a", "QSM", "-e", "Maze-v3", "-f", tmp_path / name, *options)
        assert status == 0, err
    one, other = (iio.imread(tmp_path / name / "Training_Success_Rate.png") for name in ("success", "is_success"))
    assert (one == other).all()
    assert one.std() > 5


def test_a_crash_leaves_the_last_whole_checkpoint(cli, tmp_path, monkeypatch):
    """Between two rollouts; what rl_zoo3 ends once more, after the error, is not the checkpoint."""
    (tmp_path / "crashing_env.py").write_text(CRASHING_ENV)
    monkeypatch.syspath_prepend(tmp_path)
    options = ("-n", 400, "-f", tmp_path / "logs", "--eval-freq", -1, "--checkpoint-freq", 100, "--verbose", 0)
    status, _, err = cli("train", "--env", "Crashing-v0", "--gym-packages", "crashing_env", *options, *SHORT)
    assert status == 1
    assert err.splitlines()[-1] == "sb3-qsm train: error: ZeroDivisionError: division by zero"
    assert read_info(tmp_path / "logs" / "qsm" / "Crashing-v0_1")["num_timesteps"] == 200


CRASHING_ENV = """
import gymnasium as gym
from gymnasium.envs.classic_control import PendulumEnv

class Crashing(PendulumEnv):
    steps = 0

    def step(self, action):
        self.steps += 1
        self.steps == 256 and 1 / 0
        return super().step(action)

gym.register("Crashing-v0", Crashing, max_episode_steps=50)
"""


def test_a_resumed_run_logs_and_talks_as_it_is_told(cli, tmp_path):
    """Into its own folder of TensorBoard, which is not the newest, and with an option that is the default's value."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    common = ("--env", "Pendulum-v1", "-f", tmp_path / "logs", "-tb", tmp_path / "tb", "--eval-freq", -1, "--log-interval", 1)
    for _ in range(2):
        status, _, err = cli("train", *common, "-n", 210, "--verbose", 0, "--keep-checkpoint", *SHORT)
        assert status == 0, err
    run = tmp_path / "logs" / "qsm" / "Pendulum-v1_1"
    # As if the run had been killed half-way
    for name in ("args", "config"):
        file = run / "Pendulum-v1" / f"{name}.yml"
        file.write_text(re.sub(r"(n_timesteps\s*- )\d+", r"\g<1>450", file.read_text()))
    status, _, err = cli("train", "--resume", run, "--device", "foo")
    assert status == 2
    assert "argument --device: " in err
    status, out, err = cli("train", "--resume", run, "--verbose", 1)
    assert status == 0, err
    assert "Using 1 environments" in out
    steps = []
    for number in (1, 2):
        events = accumulator.EventAccumulator(str(tmp_path / "tb" / "Pendulum-v1" / f"QSM_{number}")).Reload()
        steps.append([event.step for event in events.Scalars("rollout/ep_rew_mean")])
    assert steps == [[200, 410], [200]]


def test_an_agent_with_statistics_is_trained_on_resumed_and_played(cli, tmp_path):
    common = ("--env", "Pendulum-v1", "-f", tmp_path, "--eval-freq", -1, "--verbose", 0)
    status, _, err = cli("train", *common, "-n", 160, *SHORT, "normalize:dict(norm_reward=False,clip_obs=4.0)")
    assert status == 0, err
    first, second = (tmp_path / "qsm" / f"Pendulum-v1_{number}" for number in (1, 2))
    options = ("-n", 60, "--keep-checkpoint", "-i", first / "Pendulum-v1.zip")
    status, _, err = cli("train", *common, *options)
    assert status == 0, err
    (second / "Pendulum-v1" / "vecnormalize.pkl").rename(tmp_path / "before.pkl")
    status, _, err = cli("train", "--resume", second)
    assert status == 0, err
    stats = []
    for path in (first / "Pendulum-v1" / "vecnormalize.pkl", tmp_path / "before.pkl", second / "Pendulum-v1/vecnormalize.pkl"):
        stats.append(pickle.loads(path.read_bytes()))
        assert (stats[-1].clip_obs, stats[-1].norm_reward) == (4.0, False)
    counts = [one.obs_rms.count for one in stats]
    assert counts[1] == counts[0] + 61
    assert counts[2] == counts[1] + 1  # the first state of an episode
    status, out, err = cli("enjoy", "--env", "Pendulum-v1", "-f", tmp_path, "--no-render", "-n", 10)
    assert status == 0, err
    assert "'clip_obs': 4.0" in out


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


def test_plot_policy_of_an_agent_with_a_small_memory(cli, tmp_path):
    memory = ("optimize_memory_usage:True", "replay_buffer_kwargs:dict(handle_timeout_termination=False)")
    common = ("--env", "Pendulum-v1", "-f", tmp_path)
    status, _, err = cli("train", *common, "-n", 160, "--eval-freq", -1, "--verbose", 0, *SHORT, *memory)
    assert status == 0, err
    status, _, err = cli("plot_policy", *common, "-n", 0)
    assert status == 0, err


def test_benchmark_and_pictures_in_an_environment_with_modes(cli, tmp_path, monkeypatch):
    env = "sb3_qsm/NGoalPoint-v0"
    options = ("-n", 200, "-f", tmp_path, "--eval-freq", -1, "--verbose", 0, "--env-kwargs", "n_goals:3")
    status, _, err = cli("train", "--env", env, *options, *SHORT)
    assert status == 0, err
    status, out, err = cli("plot_policy", "--env", env, "-f", tmp_path, "-n", 3)
    assert status == 0, err
    assert "3 episodes, success rate" in out
    (picture,) = tmp_path.glob("qsm/*/plots/trajectories.png")
    assert iio.imread(picture).std() > 10

    monkeypatch.chdir(tmp_path)
    options = ("--no-hub", "-n", 200, "--num-threads", 1)
    status, out, err = cli("benchmark", "--log-dir", tmp_path, "--benchmark-dir", tmp_path / "bench", *options)
    assert status == 0, err
    assert "trying to download" not in out
    rows = [line for line in (tmp_path / "benchmark.md").read_text().splitlines() if line.startswith("|qsm")]
    assert len(rows) == 1
    assert "NGoalPoint-v0" in rows[0]


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
    DDiffPG.load(next(run.glob("*Point-v0.zip")), env=None).save_safe(tmp_path / "point")
    options = ("--algo", "ddiffpg", "--env", "sb3_qsm/NGoalPoint-v0", "--safe", tmp_path / "point.safetensors")
    status, out, err = cli("enjoy", *options, "--no-render", "-n", 30)
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
