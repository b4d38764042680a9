"""
What rl_zoo3 2.9.2 needs to work with today's releases of its dependencies, and outside its own checkout.

Every shim has a test that fails once rl_zoo3 no longer needs it.
"""

import contextlib
import importlib
import inspect
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import huggingface_sb3  # type: ignore[import-untyped]
import requests
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from huggingface_sb3 import EnvironmentName
from rl_zoo3 import utils
from rl_zoo3.utils import ALGOS, get_trained_models
from stable_baselines3.common import monitor
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_qsm.common.safe import SUFFIX, load_safe
from sb3_qsm.zoo.registry import ZooAlgorithm

_load_from_hub = huggingface_sb3.load_from_hub
# The package's attribute of that name is a function
_push_to_hub: Any = importlib.import_module("huggingface_sb3.push_to_hub")


def mend_hub() -> None:
    """Let rl_zoo3 find the functions of ``huggingface_sb3`` (distribution ``sb3-team-hf-integration``) it was written for."""
    # rl_zoo3.push_to_hub imports generate_metadata, which was renamed in 3.2 and returns an object in place of a dictionary
    if not hasattr(_push_to_hub, "generate_metadata"):
        _push_to_hub.generate_metadata = _generate_metadata
    # rl_zoo3.load_from_hub asks for files that a repository may lack and expects the error that huggingface_hub raised when
    # it was built on requests
    huggingface_sb3.load_from_hub = load_from_hub
    loaded = sys.modules.get("rl_zoo3.load_from_hub")
    if loaded is not None:
        vars(loaded)["load_from_hub"] = load_from_hub


def _generate_metadata(*args: Any, **kwargs: Any) -> dict[str, Any]:
    metadata: dict[str, Any] = _push_to_hub._generate_metadata(*args, **kwargs).to_dict()
    return metadata


def load_from_hub(repo_id: str, filename: str) -> str:
    """
    ``huggingface_sb3.load_from_hub``, with the error of a missing file that rl_zoo3 expects.

    :param repo_id: Repository on the Hugging Face Hub
    :param filename: File in it
    :return: Path of the downloaded file
    :raises requests.exceptions.HTTPError: if the hub answers with an error
    """
    try:
        path: str = _load_from_hub(repo_id, filename)
    except LocalEntryNotFoundError:
        # No answer at all, which is no missing file
        raise
    except HfHubHTTPError as error:
        raise requests.exceptions.HTTPError(str(error)) from error
    return path


@contextlib.contextmanager
def own_subprocesses(gym_packages: list[str]) -> Iterator[None]:
    """
    Let the processes that rl_zoo3 starts know this package's algorithms.

    ``rl_zoo3.record_training`` starts ``python -m rl_zoo3.record_video``; ``rl_zoo3.benchmark`` starts ``python enjoy.py``,
    which exists in rl_zoo3's checkout only. Both become ``python -m sb3_qsm``, run by this interpreter.

    :param gym_packages: Packages with environments that they shall know, filled in when the arguments are read
    """
    real_call = subprocess.call

    def call(command: Any, *args: Any, **kwargs: Any) -> int:
        packages = ["--gym-packages", *gym_packages] if gym_packages else []
        match command:
            case ["python", "-m", str(module), *rest] if module.startswith("rl_zoo3."):
                command = [sys.executable, "-m", "sb3_qsm", module.removeprefix("rl_zoo3."), *rest, *packages]
            case ["python", "enjoy.py", *rest]:
                rest = [argument.gym_id if isinstance(argument, EnvironmentName) else argument for argument in rest]
                command = [sys.executable, "-m", "sb3_qsm", "enjoy", *rest, *packages]
        return real_call(command, *args, **kwargs)

    with mock.patch.object(subprocess, "call", call):
        yield


@contextlib.contextmanager
def names_of_folders() -> Iterator[None]:
    """Let ``rl_zoo3.benchmark`` find the runs of environments with a slash in their names, which their folders lack."""

    def named(log_folder: str) -> dict[str, tuple[str, str]]:
        return {name: (algo, EnvironmentName(env)) for name, (algo, env) in get_trained_models(log_folder).items()}

    with mock.patch.object(utils, "get_trained_models", named):
        yield


def load_results(path: str) -> Any:
    """
    Episodes of the monitor files, with the successes under SB3's name; the mazes of gymnasium-robotics call them ``success``.

    :param path: Folder
    :return: Data frame
    """
    frame = monitor.load_results(path)
    return frame if "is_success" in frame else frame.rename(columns={"success": "is_success"})


@contextlib.contextmanager
def success_of_goal_tasks() -> Iterator[None]:
    """Let ``plot_train -y success`` find it under both names."""
    plot_train = importlib.import_module("rl_zoo3.plots.plot_train")
    with mock.patch.object(plot_train, "load_results", load_results):
        yield


@contextlib.contextmanager
def ffmpeg_on_path() -> Iterator[None]:
    """
    Let rl_zoo3, which runs ``ffmpeg`` through a shell, find the program that ``imageio-ffmpeg`` (of moviepy) brings, if the
    system has none.
    """
    if shutil.which("ffmpeg") is not None:
        yield
        return
    try:
        imageio_ffmpeg = importlib.import_module("imageio_ffmpeg")
    except ImportError:
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "ffmpeg").symlink_to(imageio_ffmpeg.get_ffmpeg_exe())
        with mock.patch.dict(os.environ, {"PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"}):
            yield


@contextlib.contextmanager
def small_replay_buffers(algorithms: Mapping[str, ZooAlgorithm]) -> Iterator[None]:
    """
    Let agents that only play be loaded without memory for a million transitions.

    rl_zoo3's scripts do so for the off-policy algorithms in a list of their own.

    :param algorithms: Our algorithms by name
    """
    with contextlib.ExitStack() as stack:
        for name, entry in algorithms.items():
            player = type(entry.algorithm.__name__, (entry.algorithm,), {"load": classmethod(_load_player)})
            stack.enter_context(mock.patch.dict(ALGOS, {name: player}))
        yield


def _load_player(cls: type[OffPolicyAlgorithm], *args: Any, **kwargs: Any) -> OffPolicyAlgorithm:
    algorithm: Any = cls.__base__
    player: OffPolicyAlgorithm
    if Path(args[0]).suffix == f".{SUFFIX}":
        kwargs.pop("custom_objects", None)
        without_buffer = {"replay_buffer_class": None, "replay_buffer_kwargs": None, "optimize_memory_usage": False}
        taken = inspect.signature(algorithm).parameters
        without_buffer = {name: value for name, value in without_buffer.items() if name in taken}
        player = load_safe(algorithm, *args, **{"buffer_size": 1, **without_buffer, **kwargs})
        return player
    player = algorithm.load(*args, **{"buffer_size": 1, **kwargs})
    return player
