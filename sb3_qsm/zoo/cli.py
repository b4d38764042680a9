"""The ``sb3-qsm`` command: rl_zoo3's subcommands with this package's algorithms."""

import argparse
import contextlib
import difflib
import importlib
import importlib.util
import math
import os
import pickle
import re
import runpy
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import gymnasium as gym
import numpy as np
import optuna
import yaml
from rl_zoo3.utils import get_latest_run_id, get_trained_models
from stable_baselines3.common.monitor import LoadMonitorResultsError
from stable_baselines3.common.utils import get_device
from stable_baselines3.common.vec_env import VecEnv

from sb3_qsm import __version__
from sb3_qsm.common.checkpoint import CheckpointError, read_info
from sb3_qsm.common.safe import SUFFIX, has_vec_normalize, load_vec_normalize
from sb3_qsm.zoo import shims
from sb3_qsm.zoo.errors import SETUP_MISTAKES, TRACEBACK_HINT, TRACEBACK_VARIABLE, UserError
from sb3_qsm.zoo.hyperparams import hyperparams_file
from sb3_qsm.zoo.registry import ALGORITHMS, register
from sb3_qsm.zoo.storage import open_storage

DEFAULT_ALGORITHM = "qsm"
DEFAULT_CHECKPOINT_FREQ = 25_000
DEFAULT_HEARTBEAT = 60

COMMANDS = {
    "train": "train an agent, tune hyperparameters with Optuna (-optimize), or go on with a killed run (--resume)",
    "enjoy": "let a trained agent act, on the screen or with --no-render",
    "record_video": "film a trained agent",
    "record_training": "film every checkpoint of a training and join the videos",
    "plot_train": "plot the returns of the training episodes",
    "all_plots": "plot the evaluations of several runs, print a table, write them to a file",
    "plot_from_file": "plot what all_plots wrote",
    "plot_policy": "draw what a trained agent does: its actions, the reverse process, the score field, its trajectories",
    "benchmark": "evaluate all trained agents in a folder and write a table",
    "push_to_hub": "upload a trained agent to the Hugging Face Hub",
    "load_from_hub": "download a trained agent from the Hugging Face Hub",
}
# rl_zoo3's other subcommands are scripts
_FUNCTIONS = {
    "train": ("rl_zoo3.train", "train"),
    "enjoy": ("rl_zoo3.enjoy", "enjoy"),
    "plot_train": ("rl_zoo3.plots.plot_train", "plot_train"),
    "all_plots": ("rl_zoo3.plots.all_plots", "all_plots"),
    "plot_from_file": ("rl_zoo3.plots.plot_from_file", "plot_from_file"),
    "plot_policy": ("sb3_qsm.zoo.plot_policy", "plot_policy"),
}
_PLOTS = ("plot_train", "all_plots", "plot_from_file")
# Those of rl_zoo3 that cannot make environments of other packages
_WITHOUT_PACKAGES = ("record_video", "record_training", "benchmark")
_PLAYS = ("enjoy", "record_video", "push_to_hub")
# Packages that tell gymnasium of their environments only when they are imported, and how the names of those begin
_ENV_PACKAGES = {
    "shimmy": ("dm_control/",),
    "sb3_qsm.envs": ("sb3_qsm/",),
    "gymnasium_robotics": ("Adroit", "AntMaze", "Fetch", "FrankaKitchen", "HandManipulate", "HandReach", "PointMaze"),
}
# Files that record_training makes
_VIDEOS = r"(best-model|checkpoint-\d+|final-model|training)[-.]"
# Options that a resumed run may change: they do not touch what is computed
_RESUME_OPTIONS = ("resume", "checkpoint_freq", "keep_checkpoint", "device", "num_threads", "verbose", "progress")


