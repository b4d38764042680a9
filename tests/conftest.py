"""Options and shared fixtures of the test suite."""

from pathlib import Path

import pytest
import torch as th

# Small networks are fastest on one thread, and tests run beside each other
th.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        type=Path,
        action="append",
        default=[],
        metavar="FILE.npz",
        help="further updates of the official QSM code for tests/test_golden.py to reproduce",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_path" in metafunc.fixturenames:
        shipped = sorted((Path(__file__).parent / "data").glob("official_update_*.npz"))
        paths = [*shipped, *metafunc.config.getoption("--golden")]
        metafunc.parametrize("golden_path", paths, ids=lambda path: path.stem)
