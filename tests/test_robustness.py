"""What a run leaves behind when the disk is full or somebody presses Ctrl-C."""

import errno
import io
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import gymnasium as gym
import pytest
from stable_baselines3.common.callbacks import BaseCallback

from sb3_qsm import QSM
from sb3_qsm.common.checkpoint import (
    CHECKPOINT_NAME,
    CheckpointError,
    RunCheckpointCallback,
    read_info,
    resume,
    save_checkpoint,
)
from sb3_qsm.common.files import replacing
from sb3_qsm.export import to_torch_export

ROOT = Path(__file__).parents[1]
SMALL = {"learning_starts": 10, "batch_size": 8, "buffer_size": 2000, "diffusion_steps": 2, "policy_kwargs": {"net_arch": [8]}}


def make_model(**changes):
    return QSM("MlpPolicy", gym.make("Pendulum-v1"), **{**SMALL, **changes})


def size_limit(folder):
    """The kernel refuses files above a size."""
    everything = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    return (
        "File too large",
        lambda room: resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY)),
        lambda: resource.setrlimit(resource.RLIMIT_FSIZE, everything),
    )


def small_disk(folder):
    """A file system of its own, on which another file takes the room."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], check=True)
    filler = folder / "filler"

    def fill(room):
        with open(filler, "wb") as file:
            disk = os.statvfs(folder)
            file.write(bytes(disk.f_bavail * disk.f_frsize - room // disk.f_frsize * disk.f_frsize))

    return "No space left on device", fill, filler.unlink


def run_on_full_disk(kind, folder):
    message, fill, free = kind(folder)
    run = folder / "run"
    model = make_model(learning_starts=1000)
    callback = RunCheckpointCallback(300, run)
    model.learn(30, callback=callback)
    fill((run / CHECKPOINT_NAME).stat().st_size // 2)
    with pytest.raises(OSError, match=f"{message}; what was there before is kept: .*{CHECKPOINT_NAME}"):
        model.learn(1000, callback=callback, reset_num_timesteps=False)
    assert model.num_timesteps == 300
    assert [path.name for path in run.iterdir()] == [CHECKPOINT_NAME]
    assert read_info(run)["num_timesteps"] == 30
    free()

    for save, load, name in (
        (model.save, QSM.load, "model.zip"),
        (model.save_safe, QSM.load_safe, "model.safetensors"),
        (lambda path: to_torch_export(model, path), None, "policy.pt2"),
    ):
        save(folder / name)
        old = (folder / name).read_bytes()
        fill(4096)
        with pytest.raises(OSError, match=f"{message}; what was there before is kept: .*{name}"):
            save(folder / name)
        free()
        assert (folder / name).read_bytes() == old
        assert load is None or load(folder / name).num_timesteps == 300

    model = resume(QSM, run, gym.make("Pendulum-v1"))
    model.learn(370, callback=callback, reset_num_timesteps=False)
    assert read_info(run)["num_timesteps"] == 400
    assert {path.name for path in folder.iterdir()} == {"run", "model.zip", "model.safetensors", "policy.pt2"}


def test_full_disk(tmp_path):
    """The second checkpoint has no room: the first stays, the run ends with a clear error, and goes on when there is room."""
    # In a namespace of its own, where mounting is allowed and ends with the process
    namespace = ["unshare", "--mount", *(["--map-root-user"] if os.getuid() else [])]
    try:
        subprocess.run([*namespace, "mount", "-t", "tmpfs", "tmpfs", tmp_path], check=True, capture_output=True)
        kind = small_disk
    except (OSError, subprocess.CalledProcessError):
        namespace, kind = [], size_limit
    code = f"from tests.test_robustness import *; run_on_full_disk({kind.__name__}, Path({str(tmp_path)!r}))"
    done = subprocess.run([*namespace, sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "folder" / "file"
    with replacing(path) as file:
        file.write(b"old")

    def fail(error):
        with replacing(path) as file:
            file.write(b"half of the new")
            raise error

    for error in (ValueError("no"), KeyboardInterrupt(), OSError("without a number")):
        with pytest.raises(type(error)) as found:
            fail(error)
        assert found.value is error
        assert path.read_bytes() == b"old"
        assert [found.name for found in path.parent.iterdir()] == ["file"]
    with replacing(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


def write(path, content):
    with replacing(path) as file:
        file.write(content)


def test_what_is_at_the_path_stays_what_it_was(tmp_path):
    target, link, pipe = tmp_path / "target", tmp_path / "link", tmp_path / "pipe"
    target.write_bytes(b"old")
    target.chmod(0o600)
    link.symlink_to(target)
    write(link, b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert target.stat().st_mode & 0o777 == 0o600
    os.mkfifo(pipe)
    with open(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK), "rb") as reader:
        write(pipe, b"through")
        assert reader.read() == b"through"
    assert pipe.is_fifo()
    write(tmp_path / ("n" * 255), b"long")
    assert (tmp_path / ("n" * 255)).read_bytes() == b"long"
    # 255 bytes, in letters of three
    write(tmp_path / ("\u4e00" * 85), b"long")
    with pytest.raises(OSError, match="No space left on device; what was there before is kept: '/dev/full'"):
        write(Path("/dev/full"), b"x" * 100_000)
    done = subprocess.run(
        [sys.executable, "-c", "from tests.test_robustness import *; write(Path('/dev/stdout'), b'piped')"],
        capture_output=True,
        check=True,
        cwd=ROOT,
    )
    assert done.stdout == b"piped"


def test_a_private_file_is_never_open_to_others(tmp_path):
    path = tmp_path / "file"
    path.touch(0o600)
    with replacing(path) as file:
        (temporary,) = tmp_path.glob(".file.*.tmp")
        assert temporary.stat().st_mode & 0o777 == 0o600
        file.write(b"new")


def test_what_another_machine_writes_is_left_alone(tmp_path):
    foreign = tmp_path / ".file.elsewhere-4194305-00.tmp"
    foreign.touch()
    write(tmp_path / "file", b"mine")
    assert foreign.exists()


def test_two_processes_write_the_same_file(tmp_path):
    path = tmp_path / "file"
    with replacing(path) as file:
        file.write(b"half")
        code = f"from tests.test_robustness import *; write(Path({str(path)!r}), b'whole')"
        subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
        assert path.read_bytes() == b"whole"
        file.write(b" and half")
    assert path.read_bytes() == b"half and half"
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


def test_a_folder_of_the_models_name(tmp_path):
    """As ``sb3-qsm train`` leaves it: the file is replaced whole, and found."""
    model = make_model()
    (tmp_path / "run").mkdir()
    for save, load, suffix in ((model.save, QSM.load, "zip"), (model.save_safe, QSM.load_safe, "safetensors")):
        save(tmp_path / "run")
        old = (tmp_path / f"run.{suffix}").read_bytes()
        real, os.replace = os.replace, lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device"))
        try:
            with pytest.raises(OSError, match="No space left on device; what was there before is kept"):
                save(tmp_path / "run")
        finally:
            os.replace = real
        assert (tmp_path / f"run.{suffix}").read_bytes() == old
        assert load(tmp_path / "run").learning_starts == load(f"{tmp_path}/run/").learning_starts == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.safetensors", "run.zip"]


def test_any_damage_of_a_checkpoint_is_named(tmp_path):
    model = make_model().learn(12, RunCheckpointCallback(100, tmp_path))
    path = tmp_path / CHECKPOINT_NAME
    content = path.read_bytes()
    model.save(tmp_path / "model")
    saved = (tmp_path / "model.zip").read_bytes()
    generator = random.Random(0)
    # The central directory is at the end
    places = [*range(40), *(generator.randrange(len(content)) for _ in range(40)), *range(-300, 0)]
    refused = 0
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            read_info(path)
        except CheckpointError:
            refused += 1
        damaged = bytearray(saved)
        damaged[place % len(saved)] ^= 1 << generator.randrange(8)
        try:
            QSM._check_saved_file(io.BytesIO(damaged))
        except ValueError:
            refused += 1
    # Some bits mean nothing, such as those of dates
    assert refused > len(places)
    for members, missing in (({"info.json": b'{"format": 1}'}, "model.zip, state.pkl, replay_buffer.pkl, algorithm"),):
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, data)
        with pytest.raises(CheckpointError, match=f"it has no {missing}"):
            resume(QSM, path, gym.make("Pendulum-v1"))


class FailingFile(io.BytesIO):
    """A file that fails once, at the given write."""

    def __init__(self, error, count):
        super().__init__()
        self.error = error
        self.count = count

    def write(self, data):
        self.count -= 1
        if self.count == 0:
            raise self.error
        return super().write(data)


def test_saving_is_interrupted_by_what_happened():
    """And not by what PyTorch makes of it."""
    model = make_model()
    whole = FailingFile(None, 0)
    model.save(whole)
    assert -whole.count > 20
    for count in range(1, -whole.count, -whole.count // 8):
        for error in (KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")):
            with pytest.raises(type(error)) as found:
                model.save(FailingFile(error, count))
            assert found.value is error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_an_archive_is_interrupted_by_what_happened(tmp_path, monkeypatch, error):
    """And not by what :mod:`zipfile` makes of it when it had just begun a member."""
    model = make_model().learn(12, callback=RunCheckpointCallback(5, tmp_path))
    model.save(tmp_path / "model")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    compressor = zipfile._get_compressor
    begun = 0

    def fail(*args):
        nonlocal begun
        begun += 1
        if begun == last:
            raise error
        return compressor(*args)

    monkeypatch.setattr(zipfile, "_get_compressor", fail)
    # A checkpoint's first member comes after those of the model in it
    members = len(zipfile.ZipFile(tmp_path / "model.zip").namelist())
    for last, call in (
        (1, lambda: model.save(tmp_path / "model")),
        (members + 1, lambda: save_checkpoint(model, tmp_path)),
    ):
        begun = 0
        with pytest.raises(type(error)) as found:
            call()
        assert begun == last
        assert found.value is error or found.value.__cause__ is error
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


class SaveOften(BaseCallback):
    """Overwrite the same files every few steps."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def _on_step(self):
        if self.num_timesteps % 3 == 0:
            self.model.save(self.folder / "model.zip")
            self.model.save_safe(self.folder / "model.safetensors")
        return True


