"""What is shipped: version, imports, wheel, dependencies, and the snippets of the documentation."""

import configparser
import contextlib
import functools
import importlib
import io
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import sb3_qsm
from tests.scripts import run_python

ROOT = Path(__file__).parents[1]
MARKDOWN = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# A comment above a snippet says what it needs: arguments, the snippet before it, a study, or a run of the command line
SNIPPET = re.compile(
    r"(?:^<!-- (arguments: .*|continues the snippet above|needs study\.log|needs a run) -->\n)?^```python\n(.*?)^```",
    re.MULTILINE | re.DOTALL,
)
SNIPPETS = [
    pytest.param(path, number, id=f"{path.stem}-{number}")
    for path in MARKDOWN
    for number in range(len(SNIPPET.findall(path.read_text("utf-8"))))
]
# Lines of the shell, without what a backslash breaks into several
SHELL = re.compile(r"^```(?:bash|sh)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINES = [
    pytest.param(line, id=f"{path.stem}-{number}")
    for path in MARKDOWN
    for number, line in enumerate(
        line.strip()
        for block in SHELL.findall(path.read_text("utf-8"))
        for line in block.replace("\\\n", " ").splitlines()
        if line.strip() and not line.lstrip().startswith("#")
    )
]
# Those of the machine or of other programs
FOREIGN = ("sudo ", "ray ", "optuna-dashboard ", "for ", "done", "wait", "checkpoint=", "if ", "elif ", "fi", "MUJOCO_GL=egl ")


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


