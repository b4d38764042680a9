"""What is shipped: version, imports, wheel, dependencies, and the snippets of the documentation."""

import configparser
import importlib
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import sb3_qsm

ROOT = Path(__file__).parents[1]
MARKDOWN = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# A snippet that needs something the text made before says so in a comment above it
SNIPPET = re.compile(r"(?<!-->\n)^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
SNIPPETS = [
    pytest.param(code, id=f"{path.stem}-{number}")
    for path in MARKDOWN
    for number, code in enumerate(SNIPPET.findall(path.read_text("utf-8")))
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


@pytest.mark.parametrize("code", SNIPPETS)
def test_documented_python_runs(code: str, tmp_path: Path):
    # Fewer steps; everything else runs as it stands in the text
    code = re.sub(r"(\.(?:learn|pretrain)\((?:total_timesteps=)?)[\d_]+", r"\g<1>150", code)
    finished = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert finished.returncode == 0, f"{code}\n{finished.stderr}"
