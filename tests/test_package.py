"""What is shipped: version, imports, wheel, dependencies, and the snippets of the documentation."""

import configparser
import contextlib
import functools
import importlib
import io
import os
import re
import shlex
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import sb3_qsm

ROOT = Path(__file__).parents[1]
MARKDOWN = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# A snippet that needs something the text made before says so in a comment above it, and a script its arguments
SNIPPET = re.compile(r"(?:(?<!-->\n)|^<!-- arguments: (.*) -->\n)^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
SNIPPETS = [
    pytest.param(code, arguments.split(), id=f"{path.stem}-{number}")
    for path in MARKDOWN
    for number, (arguments, code) in enumerate(SNIPPET.findall(path.read_text("utf-8")))
]
# Shell blocks, without what a backslash breaks into lines
SHELL = re.compile(r"^```(?:bash|sh)\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMANDS = [
    pytest.param(line.split(maxsplit=1)[1], id=f"{path.stem}-{number}")
    for path in MARKDOWN
    for number, line in enumerate(
        line.strip()
        for block in SHELL.findall(path.read_text("utf-8"))
        for line in block.replace("\\\n", " ").splitlines()
        if line.strip().startswith("sb3-qsm ")
    )
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, made from the source distribution, as pip makes it for those who have only that."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    subprocess.run([*build, "-t", "sdist"], cwd=ROOT, check=True, capture_output=True)
    (source,) = folder.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        archive.extractall(folder / "source", filter="data")
    (unpacked,) = (folder / "source").iterdir()
    subprocess.run([*build, "-t", "wheel"], cwd=unpacked, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


def test_version_is_the_same_everywhere():
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc|\.dev)\d+)?", sb3_qsm.__version__)
    newest = re.search(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert newest is not None
    assert newest[1] == sb3_qsm.__version__
    citation = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text("utf-8"), re.MULTILINE)
    assert citation is not None
    assert citation[1] == sb3_qsm.__version__


def test_import_is_light():
    code = "import sys, sb3_qsm.envs; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    heavy = {
        "gymnasium_robotics",
        "huggingface_hub",
        "imageio",
        "matplotlib",
        "mujoco",
        "onnxruntime",
        "onnxscript",
        "optuna",
        "pandas",
        "ray",
        "rl_zoo3",
        "safetensors",
        "sb3_contrib",
        "scipy",
    }
    assert not heavy & set(modules)


def test_wheel_holds_the_package_and_nothing_else(wheel: Path):
    assert wheel.name == f"sb3_qsm-{sb3_qsm.__version__}-py3-none-any.whl"
    info = f"sb3_qsm-{sb3_qsm.__version__}.dist-info"
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "sb3_qsm").rglob("*.py")} | {"sb3_qsm/py.typed"}
    expected |= {f"sb3_qsm/hyperparams/{path.name}" for path in (ROOT / "hyperparams").glob("*.yml")}
    assert {name for name in names if not name.startswith(info)} == expected
    assert f"{info}/licenses/LICENSE" in names


def test_wheel_ships_the_hyperparameters_unchanged(wheel: Path):
    files = sorted((ROOT / "hyperparams").glob("*.yml"))
    assert files
    with zipfile.ZipFile(wheel) as archive:
        for path in files:
            assert archive.read(f"sb3_qsm/hyperparams/{path.name}") == path.read_bytes()


def test_console_scripts_of_the_wheel_exist(wheel: Path):
    # What a console script imports belongs to the extra `zoo`
    pytest.importorskip("rl_zoo3")
    entry_points = configparser.ConfigParser()
    with zipfile.ZipFile(wheel) as archive:
        entry_points.read_string(archive.read(f"sb3_qsm-{sb3_qsm.__version__}.dist-info/entry_points.txt").decode())
    assert "sb3-qsm" in entry_points["console_scripts"]
    for target in entry_points["console_scripts"].values():
        module, _, name = target.partition(":")
        assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.slow
def test_wheel_in_an_empty_environment_runs_the_readme(wheel: Path, tmp_path: Path):
    """Installs torch and the other dependencies, so it needs a package index."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    install = [python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel, "gymnasium[classic-control]"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(install, cwd=tmp_path, env=environment, check=True)
    code = next(code for _, code in SNIPPET.findall((ROOT / "README.md").read_text("utf-8")))
    code = code.replace("10_000", "110")
    finished = subprocess.run(
        [python, "-c", f"{code}\nimport sb3_qsm; print(sb3_qsm.__file__)"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert re.match(r"return -\d+ ± \d+\n", finished.stdout)
    assert str(tmp_path) in finished.stdout.splitlines()[-1]


def test_dependencies_are_bounded_and_the_tested_versions_are_within():
    tomllib = pytest.importorskip("tomllib")
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    lines = (line.strip() for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines())
    pins = {
        canonicalize_name(pin.name): next(iter(pin.specifier)).version
        for pin in (Requirement(line) for line in lines if line and not line.startswith("#"))
    }
    for requirement in map(Requirement, project["dependencies"]):
        operators = {part.operator for part in requirement.specifier}
        assert {"<", ">="} <= operators, f"{requirement} needs both bounds"
    for text in [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]:
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        if name != "sb3-qsm":
            assert pins[name] in requirement.specifier, (
                f"constraints.txt has {name} {pins[name]}, pyproject.toml {requirement}"
            )


@pytest.mark.parametrize(("code", "arguments"), SNIPPETS)
def test_documented_python_runs(code: str, arguments: list[str], tmp_path: Path):
    # Fewer steps, of which the first 100 are random; everything else runs as it stands in the text
    code = re.sub(r"(\.learn\((?:total_timesteps=)?)[\d_]+", r"\g<1>110", code)
    code = re.sub(r"(\.pretrain\()[\d_]+", r"\g<1>10", code)
    finished = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=tmp_path,
        # Several threads wait for one another wherever something else runs beside them
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert finished.returncode == 0, f"{code}\n{finished.stderr}"


@pytest.fixture(scope="module")
def cli_help() -> Callable[[str], str]:
    """The help of a subcommand."""
    pytest.importorskip("rl_zoo3")
    from sb3_qsm.zoo.cli import main

    @functools.cache
    def text(command: str) -> str:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            main([command, "--help"])
        return printed.getvalue()

    return text


@pytest.mark.parametrize("command", COMMANDS)
def test_documented_options_exist(command: str, cli_help: Callable[[str], str]):
    subcommand, *arguments = shlex.split(command, comments=True)
    text = cli_help(subcommand)
    assert text.startswith(f"usage: sb3-qsm {subcommand}")
    for argument in arguments:
        if re.match(r"--?[a-zA-Z]", argument):
            assert re.search(rf"(?<![\w-]){re.escape(argument)}(?![\w-])", text), f"{subcommand} has no option {argument}"


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: path.stem)
def test_documented_links_to_files(path: Path):
    text = re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if not re.match(r"[a-z]+:", target):
            assert (path.parent / target).exists(), f"{path.name} links to {target}, which is not there"