@pytest.mark.parametrize("missing", ["optuna", "rl_zoo3"])
def test_command_line_without_its_extra(missing: str):
    pytest.importorskip("optuna")
    pytest.importorskip("rl_zoo3")
    code = f"import sys; sys.modules[{missing!r}] = None; from sb3_qsm.__main__ import main; sys.exit(main())"
    finished = subprocess.run([sys.executable, "-c", code, "--help"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 1
    assert finished.stderr.startswith('sb3-qsm: error: the command line needs pip install "sb3-qsm[zoo]"')
    assert finished.stderr.count("\n") == 1
    assert missing in finished.stderr


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
    entry_points = configparser.ConfigParser()
    with zipfile.ZipFile(wheel) as archive:
        entry_points.read_string(archive.read(f"sb3_qsm-{sb3_qsm.__version__}.dist-info/entry_points.txt").decode())
    assert "sb3-qsm" in entry_points["console_scripts"]
    for target in entry_points["console_scripts"].values():
        module, _, name = target.partition(":")
        assert callable(getattr(importlib.import_module(module), name))


def test_twine_finds_nothing(wheel: Path):
    pytest.importorskip("twine")
    files = [wheel, *wheel.parent.glob("*.tar.gz")]
    assert len(files) == 2
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, files)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout
    assert finished.stdout.count("PASSED") == 2


@pytest.mark.slow
def test_wheel_in_an_empty_environment_runs_the_readme(wheel: Path, tmp_path: Path):
    """Installs torch and the other dependencies, so it needs a package index."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    install = [python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel]
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


@pytest.mark.parametrize(("path", "number"), SNIPPETS)
def test_documented_python_runs(path: Path, number: int, tmp_path: Path):
    snippets = SNIPPET.findall(path.read_text("utf-8"))
    needs, code = snippets[number]
    if needs.startswith("continues"):
        code = snippets[number - 1][1] + code
    if needs == "needs a run":
        pytest.importorskip("rl_zoo3")
        command = ["train", "--env", "Pendulum-v1", "-n", "110", "-params", "normalize:True"]
        run_python("import runpy; runpy.run_module('sb3_qsm', run_name='__main__')", command, tmp_path).check_returncode()
    if needs == "needs study.log":
        make_study(tmp_path / "study.log")
    # Fewer steps, of which the first 100 are random; everything else runs as it stands in the text
    code = re.sub(r"(\.learn\((?:total_timesteps=)?)[\d_]+", r"\g<1>110", code)
    code = re.sub(r"(\.pretrain\()[\d_]+", r"\g<1>10", code)
    finished = run_python(code, needs.removeprefix("arguments: ").split(), tmp_path)
    assert finished.returncode == 0, f"{code}\n{finished.stderr}"


def test_what_fails_in_a_script_is_told(tmp_path: Path):
    code = "import os, sys\nprint(__name__, *sys.argv[1:], os.getcwd())\nraise SystemExit('stopped')"
    finished = run_python(code, ["first", "second"], tmp_path)
    assert (finished.returncode, finished.stdout) == (1, f"__main__ first second {tmp_path}\n")
    assert finished.stderr == "stopped\n"
    finished = run_python("from sb3_qsm import NoSuchName", [], tmp_path)
    assert finished.returncode == 1
    assert "ImportError: cannot import name 'NoSuchName'" in finished.stderr
    with pytest.raises(TimeoutError, match="still running after 0 s: while True"):
        run_python("while True: pass", [], tmp_path, timeout=0.2)


def make_study(path: Path) -> None:
    """A study as `sb3-qsm train -optimize` leaves it."""
    pytest.importorskip("rl_zoo3")
    import optuna

    from sb3_qsm.zoo.hyperparams import sample_qsm_params
    from sb3_qsm.zoo.storage import open_storage

    study = optuna.create_study(study_name="pendulum", storage=open_storage(str(path)))
    study.optimize(lambda trial: float(len(sample_qsm_params(trial, 1, 1, {"using_her_replay_buffer": False}))), n_trials=1)


def test_no_python_is_left_out():
    for path in MARKDOWN:
        text = path.read_text("utf-8")
        assert len(re.findall(r"^\s*```\s*(?:python|py)", text, re.MULTILINE)) == len(SNIPPET.findall(text)), path


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


@functools.cache
def script_help(*arguments: str) -> str:
    """The help of a script, or of its subcommand."""
    command = [sys.executable, *arguments, "--help"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def check_options(arguments: list[str], text: str) -> None:
    for argument in arguments:
        if re.match(r"--?[a-zA-Z]", argument):
            assert re.search(rf"(?<![\w-]){re.escape(argument)}(?![\w-])", text), f"there is no option {argument}"


@pytest.mark.parametrize("line", LINES)
def test_documented_shell_lines(line: str, cli_help: Callable[[str], str]):
    """What they name exists: options, extras, files and targets. The commands run in tests/zoo and in the slow tests."""
    program, *arguments = shlex.split(line, comments=True)
    if line.startswith(FOREIGN):
        return
    if program == "sb3-qsm":
        text = cli_help(arguments[0])
        assert text.startswith(f"usage: sb3-qsm {arguments[0]}")
        check_options(arguments[1:], text)
    elif program == "python":
        assert (ROOT / arguments[0]).is_file()
        text = script_help(arguments[0])
        if re.match(r"usage: .* \.\.\.$", text, re.MULTILINE):
            text = script_help(*arguments[:2])
        check_options(arguments, text)
        assert all((ROOT / argument).exists() for argument in arguments if argument.endswith((".yml", ".md")))
    elif program == "make":
        targets = [argument for argument in arguments if "=" not in argument]
        assert all(re.search(rf"^{target}:", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE) for target in targets)
    else:
        assert program == "pip", f"nothing checks {line!r}"
        tomllib = pytest.importorskip("tomllib")
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
        for found in re.findall(r"(?:\.|sb3-qsm)\[([\w,]+)\]", line):
            assert set(found.split(",")) <= extras.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cli", "tuning", "modes", "ddiffpg", "resume", "safe"])
def test_documented_commands_run(name: str, tmp_path: Path):
    """Each line of a page, one after the other in one folder, with fewer steps and trials."""
    pytest.importorskip("rl_zoo3")
    text = (ROOT / "docs" / f"{name}.md").read_text("utf-8")
    if name == "safe":
        code = SNIPPET.findall(text)[0][1].replace("1_000", "110")
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    lines = [line for block in SHELL.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    commands = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("sb3-qsm ")]
    if name == "modes":
        # It shows a model that somebody has trained
        commands = [["train", "--env", "sb3_qsm/NGoalPoint-v0"], *commands]
    assert commands
    for command in commands:
        values = dict(itertools.pairwise(command))
        changes = {"-w": "1", "--save-freq": "100", "--checkpoint-freq": "50", "--n-trials": "2", "--trial-id": "1"}
        for option, value in changes.items():
            if option in values:
                command[command.index(option) + 1] = value
        if command[0] == "train" and "--resume" not in command:
            # One episode of the half cheetah, which the command line's page plots
            command += ["-n", "1100" if name == "cli" else "160", "--eval-episodes", "1", "-params", "learning_starts:100"]
            # A finished run loses its checkpoint, and nothing kills this one
            command += ["--keep-checkpoint"] if name == "resume" else []
        if command[0] in ("enjoy", "record_video"):
            command += ["-n", "20", *(["--no-render"] if command[0] == "enjoy" else [])]
        finished = subprocess.run(
            [sys.executable, "-m", "sb3_qsm", *command],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MUJOCO_GL": "egl", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert finished.returncode == 0, f"{command}\n{finished.stdout}\n{finished.stderr}"


def test_documented_sweep_is_one():
    pytest.importorskip("ray")
    pytest.importorskip("filelock")
    (text,) = re.findall(
        r"^```yaml\n(.*?)^```", (ROOT / "docs" / "benchmarks.md").read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    code = "import sys; from pathlib import Path; sys.path.insert(0, 'benchmarks'); import sweep; "
    code += "print(len(sweep.read_groups(Path(sys.argv[1]))['mine']))"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mine.yml"
        path.write_text(text)
        run = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(run.stdout) == 18  # 3 algorithms, 2 environments, 3 seeds


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: path.stem)
def test_documented_links_to_files(path: Path):
    text = re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if not re.match(r"[a-z]+:", target):
            assert (path.parent / target).exists(), f"{path.name} links to {target}, which is not there"


def test_the_recipe_for_a_queue_that_kills(tmp_path: Path):
    """It finds the newest checkpoint, whatever the number of the run, and does nothing after a finished run."""
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    text = (ROOT / "docs" / "cluster.md").read_text("utf-8")
    (recipe,) = re.findall(r"```bash\n(checkpoint=.*?)```", text, re.DOTALL)
    # Only what it decides is looked at here; what the commands do is tested in tests/zoo
    script = f'sb3-qsm() {{ echo "$@"; }}\n{recipe}'

    def decision() -> str:
        run = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
        return run.stdout.strip()

    assert decision().startswith("train --env HalfCheetah-v5 -f logs")
    runs = [tmp_path / "logs" / "qsm" / f"HalfCheetah-v5_{number}" for number in (1, 2)]
    for run in runs:
        run.mkdir(parents=True)
    (runs[1] / "checkpoint.zip").touch()
    assert decision() == "train --resume logs/qsm/HalfCheetah-v5_2"
    (runs[1] / "checkpoint.zip").rename(runs[1] / "HalfCheetah-v5.zip")
    assert decision() == ""
