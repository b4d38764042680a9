"""
Run the cells of a sweep (algorithm x environment x seed) with Ray, and report their results.

    python benchmarks/sweep.py run benchmarks/sweeps/main.yml --jobs 2
    python benchmarks/sweep.py list benchmarks/sweeps/main.yml
    python benchmarks/sweep.py report benchmarks/sweeps/main.yml

A sweep that was stopped or killed goes on with the same command. One cell again, from its beginning:

    python benchmarks/sweep.py run benchmarks/sweeps/main.yml --groups main --only algo=sac,env=Hopper-v5,seed=0 --rerun
"""

import argparse
import contextlib
import importlib.util
import os
import shlex
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from cells import ALGORITHMS, PRESETS, Cell, CellError, read_rows, register, train
from filelock import FileLock, Timeout

RESULTS = Path("benchmarks/results/learning/sweep")
Groups = dict[str, list[Cell]]

_COMMON = {field.name for field in fields(Cell)} & {"timesteps", "eval_freq", "eval_episodes", "checkpoint_freq"}
_GROUP = {*_COMMON, "compile"}
_AXES = {"algos", "envs", "seeds"}


def read_groups(path: Path) -> Groups:
    """
    Read the cells of a sweep.

    :param path: YAML file
    :return: Cells by group, in the order in which they are run
    :raises CellError: if something in the file is unknown, missing or out of its range
    """
    try:
        config = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise CellError(f"cannot read {path}: {error}") from error
    config = _mapping(f"{path}", config, {"groups", "settings", *_GROUP}, {"groups"})
    common = {name: config[name] for name in _GROUP & config.keys()}
    settings = {name: _setting(name, entry) for name, entry in _mapping("settings", config.get("settings", {})).items()}
    return {
        name: _group(name, common | _mapping(f"group {name}", group, _AXES | _GROUP, _AXES), settings)
        for name, group in _mapping("groups", config["groups"]).items()
    }


def _mapping(what: str, value: Any, known: set[str] | None = None, needed: set[str] = frozenset()) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CellError(f"{what} must be a mapping, got {value!r}")
    for name in value:
        if known is not None and name not in known:
            raise CellError(f"unknown key {name!r} in {what}; known ones: {', '.join(sorted(known))}")
    for name in sorted(needed - value.keys()):
        raise CellError(f"{what} lacks {name!r}")
    return value


def _setting(name: str, entry: Any) -> dict[str, Any]:
    entry = _mapping(f"setting {name}", entry, {"preset", "kwargs"})
    algo = name.split("-")[0]
    preset = entry.get("preset", algo)
    if name in PRESETS or name == algo or not str(preset).split("-")[0] == algo:
        raise CellError(
            f"the name of setting {name!r} must begin with its algorithm ({', '.join(ALGORITHMS)}) and '-', "
            "and not be one of a preset"
        )
    kwargs = _mapping(f"kwargs of setting {name}", entry.get("kwargs", {}))
    return {"preset": preset, "setting": name.removeprefix(f"{algo}-"), "kwargs": kwargs}


def _group(name: str, group: dict[str, Any], settings: dict[str, dict[str, Any]]) -> list[Cell]:
    for axis in _AXES:
        if not isinstance(group[axis], (list, dict) if axis == "envs" else list):
            raise CellError(f"{axis} of group {name} must be a list, got {group[axis]!r}")
    algos = {}
    for algo in group["algos"]:
        if algo in PRESETS:
            algos[algo] = {"preset": algo, "setting": algo.partition("-")[2] or "default"}
        elif algo in settings:
            algos[algo] = settings[algo]
        else:
            raise CellError(
                f"unknown algorithm {algo!r} in group {name}; known ones: {', '.join(sorted({*PRESETS, *settings}))}"
            )
    compiled = group.get("compile", False)
    if not isinstance(compiled, bool):
        raise CellError(f"compile of group {name} must be true or false, got {compiled!r}")
    if compiled:
        algos = {
            algo: {**cell, "kwargs": {"compile": True, **cell.get("kwargs", {})}} if algo.split("-")[0] == "qsm" else cell
            for algo, cell in algos.items()
        }
    envs = group["envs"]
    common = {key: value for key, value in group.items() if key in _COMMON}
    # Seed by seed, so that each task has its first results early
    return [
        Cell(env=env, seed=seed, goal=envs[env] if isinstance(envs, dict) else None, **algos[algo], **common)
        for seed in group["seeds"]
        for env in envs
        for algo in algos
    ]


