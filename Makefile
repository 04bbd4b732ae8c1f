# make demo and make test are all that a fresh machine needs: each makes .venv, installs what it runs, of the tested set,
# and runs it. What make demo installs is what a user of the package has; make test and make lint add the tools.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TOOLS := $(VENV)/.installed-dev
# Python compiles what is imported, when it is; pip would compile all of 2 GB first, for most of a minute.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e
CACHES := .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache
# A test keeps to one thread; how many run at a time says tests/conftest.py, and more than 8 would want much memory.
# pytest-benchmark, which is for benchmarks/ alone, does not go with that and stays out.
# What computes numbers on a CPU, as far as it takes no more than a minute.
PORTABLE := tests/diffusion tests/evaluation/test_nll.py tests/evaluation/test_bound.py tests/kernels/test_attention.py \
	tests/training/test_optimizer.py tests/training/test_ema.py
PYTEST := $(BIN)/pytest -q -n logical --maxprocesses 8 --dist worksteal -p no:benchmark

# Only .venv counts, whatever environment is active.
unexport VIRTUAL_ENV PYTHONHOME PYTHONPATH PYTHONDONTWRITEBYTECODE

.PHONY: help demo test test-portable test-slow lint format clean

help:
	@echo "make demo       train a small model on a toy set and sample from it"
	@echo "make test       the tests, without the slow ones"
	@echo "make test-portable  the numeric tests as another processor computes"
	@echo "make test-slow  the slow tests"
	@echo "make lint       ruff, mypy, import-linter"
	@echo "make format     let ruff rewrite what it can"
	@echo "make clean      remove build products and caches (not .venv, not runs)"

demo: $(INSTALLED)
	@$(BIN)/fastdiff demo

test: $(TOOLS)
	@$(PYTEST) -m "not slow"

# The numbers as a processor of other instructions computes them.
test-portable: $(TOOLS)
	@ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=AVX2 $(PYTEST) -m "not slow" $(PORTABLE)

test-slow: $(TOOLS)
	@$(PYTEST) -m slow

lint: $(TOOLS)
	@$(BIN)/ruff check --output-format concise
	@$(BIN)/ruff format --check --output-format concise
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

format: $(TOOLS)
	@$(BIN)/ruff check --fix-only
	@$(BIN)/ruff format

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "fastdiff needs Python 3.11 or newer; name one: make PYTHON=python3.12 ..."; exit 1; }
	@echo "Installing into $(VENV) (the first time this downloads PyTorch) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(INSTALL) .
	@touch $@

$(TOOLS): $(INSTALLED)
	@echo "Installing what the tests and linters need ..."
	@$(INSTALL) '.[dev]'
	@touch $@

clean:
	rm -rf build dist *.egg-info $(CACHES)
	find . \( -name .venv -o -name .git -o -name runs \) -prune -o -name __pycache__ -type d -exec rm -rf {} +
