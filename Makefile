# Every target creates the virtual environment it needs in .venv; the first run installs, later runs reuse it. Only Python
# 3.10 or newer and its venv module have to be there.
#
#   PYTHON       interpreter the virtual environment is made with, e.g. make test PYTHON=python3.12
#   ARGS         arguments of examples/quickstart.py, e.g. make quickstart ARGS="--timesteps 5000 --seed 1"
#   PYTEST_ARGS  further arguments of pytest, e.g. make test PYTEST_ARGS="tests/test_package.py -x"
#   JOBS         processes that run tests side by side

PYTHON ?= python3
JOBS ?= 2
ARGS ?=
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# The constraints keep torch at the tested release.
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt
# One thread a process: the networks are small, and several processes with many threads each slow one another down.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

.DEFAULT_GOAL := help
# Two pip processes must not write to one virtual environment.
.NOTPARALLEL:
# A stamp whose recipe failed is no stamp.
.DELETE_ON_ERROR:
.PHONY: help quickstart test test-slow lint format type docs linkcheck clean

help:  ## List the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1|\2/' | awk -F'|' '{printf "  make %-12s %s\n", $$1, $$2}'

quickstart: $(VENV)/.quickstart  ## Train QSM on MuJoCo (ten minutes on a slow core), evaluate it, draw the curve, film it
	$(BIN)/python examples/quickstart.py $(ARGS)

test: $(VENV)/.dev  ## Run the fast tests and report coverage
	$(PYTEST) -m "not slow" --cov=sb3_qsm --cov-report=term-missing:skip-covered $(PYTEST_ARGS)

test-slow: $(VENV)/.dev  ## Run the slow tests: trainings that must reach a return, builds
	$(PYTEST) -m slow $(PYTEST_ARGS)

lint: $(VENV)/.dev  ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev  ## Sort imports, fix what can be fixed, format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: $(VENV)/.dev  ## Check types
	$(BIN)/mypy --strict sb3_qsm

docs: $(VENV)/.docs  ## Build the documentation into docs/_build/html; a warning is an error
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html

linkcheck: $(VENV)/.docs  ## Check the links of the documentation to other sites
	$(BIN)/sphinx-build -b linkcheck docs docs/_build/linkcheck

clean:  ## Remove the virtual environment, caches and built files; what training wrote to runs/ and logs/ stays
	rm -rf $(VENV) build dist docs/_build htmlcov .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find sb3_qsm tests examples docs -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "sb3-qsm needs Python 3.10 or newer, not $$($(PYTHON) --version 2>&1). Name one: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.quickstart: $(VENV)/.created pyproject.toml constraints.txt
	$(INSTALL) -e '.[extra,mujoco,plots]'
	touch $@

$(VENV)/.dev: $(VENV)/.created pyproject.toml constraints.txt
	$(INSTALL) -e '.[dev]'
	touch $@

$(VENV)/.docs: $(VENV)/.created pyproject.toml constraints.txt
	$(INSTALL) -e '.[docs]'
	touch $@