# Besides the first, what rl_zoo3, SB3 and gymnasium raise for what a user gave, which rl_zoo3 evaluates as Python
_USERS_MISTAKES = (
    UserError,
    ValueError,
    AssertionError,
    OSError,
    ImportError,
    gym.error.Error,
    ArithmeticError,
    NameError,
    SyntaxError,
    yaml.YAMLError,
)


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run a subcommand.

    :param argv: Arguments; those of the process if None
    :return: Exit status
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help(), file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"sb3-qsm {__version__}")
        return 0
    command = arguments.pop(0)
    try:
        if command not in COMMANDS:
            near = difflib.get_close_matches(command, COMMANDS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"unknown subcommand {command!r}{hint} (known ones: {', '.join(COMMANDS)})")
        _run(command, arguments)
    except _USERS_MISTAKES as error:
        # An assertion without a message is a mistake of a programmer
        if os.environ.get(TRACEBACK_VARIABLE) or (isinstance(error, AssertionError) and not str(error)):
            raise
        name = "" if isinstance(error, (UserError, ValueError, AssertionError)) else f"{type(error).__name__}: "
        prefix = f"sb3-qsm {command}" if command in COMMANDS else "sb3-qsm"
        print(f"{prefix}: error: {name}{_one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except SETUP_MISTAKES as error:
        # A training that breaks off in its middle is to say where; what plays and plots has only just begun
        if command == "train" or os.environ.get(TRACEBACK_VARIABLE):
            raise
        print(f"sb3-qsm {command}: error: {type(error).__name__}: {_one_line(error)}{TRACEBACK_HINT}", file=sys.stderr)
        return 1
    return 0


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
    return f"""usage: sb3-qsm SUBCOMMAND [OPTION ...]

The command line of rl_zoo3 with the algorithms of sb3_qsm ({", ".join(ALGORITHMS)}).

subcommands:
{lines}

  sb3-qsm SUBCOMMAND --help lists the options. Without --algo the algorithm is {DEFAULT_ALGORITHM}; the algorithms of
  rl_zoo3 work as they do there. {TRACEBACK_VARIABLE}=1 in the environment shows the traceback of an error."""


def _one_line(error: BaseException) -> str:
    return re.sub(r"\s*\n\s*", " ", str(error).strip()) or type(error).__name__


def _run(command: str, arguments: list[str]) -> None:
    shims.mend_hub()
    register()
    options = _Options(command)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(sys, "argv", [f"sb3-qsm {command}", *arguments]))
        stack.enter_context(_hooked_parser(options))
        stack.enter_context(shims.own_subprocesses(options.gym_packages))
        stack.enter_context(shims.ffmpeg_on_path())
        if command in _PLAYS:
            stack.enter_context(shims.small_replay_buffers(ALGORITHMS))
        if command == "enjoy":
            stack.enter_context(options.safe_model())
        if command in _PLOTS:
            stack.enter_context(options.figures_to_files())
        if command == "plot_train":
            stack.enter_context(shims.success_of_goal_tasks())
        if command == "benchmark":
            stack.enter_context(shims.names_of_folders())
        if command == "train":
            from sb3_qsm.zoo.manager import ZooExperimentManager

            train = importlib.import_module("rl_zoo3.train")
            stack.enter_context(mock.patch.object(train, "ExperimentManager", ZooExperimentManager))
        if command in _FUNCTIONS:
            module, function = _FUNCTIONS[command]
            getattr(importlib.import_module(module), function)()
        else:
            # A fresh module, since the scripts run when imported or under __main__ only
            sys.modules.pop(f"rl_zoo3.{command}", None)
            runpy.run_module(f"rl_zoo3.{command}", run_name="__main__")


@contextlib.contextmanager
def _hooked_parser(options: "_Options") -> Iterator[None]:
    """
    Give the next argument parser, which is the subcommand's, our defaults and checks.

    The parser is rl_zoo3's own, so that all its options, their abbreviations and its --help stay as they are.
    """
    real_parse_args = argparse.ArgumentParser.parse_args

    def parse_args(parser: argparse.ArgumentParser, *args: Any) -> argparse.Namespace:
        # Other parsers, if any, are not ours
        hook.stop()
        parser.prog = f"sb3-qsm {options.command}"
        parser.error = _raise_user_error  # type: ignore[method-assign]
        options.prepare(parser)
        try:
            parsed = real_parse_args(parser, *args)
        except (ArithmeticError, AttributeError, LookupError, NameError, SyntaxError, TypeError) as error:
            # rl_zoo3 evaluates NAME:VALUE
            raise UserError(f"values in NAME:VALUE must be Python expressions: {error}") from error
        return options.check(parser, parsed)

    hook = mock.patch.object(argparse.ArgumentParser, "parse_args", parse_args)
    hook.start()
    try:
        yield
    finally:
        hook.stop()


def _raise_user_error(message: str) -> NoReturn:
    raise UserError(message)