def select(args: argparse.Namespace) -> Groups:
    """
    The cells that the command line asks for.

    :param args: Arguments
    :return: Cells by group
    :raises CellError: if a group or a value is not there
    """
    groups = read_groups(args.file)
    for name in args.groups or []:
        if name not in groups:
            raise CellError(f"unknown group {name!r}; known ones: {', '.join(groups)}")
    groups = {name: cells for name, cells in groups.items() if name in (args.groups or groups)}
    if not args.only:
        return groups
    wanted = [_parse_only(text) for text in args.only]
    chosen = {
        name: [cell for cell in cells if any(only.items() <= _labels(cell).items() for only in wanted)]
        for name, cells in groups.items()
    }
    for text, only in zip(args.only, wanted, strict=True):
        if not any(only.items() <= _labels(cell).items() for cells in groups.values() for cell in cells):
            known = {key: sorted({_labels(cell)[key] for cells in groups.values() for cell in cells}) for key in only}
            listed = "; ".join(f"{key} is one of {', '.join(values)}" for key, values in known.items())
            raise CellError(f"no cell is {text}: {listed}")
    return {name: cells for name, cells in chosen.items() if cells}


def _labels(cell: Cell) -> dict[str, str]:
    return {"algo": cell.name, "env": cell.env, "seed": str(cell.seed)}


def _parse_only(text: str) -> dict[str, str]:
    only = dict(part.partition("=")[::2] for part in text.split(","))
    if not only.keys() <= {"algo", "env", "seed"} or not all(only.values()):
        raise CellError(f"--only wants some of algo=NAME,env=NAME,seed=NUMBER, got {text!r}")
    return only


def command_of(cell: Cell, group: str, args: argparse.Namespace) -> str:
    """
    Command that runs one cell.

    :param cell: The cell
    :param group: Its group
    :param args: Arguments of the sweep
    :return: Command line
    """
    only = ",".join(f"{key}={value}" for key, value in _labels(cell).items())
    out = [] if args.out == RESULTS else ["--out", str(args.out)]
    return shlex.join(["python", sys.argv[0], "run", str(args.file), "--groups", group, "--only", only, *out])


def run(args: argparse.Namespace) -> int:
    """
    Run what is left of the cells, side by side.

    :param args: Arguments
    :return: Exit status
    """
    tasks: dict[Path, tuple[Cell, str]] = {}
    for group, cells in select(args).items():
        for cell in cells:
            register(cell.env)
            tasks.setdefault(cell.path(raw(args)).absolute(), (cell, command_of(cell, group, args)))
    if importlib.util.find_spec("ray") is None:
        raise SystemExit('The sweep needs Ray: pip install "sb3-qsm[benchmarks]"')
    if args.rerun:
        _clear(list(tasks))
    waiting = deque((path, *task) for path, task in tasks.items() if not task[0].finished(read_rows(path, task[0])))
    print(f"{len(tasks) - len(waiting)} of {len(tasks)} cells are finished", flush=True)
    if not waiting:
        return 0
    failed = _run_with_ray(waiting, args)
    for name, message in failed.items():
        print(f"failed: {name}: {message}", file=sys.stderr)
    return 1 if failed else 0


def _clear(paths: Sequence[Path]) -> None:
    """Delete what there is of the cells, unless another process is training one of them: then nothing is deleted."""
    with contextlib.ExitStack() as locks:
        for path in paths:
            folder = path.with_suffix(".checkpoint")
            folder.mkdir(parents=True, exist_ok=True)
            try:
                locks.enter_context(FileLock(folder / ".lock").acquire(timeout=0))
            except Timeout as error:
                raise CellError(f"another process is training {path}: it cannot be run again now") from error
        for path in paths:
            path.unlink(missing_ok=True)
            for file in path.with_suffix(".checkpoint").iterdir():
                if file.name != ".lock":
                    file.unlink()


