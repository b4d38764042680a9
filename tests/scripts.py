"""Scripts in processes of their own, forked from one that has imported PyTorch, which takes longer than what they do."""

import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from unittest import mock

# The compiler is imported by the first optimizer
PRELOADED = ["sb3_qsm", "torch._dynamo"]


def run_python(
    script: Path | str, arguments: Sequence[str], folder: Path, timeout: float = 600.0
) -> subprocess.CompletedProcess:
    """
    Run Python like ``python script *arguments`` and ``python -c script *arguments``, on one thread.

    :param script: File, or the code itself
    :param arguments: What follows it on the command line
    :param folder: Folder to run it in, which is given two files more: ``stdout`` and ``stderr``
    :param timeout: Seconds until it is killed
    :return: Exit status, standard output and standard error
    :raises TimeoutError: if it was killed
    """
    start_methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in start_methods else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload(PRELOADED)
    output = [folder / "stdout", folder / "stderr"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    with mock.patch.dict(os.environ, environment, clear=True):
        process = context.Process(target=_run, args=(script, list(arguments), folder, output, environment))
        process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        process.join()
        raise TimeoutError(f"still running after {timeout:.0f} s: {script}")
    texts = [path.read_text("utf-8") for path in output]
    return subprocess.CompletedProcess([str(script), *arguments], process.exitcode, *texts)


def _run(script: Path | str, arguments: list[str], folder: Path, output: list[Path], environment: dict[str, str]) -> None:
    for number, path in enumerate(output, start=1):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if isinstance(script, Path):
        sys.argv = [str(script), *arguments]
        sys.path.insert(0, str(script.parent))
        runpy.run_path(str(script), run_name="__main__")
    else:
        sys.argv = ["-c", *arguments]
        sys.path.insert(0, "")
        main = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(script, "<string>", "exec"), main.__dict__)