def test_interrupt_at_any_moment(tmp_path):
    env = gym.make("Pendulum-v1")
    stop = threading.Event()

    def interrupt(seconds):
        # Of the processor's time, so that as much is done on a busy machine
        due = time.process_time() + seconds
        while not stop.wait(0.002):
            if time.process_time() >= due:
                os.kill(os.getpid(), signal.SIGINT)
                # Again, should the first have come where Python has to swallow it
                due += 2.0

    # Which xdist's workers ignore
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    generator = random.Random(0)
    steps = [0]
    try:
        make_model().learn(12, callback=[SaveOften(tmp_path), RunCheckpointCallback(5, tmp_path)])
        for _ in range(8):
            model = resume(QSM, tmp_path, env)
            stop.clear()
            thread = threading.Thread(target=interrupt, args=(generator.uniform(0.05, 0.6),))
            thread.start()
            callbacks = [SaveOften(tmp_path), RunCheckpointCallback(5, tmp_path)]
            try:
                with pytest.raises(KeyboardInterrupt):
                    model.learn(10**6, callback=callbacks, reset_num_timesteps=False)
            finally:
                stop.set()
                thread.join()
            left = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")}
            assert left == {CHECKPOINT_NAME, "model.safetensors", "model.zip"}
            assert QSM.load(tmp_path / "model.zip").num_timesteps >= steps[-1] - 5
            assert QSM.load_safe(tmp_path / "model.safetensors").num_timesteps >= steps[-1] - 5
            steps.append(read_info(tmp_path)["num_timesteps"])
    finally:
        signal.signal(signal.SIGINT, handler)
    assert steps == sorted(steps)
    assert steps[-1] > steps[1]


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.0, 0.5, 1.3])
def test_interrupted_process(tmp_path, seconds):
    """Ctrl-C in ``sb3-qsm train``: the model so far is saved, and the run can be resumed."""
    pytest.importorskip("rl_zoo3")
    options = ["-n", "1000000", "-f", str(tmp_path), "--eval-freq", "-1", "--checkpoint-freq", "20", "--save-freq", "20"]
    params = ["-params", "learning_starts:20", "batch_size:8", "diffusion_steps:2", "policy_kwargs:dict(net_arch=[8])"]
    command = [sys.executable, "-m", "sb3_qsm", "train", "--env", "Pendulum-v1", *options, *params]
    # A shell lets its background jobs ignore Ctrl-C, and what they start inherits it
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    run = tmp_path / "qsm" / "Pendulum-v1_1"
    deadline = time.monotonic() + 300
    while not (run / "rl_model_40_steps.zip").exists():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert (run / "Pendulum-v1.zip").is_file(), output
    model = QSM.load(run / "Pendulum-v1.zip")
    assert model.num_timesteps >= 40
    again = resume(QSM, run, gym.make("Pendulum-v1"))
    assert 20 <= again.num_timesteps <= model.num_timesteps
    for path in run.glob("rl_model_*.zip"):
        QSM.load(path)
    assert not list(run.glob("*.tmp"))