class _Options:
    """
    Options of one subcommand: what is added to rl_zoo3's, which defaults change, and what is refused.

    :param command: Name of the subcommand
    """

    def __init__(self, command: str) -> None:
        self.command = command
        self.figures: str | None = None
        self.safe: str | None = None
        self.norm_reward = False
        self.gym_packages: list[str] = []

    def prepare(self, parser: argparse.ArgumentParser) -> None:
        """
        Change defaults and add options.

        :param parser: rl_zoo3's parser
        """
        for action in parser._actions:
            if action.dest == "algo":
                action.default, action.required = DEFAULT_ALGORITHM, False
                action.help = f"RL algorithm (default: {DEFAULT_ALGORITHM})"
            elif action.dest == "algos":
                action.default = [DEFAULT_ALGORITHM]
            elif (self.command, action.dest) in (
                ("all_plots", "env"),
                ("all_plots", "exp_folders"),
                ("plot_from_file", "input"),
            ):
                # rl_zoo3 fails later without them
                action.required = True
        if self.command == "train":
            group = parser.add_argument_group("sb3-qsm")
            group.add_argument(
                "--resume", metavar="LOGDIR", help="go on with the run in this folder, as if it had not been killed"
            )
            group.add_argument(
                "--checkpoint-freq",
                type=int,
                metavar="N",
                help="write a checkpoint to resume from every N steps; negative: none "
                f"(default: {DEFAULT_CHECKPOINT_FREQ} with {', '.join(ALGORITHMS)}, none with other algorithms)",
            )
            group.add_argument(
                "--keep-checkpoint",
                action="store_true",
                help="keep the checkpoint, with the replay buffer, when the run is finished",
            )
            group.add_argument(
                "--heartbeat",
                type=int,
                default=DEFAULT_HEARTBEAT,
                metavar="SECONDS",
                help="how often a worker on a study in a database gives a sign of life; its trial counts as failed after two "
                f"missed ones; 0: never (default: {DEFAULT_HEARTBEAT})",
            )
            group.add_argument(
                "--fixed",
                nargs="+",
                metavar="NAME:VALUE",
                help="with -optimize: parameters of the search that keep this value in all trials, such as diffusion_steps:10",
            )
        if self.command == "enjoy":
            group = parser.add_argument_group("sb3-qsm")
            group.add_argument(
                "--safe",
                metavar="FILE",
                help="play the model in this .safetensors file, which save_safe wrote; no other file is read",
            )
        if self.command in _WITHOUT_PACKAGES:
            group = parser.add_argument_group("sb3-qsm")
            group.add_argument(
                "--gym-packages", nargs="+", default=[], metavar="PACKAGE", help="packages that bring environments"
            )
        if self.command in _PLOTS:
            group = parser.add_argument_group("sb3-qsm")
            group.add_argument("--save-figures", metavar="FOLDER", help="write the figures as PNG instead of showing them")

    def check(self, parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
        """
        Check what can be checked before anything is written.

        :param parser: The parser
        :param args: What it read
        :return: What rl_zoo3 shall read
        :raises UserError: naming the argument, its value and what is allowed
        """
        resumed = getattr(args, "resume", None) is not None
        self.gym_packages[:] = getattr(args, "gym_packages", [])
        # First, since what follows may make folders; a run that goes on has its environment's name in its own files
        if hasattr(args, "env") and isinstance(args.env, str) and not resumed:
            _check_env(args)
        if self.command == "train":
            args = self._check_train(parser, args)
        if resumed:
            _check_env(args)
        if getattr(args, "folder", None) == "rl-trained-agents" and args.algo in ALGORITHMS:
            # rl_zoo3's default is its collection of agents, of other algorithms
            args.folder = "logs"
        if self.command == "benchmark":
            if not Path(args.log_dir).is_dir():
                raise UserError(f"argument --log-dir: {args.log_dir!r} is no folder")
            if args.no_hub and not get_trained_models(args.log_dir):
                raise UserError(f"argument --log-dir: {args.log_dir!r} has no trained agent (ALGO/ENV_1)")
        if self.command == "record_training":
            _check_filmed(args)
        if self.command == "plot_train":
            args.algo = args.algo.lower()
            _check_plotted(args, "--exp-folder", [args.exp_folder], [args.algo])
            _check_episodes(args)
        if self.command == "all_plots":
            _check_plotted(args, "--exp-folders", args.exp_folders, args.algos)
            _check_evaluations(args)
        if self.command == "plot_from_file":
            _check_runs(args.input)
        self.safe = getattr(args, "safe", None)
        if self.safe is not None:
            _check_safe(parser, args)
            self.norm_reward = args.norm_reward
        self.figures = getattr(args, "save_figures", None)
        if self.figures is not None:
            _check_writable("--save-figures", self.figures)
            # The figures are not shown anyway, and only what is shown is saved
            args.no_display = False
        return args

    def _check_train(self, parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
        if args.resume is not None:
            args = _resumed(parser, args)
        if args.checkpoint_freq is None:
            args.checkpoint_freq = DEFAULT_CHECKPOINT_FREQ if args.algo in ALGORITHMS else -1
        if args.heartbeat < 0:
            raise UserError(f"argument --heartbeat: must be a number of seconds >= 0, got {args.heartbeat}")
        try:
            get_device(args.device)
        except RuntimeError as error:
            raise UserError(f"argument --device: {_one_line(error)}") from error
        if args.resume is not None:
            return args
        for name, option, lowest in (
            ("n_timesteps", "-n", 1),
            ("eval_episodes", "--eval-episodes", 1),
            ("n_eval_envs", "--n-eval-envs", 1),
            ("n_evaluations", "--n-evaluations", 1),
        ):
            value = getattr(args, name)
            if value is not None and value < lowest and value != parser.get_default(name):
                raise UserError(f"argument {option}: must be an integer >= {lowest}, got {value}")
        if args.trained_agent:
            _check_file("--trained-agent", args.trained_agent, ".zip")
        if args.trained_agent and args.optimize_hyperparameters:
            raise UserError("argument --trained-agent: a study trains agents of its own, so it cannot go on with one")
        if args.fixed is not None and not args.optimize_hyperparameters:
            raise UserError("argument --fixed: needs -optimize; a single training takes its hyperparameters from -params")
        if args.trial_id is not None and not args.optimize_hyperparameters and not (args.storage and args.study_name):
            raise UserError("argument --trial-id: needs --storage and --study-name, which say where the trial is")
        _choose_conf_file(args)
        _check_conf_file(args.conf_file)
        _check_writable("--log-folder", args.log_folder)
        if args.storage is not None:
            database = args.storage.removeprefix("sqlite:///")
            of_file = args.storage.endswith(".log") or database != args.storage
            if of_file and not args.optimize_hyperparameters and not os.path.isfile(database.partition("?")[0]):
                # Optuna would make it
                raise UserError(f"argument --storage: {args.storage!r} is not there")
            storage = open_storage(args.storage)
            if args.study_name is not None and (args.trial_id is not None or not args.optimize_hyperparameters):
                _check_trial(args, storage)
        return args

    @contextlib.contextmanager
    def safe_model(self) -> Iterator[None]:
        """Let ``enjoy`` play a safe file if the user asked for it, without the run's folder, whose files are not safe."""
        enjoy = importlib.import_module("rl_zoo3.enjoy")
        get_model_path, create_test_env = enjoy.get_model_path, enjoy.create_test_env

        def find(*args: Any) -> tuple[str, str, str]:
            return get_model_path(*args) if self.safe is None else ("", self.safe, folder)

        def create(*args: Any, **kwargs: Any) -> VecEnv:
            env: VecEnv = create_test_env(*args, **kwargs)
            if self.safe is not None and has_vec_normalize(self.safe):
                env = load_vec_normalize(self.safe, env)
                env.training, env.norm_reward = False, self.norm_reward
            return env

        with (
            tempfile.TemporaryDirectory() as folder,
            mock.patch.object(enjoy, "get_model_path", find),
            mock.patch.object(enjoy, "create_test_env", create),
        ):
            yield

    @contextlib.contextmanager
    def figures_to_files(self) -> Iterator[None]:
        """Let ``pyplot.show()`` write files if the user asked for them."""
        pyplot = importlib.import_module("matplotlib.pyplot")
        show: Callable[..., None] = pyplot.show

        def save(*args: Any, **kwargs: Any) -> None:
            if self.figures is None:
                show(*args, **kwargs)
                return
            for number in pyplot.get_fignums():
                figure = pyplot.figure(number)
                name = re.sub(r"[^\w.-]+", "_", figure.get_label()) or f"figure_{number}"
                file = Path(self.figures) / f"{name}.png"
                figure.savefig(file, dpi=150)
                print(f"Saved {file}")
            pyplot.close("all")

        with mock.patch.object(pyplot, "show", save):
            yield


def _check_file(argument: str, name: str, suffix: str) -> None:
    """
    Refuse what is not there, is no file or is of another kind.

    :param argument: Name of the argument, for the message
    :param name: File
    :param suffix: What its name must end in
    """
    if not os.path.exists(name):
        raise UserError(f"argument {argument}: {name!r} is not there")
    if not (name.endswith(suffix) and os.path.isfile(name)):
        raise UserError(f"argument {argument}: {name!r} is not a file that ends in {suffix}")


def _check_safe(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """
    Refuse a safe file that is none, or beside options that choose another one.

    :param parser: The parser
    :param args: Arguments
    """
    if args.algo not in ALGORITHMS:
        raise UserError(f"argument --safe: {args.algo} has no safe files, only {', '.join(ALGORITHMS)}")
    for name in ("folder", "exp_id", "load_best", "load_checkpoint", "load_last_checkpoint"):
        default = "logs" if name == "folder" else parser.get_default(name)
        if getattr(args, name) != default:
            raise UserError(f"argument --safe: names the file to play, so --{name.replace('_', '-')} cannot be given")
    _check_file("--safe", args.safe, f".{SUFFIX}")


def _resumed(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """The arguments that the run was started with."""
    given = sorted(_given(parser))
    refused = [name for name in given if name not in _RESUME_OPTIONS]
    if refused:
        raise UserError(
            f"argument --resume: the run goes on with its own settings, so --{refused[0].replace('_', '-')} cannot be given; "
            f"allowed are {', '.join('--' + name.replace('_', '-') for name in _RESUME_OPTIONS[1:])}"
        )
    folder = Path(args.resume)
    if not folder.is_dir():
        raise UserError(f"argument --resume: {args.resume!r} is no folder")
    files = sorted(folder.glob("*/args.yml"))
    if len(files) != 1 or not (files[0].parent / "config.yml").is_file():
        raise UserError(f"argument --resume: {args.resume!r} is not the folder of one run of sb3-qsm train (LOGS/ALGO/ENV_1)")
    with open(files[0]) as file:
        # As rl_zoo3 reads it; the file is as trustworthy as the pickled checkpoint beside it
        saved = dict(yaml.load(file, Loader=yaml.UnsafeLoader))
    try:
        info = read_info(folder)
    except CheckpointError as error:
        final = folder / f"{files[0].parent.name}.zip"
        hint = f"; the run is finished, train on with --trained-agent {final}" if final.is_file() else ""
        raise UserError(f"argument --resume: {error}{hint}") from error
    algorithm = ALGORITHMS[saved["algo"]].algorithm.__name__ if saved.get("algo") in ALGORITHMS else None
    if algorithm is not None and info["algorithm"] != algorithm:
        raise UserError(
            f"argument --resume: {args.resume!r} is a run of {algorithm}, its checkpoint one of {info['algorithm']}"
        )
    merged = {**vars(args), **saved, **{name: getattr(args, name) for name in given}, "resume": args.resume}
    # What the run began with is in its checkpoint
    merged["trained_agent"] = ""
    return argparse.Namespace(**merged)


def _given(parser: argparse.ArgumentParser) -> set[str]:
    """Names of what is on the command line, also where it is the default's value."""
    defaults = {action: action.default for action in parser._actions}
    try:
        for action in defaults:
            action.default = argparse.SUPPRESS
        return set(vars(parser.parse_args()))
    finally:
        for action, default in defaults.items():
            action.default = default


def _check_env(args: argparse.Namespace) -> None:
    """
    Refuse an unknown environment before rl_zoo3 looks for its files.

    :param args: Arguments
    """
    for package in getattr(args, "gym_packages", []):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UserError(f"argument --gym-packages: cannot import {package!r}: {error}") from error
    env_id = str(getattr(args.env, "gym_id", args.env))
    if env_id in gym.registry:
        return
    for package, prefixes in _ENV_PACKAGES.items():
        if env_id.startswith(prefixes) and importlib.util.find_spec(package) is not None:
            gym.register_envs(importlib.import_module(package))
    if env_id not in gym.registry:
        near = difflib.get_close_matches(env_id, list(gym.registry), n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(
            f"argument --env: unknown environment {env_id!r}{hint} (--gym-packages names packages that bring environments)"
        )


def _choose_conf_file(args: argparse.Namespace) -> None:
    """
    Our file for our algorithms, and shipped files by their name.

    :param args: Arguments
    """
    if args.conf_file is None:
        if args.algo in ALGORITHMS:
            args.conf_file = str(hyperparams_file(args.algo))
        return
    # A folder of that name is a package at most
    if not os.path.isfile(args.conf_file):
        try:
            args.conf_file = str(hyperparams_file(args.conf_file))
        except FileNotFoundError as error:
            # rl_zoo3 imports what has no suffix
            if args.conf_file.isidentifier() and importlib.util.find_spec(args.conf_file) is None:
                shipped = sorted(path.stem for path in hyperparams_file("qsm").parent.glob("*.yml"))
                raise UserError(
                    f"argument --conf-file: {args.conf_file!r} is no file, no Python module and none of the shipped files, "
                    f"which are {', '.join(shipped)}"
                ) from error


def _check_conf_file(name: str | None) -> None:
    """
    Refuse a file that is not YAML of the right shape. Python files and packages are left to rl_zoo3.

    :param name: Path
    """
    if name is None or not name.endswith((".yml", ".yaml")):
        return
    try:
        with open(name) as file:
            content = yaml.safe_load(file)
    except OSError as error:
        raise UserError(f"argument --conf-file: cannot read {name!r}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise UserError(f"argument --conf-file: {name!r} is no YAML{where}: {getattr(error, 'problem', error)}") from error
    if not isinstance(content, dict) or not all(isinstance(value, dict) for value in content.values()):
        raise UserError(f"argument --conf-file: {name!r} must map environments (or 'default') to hyperparameters")


def _check_writable(argument: str, folder: str) -> None:
    """
    Refuse a folder that nothing can be written to.

    :param argument: Name of the argument, for the message
    :param folder: Folder, created if needed
    """
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"argument {argument}: cannot write to {folder!r}: {error.strerror}") from error


def _check_plotted(args: argparse.Namespace, argument: str, folders: list[str], algorithms: list[str]) -> None:
    """
    Refuse folders and environments without a run, of which rl_zoo3 makes empty figures.

    :param args: Arguments; the environments take the form that they have in the names of folders
    :param argument: Name of the argument with the folders, for the message
    :param folders: Folders of runs
    :param algorithms: Algorithms
    """
    for folder in folders:
        if not os.path.isdir(folder):
            raise UserError(f"argument {argument}: {folder!r} is no folder")
    found = [run for folder in folders for name in algorithms for run in Path(folder, name.lower()).glob("*")]
    runs = {run.name for run in found if run.is_dir()}
    # As rl_zoo3 names the folders
    args.env = [env.replace("/", "-") for env in args.env]
    for env in args.env:
        if not any(env in run for run in runs):
            there = sorted({re.sub(r"_\d+$", "", run) for run in runs})
            raise UserError(
                f"argument --env: no run of {env!r} by {', '.join(algorithms)} in {', '.join(folders)}; there: "
                f"{', '.join(there) or 'none'}"
            )


def _folders(args: argparse.Namespace, folders: list[str], algorithms: list[str]) -> Iterator[tuple[str, str, list[Path]]]:
    """The environments, what was run in them, and the runs as rl_zoo3 finds them."""
    for env in args.env:
        for folder in folders:
            for name in algorithms:
                runs = [run for run in sorted(Path(folder, name.lower()).glob("*")) if env in run.name and run.is_dir()]
                yield env, f"{name} in {folder}", runs


def _check_episodes(args: argparse.Namespace) -> None:
    """
    Refuse runs of which rl_zoo3 would draw no curve: with fewer episodes than the window has, or without successes.

    :param args: Arguments of plot_train
    """
    column = {"success": "is_success", "reward": "r", "length": "l"}[args.y_axis]
    for env, where, runs in _folders(args, [args.exp_folder], [args.algo]):
        longest, columns = 0, set()
        for run in runs:
            with contextlib.suppress(LoadMonitorResultsError):
                frame = shims.load_results(str(run))
                longest = max(longest, len(frame))
                columns |= set(frame.columns)
        if longest < args.episode_window:
            raise UserError(
                f"argument --episode-window: {args.episode_window} episodes are averaged, and no run of {env!r} by {where} "
                f"has more than {longest}"
            )
        if column not in columns:
            raise UserError(
                f"argument --y-axis: no run of {env!r} by {where} has successes in its monitor file (monitor_kwargs in its "
                "hyperparameters names them)"
            )


def _check_evaluations(args: argparse.Namespace) -> None:
    """
    Refuse runs of which rl_zoo3 would write 0.0 into the table, since it takes two evaluations or more.

    :param args: Arguments of all_plots
    """
    if args.labels is not None and len(args.labels) != len(args.exp_folders):
        raise UserError(f"argument --labels: {len(args.exp_folders)} folders need as many labels, got {len(args.labels)}")
    for env, where, runs in _folders(args, args.exp_folders, args.algos):
        longest, earliest, keys = 0, math.inf, set()
        for run in runs:
            file = run / "evaluations.npz"
            if file.is_file():
                with np.load(file) as log:
                    steps, found = log["timesteps"], set(log.files)
                longest = max(longest, len(steps))
                earliest = min(earliest, steps[0])
                keys |= found
        if runs and longest < 2:
            raise UserError(
                f"argument --env: no run of {env!r} by {where} has two evaluations, which all_plots needs (the option "
                "--eval-freq of the training)"
            )
        if runs and args.key not in keys:
            raise UserError(f"argument --key: must be one of {', '.join(sorted(keys))}, got {args.key!r} ({where})")
        if args.max_timesteps < earliest < math.inf:
            raise UserError(
                f"argument --max-timesteps: must be at least {earliest}, the first evaluation of {env!r}, got "
                f"{args.max_timesteps}"
            )
        if not runs:
            print(f"No run of {env} by {where}: the table has 0.0 there", file=sys.stderr)


def _check_filmed(args: argparse.Namespace) -> None:
    """
    Refuse a training without a model, and to empty a folder that has other things than the videos of a training.

    :param args: Arguments of record_training
    """
    run = Path(args.folder, args.algo)
    if args.exp_id >= 0:
        number = args.exp_id or get_latest_run_id(str(run), args.env)
        run = run / f"{args.env}_{number}"
    models = [f"{args.env}.zip", "best_model.zip"]
    if not any(path.name in models or path.name.startswith("rl_model_") for path in run.glob("*.zip")):
        raise UserError(f"argument --env: {str(run)!r} has no model to film")
    if args.output_folder is not None and os.path.isdir(args.output_folder):
        others = [name for name in sorted(os.listdir(args.output_folder)) if not re.match(_VIDEOS, name)]
        if others:
            raise UserError(
                f"argument --output-folder: {args.output_folder!r} would be emptied, and holds other things than such videos: "
                f"{', '.join(others)}"
            )


def _check_runs(name: str) -> None:
    """
    Refuse a file of all_plots with single runs only, of which rl_zoo3's plot_from_file can make nothing.

    :param name: File, with or without ``.pkl``
    """
    file = name if name.endswith(".pkl") else f"{name}.pkl"
    try:
        with open(file, "rb") as handle:
            results = pickle.load(handle)
        counts = [
            np.ndim(run["last_evals"]) for env, runs in results.items() if env != "results_table" for run in runs.values()
        ]
    except OSError as error:
        raise UserError(f"argument --input: cannot read {file!r}: {error.strerror}") from error
    except (pickle.UnpicklingError, EOFError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"argument --input: {file!r} was not written by all_plots") from error
    if not any(counts):
        raise UserError(
            f"argument --input: {file!r} has no two runs of one algorithm with as many evaluations of two or more episodes"
        )


def _check_trial(args: argparse.Namespace, storage: Any) -> None:
    """
    Refuse a study or a trial that is not there.

    :param args: Arguments
    :param storage: The storage
    """
    names = optuna.get_all_study_names(storage)
    if args.study_name not in names:
        there = ", ".join(sorted(names)) or "none"
        raise UserError(f"argument --study-name: no study {args.study_name!r} in the storage; there: {there}")
    if args.trial_id is None:
        raise UserError("argument --trial-id: which trial of the study shall be trained? (or -optimize to work on the study)")
    trials = optuna.load_study(study_name=args.study_name, storage=storage).trials
    if not 0 <= args.trial_id < len(trials):
        there = f"trials 0 to {len(trials) - 1}" if trials else "no trials"
        raise UserError(f"argument --trial-id: study {args.study_name!r} has {there}, got {args.trial_id}")
    trial = trials[args.trial_id]
    if not trial.params:
        raise UserError(f"argument --trial-id: trial {args.trial_id} ({trial.state.name.lower()}) has no hyperparameters")