def _run_with_ray(waiting: deque[tuple[Path, Cell, str]], args: argparse.Namespace) -> dict[str, str]:
    # Read when Ray is imported. Every line of every worker is shown, and nothing is sent to Ray's makers.
    os.environ |= {"RAY_DEDUP_LOGS": "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    os.environ |= {"RAY_worker_niceness": str(args.nice)}
    try:
        import ray
    except ImportError as error:
        raise SystemExit('The sweep needs Ray: pip install "sb3-qsm[benchmarks]"') from error

    jobs = args.jobs or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    own: dict[str, Any] = {}
    if not args.address:
        # Out of reach of the network, and of its changes. Nothing large goes through the object store; 80 MB is its least.
        own = {
            "num_cpus": jobs,
            "include_dashboard": False,
            "_node_ip_address": "127.0.0.1",
            "object_store_memory": 80 * 2**20,
            # Ray waits forever for a process that took longer than this to start, by default a minute: a busy machine does
            "_system_config": {"worker_register_timeout_seconds": 600},
        }
    ray.init(address=args.address or "local", logging_level="warning", **own)
    if args.address and not args.jobs:
        jobs = int(ray.cluster_resources()["CPU"])
    # A process for each cell: a killed one is started again, and memory comes back
    task = ray.remote(num_cpus=1, max_calls=1, max_retries=args.max_retries)(train)
    running: dict[Any, str] = {}
    failed: dict[str, str] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                path, cell, command = waiting.popleft()
                running[task.remote(cell, path, command)] = path.stem
            (done,), _ = ray.wait(list(running))
            name = running.pop(done)
            try:
                ray.get(done)
            except ray.exceptions.RayError as error:
                # The others do not depend on it
                print(f"{name} failed:\n{error}", file=sys.stderr, flush=True)
                failed[name] = str(error).strip().splitlines()[-1]
    finally:
        ray.shutdown()
    return failed


def show(args: argparse.Namespace) -> int:
    """
    List the cells and how far they are.

    :param args: Arguments
    :return: Exit status
    """
    for group, cells in select(args).items():
        for cell in cells:
            rows = read_rows(cell.path(raw(args)), cell)
            step = int(rows[-1]["timesteps"]) if rows else 0
            state = "finished" if cell.finished(rows) else f"{step:,} of {cell.timesteps:,} steps" if rows else "not begun"
            print(f"{group:12} {cell.name:12} {cell.env:32} seed {cell.seed:<4} {state}")
    return 0


def report(args: argparse.Namespace) -> int:
    """
    Draw the figures and write the tables.

    :param args: Arguments
    :return: Exit status
    """
    try:
        from report import write_report
    except ImportError as error:
        raise SystemExit('The report needs rliable and matplotlib: pip install "sb3-qsm[benchmarks]"') from error

    cells = [cell for cells in select(args).values() for cell in cells]
    write_report(cells, raw(args), args.out, args.include)
    return 0


def raw(args: argparse.Namespace) -> Path:
    """
    Folder of the CSVs.

    :param args: Arguments
    :return: The folder
    """
    return args.out / "raw"


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run a sub-command.

    :param argv: Arguments; those of the process if None
    :return: Exit status
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    cells = argparse.ArgumentParser(add_help=False)
    cells.add_argument("file", type=Path, help="YAML file of the sweep")
    cells.add_argument("--groups", nargs="+", metavar="GROUP", help="only these groups of the file")
    cells.add_argument("--only", action="append", metavar="algo=A,env=E,seed=S", help="only these cells; may be repeated")
    cells.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (%(default)s)")

    command = commands.add_parser("run", parents=[cells], help="run what is left of the cells")
    command.add_argument("--jobs", type=int, help="cells at the same time (by default as many as there are processors)")
    command.add_argument("--nice", type=int, default=0, help="niceness of the trainings (%(default)s)")
    command.add_argument("--address", help="address of a running Ray cluster; by default Ray is started here for the sweep")
    command.add_argument("--max-retries", type=int, default=5, help="times that a killed cell is started again (%(default)s)")
    command.add_argument("--rerun", action="store_true", help="delete what is there of the cells and start anew")
    command.set_defaults(function=run)

    command = commands.add_parser("list", parents=[cells], help="list the cells and how far they are")
    command.set_defaults(function=show)

    command = commands.add_parser("report", parents=[cells], help="draw the figures and write the tables")
    command.add_argument("--include", type=Path, nargs="*", default=[], help="Markdown files whose marked block is renewed")
    command.set_defaults(function=report)

    args = parser.parse_args(argv)
    if getattr(args, "jobs", None) is not None and args.jobs < 1:
        parser.error(f"--jobs must be above 0, not {args.jobs}")
    try:
        return args.function(args)
    except CellError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("Stopped. The same command goes on.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
