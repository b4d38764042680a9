"""A short training, and a PostgreSQL server of the tests' own."""

import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("rl_zoo3", reason="the command line needs pip install 'sb3-qsm[zoo]'")

REPOSITORY = Path(__file__).parents[2]
# Small networks and few steps: what is tested is the way from one end to the other
SHORT = ["-params", "learning_starts:150", "batch_size:16", "diffusion_steps:2", "policy_kwargs:dict(net_arch=[16])"]


@pytest.fixture(scope="session", autouse=True)
def headless():
    """Plots and videos without a screen."""
    old = {name: os.environ.get(name) for name in ("MPLBACKEND", "SDL_VIDEODRIVER")}
    os.environ.update(MPLBACKEND="Agg", SDL_VIDEODRIVER="dummy")
    yield
    for name, value in old.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


@pytest.fixture
def cli(capfd):
    """Run ``sb3-qsm`` in this process: exit status, standard output, standard error."""
    from sb3_qsm.zoo.cli import main

    def run(*arguments):
        capfd.readouterr()
        status = main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return status, out, err

    return run


@pytest.fixture(scope="session")
def logs(tmp_path_factory):
    """Log folder with two finished runs on Pendulum-v1."""
    from sb3_qsm.zoo.cli import main

    folder = tmp_path_factory.mktemp("zoo") / "logs"
    for seed in (1, 2):
        options = ["-n", 400, "-f", folder, "--seed", seed, "--eval-freq", 200, "--eval-episodes", 2, "--save-freq", 400]
        assert main(["train", "--env", "Pendulum-v1", *map(str, options), "--verbose", "0", *SHORT]) == 0
    return folder


def worker(*arguments, **kwargs):
    """Start ``sb3-qsm train -optimize`` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "sb3_qsm", "train", *map(str, arguments)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **kwargs,
    )


def _postgres_folder():
    candidates = [shutil.which("initdb"), *sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), reverse=True)]
    return next((Path(found).resolve().parent for found in candidates if found), None)


@pytest.fixture(scope="session")
def postgres():
    """URL of a real, empty PostgreSQL on the loopback interface, its data directory its own."""
    programs = _postgres_folder()
    if programs is None:
        pytest.skip("no PostgreSQL server here (Debian: apt-get install postgresql)")
    # PostgreSQL refuses to run as root; Debian's package brings a user for it
    user = {}
    if os.geteuid() == 0:
        account = pwd.getpwnam("postgres")
        user = {"user": account.pw_uid, "group": account.pw_gid}
    # Not below pytest's folder, which other users may not enter
    folder = Path(tempfile.mkdtemp(prefix="sb3-qsm-postgres-"))
    try:
        if user:
            os.chown(folder, user["user"], user["group"])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        initdb = [programs / "initdb", "-D", folder / "data", "-U", "qsm", "-A", "trust", "--no-sync"]
        subprocess.run(initdb, check=True, capture_output=True, cwd="/", **user)
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
        control = [programs / "pg_ctl", "-D", folder / "data", "-w"]
        start = [*control, "-l", folder / "log", "-o", options, "start"]
        subprocess.run(start, check=True, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **user)
        try:
            yield f"postgresql+psycopg://qsm@127.0.0.1:{port}/postgres"
        finally:
            subprocess.run([*control, "-m", "immediate", "stop"], check=True, cwd="/", stdout=subprocess.DEVNULL, **user)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
