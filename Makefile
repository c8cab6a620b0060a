# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0
#
# Every target sets up .venv first, once, and again when pyproject.toml or constraints.txt change.
#   make demo         25 Gaussians, implicit against Gaussian guide: a table and figures
#   make test         the fast tests            make lint     ruff and mypy
#   make test-slow    the slow ones             make format   ruff's fixes and layout
#   make docs         docs/_build/html          make clean    all that was made, .venv excepted
# Variables: PYTHON (the interpreter that makes .venv), PYTEST_ARGS (e.g. "-k score -x"),
# WORKERS (processes of the fast tests; 0: this one).

PYTHON ?= python3
PYTEST_ARGS ?=
WORKERS ?= 2
BIN := .venv/bin
READY := .venv/.installed

.PHONY: demo test test-slow lint format docs clean

demo: $(READY)
	$(BIN)/python -m inference.demo

test: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

clean:
	rm -rf build dist docs/_build .pytest_cache .mypy_cache .ruff_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +

# An interrupted installation leaves no stamp, so the next call starts it again.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python >= 3.10 is needed, got " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	@echo "Setting up .venv (some minutes at the first time) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[all]"
	@touch $@
