# Every target does its own set-up; a second call skips what is done.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## create .venv with the pinned dependencies

$(READY): pyproject.toml requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo "Python's venv module is missing: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint requirements.txt --editable '.[dev]'
	@command -v chromium >/dev/null || apt-get install --yes --quiet chromium >/dev/null 2>&1 \
		|| echo "No Chromium could be installed: the browser tests will be skipped."
	@touch $(READY)

train: $(READY) ## run the default study and print its summary
	$(BIN)/python train.py

test: $(READY) ## run the tests (at most ten minutes)
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-all: $(READY) ## run every test, the slow ones too
	$(BIN)/python -m pytest

bench: $(READY) ## measure speed and memory against transformers (a quiet machine, half an hour)
	$(BIN)/python -m dsv3 bench

check: $(READY) ## lint, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

.PHONY: help setup train test test-all bench check
