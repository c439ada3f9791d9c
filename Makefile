# `make train` and `make test` need Python 3.11+, pip, git and make: the first target that needs it builds .venv.
#
#   make PYTHON=python3.12 ...      another interpreter for .venv
#   make VENV=/path/to/venv ...     an environment of your own (your CUDA torch, say): used as it is, never changed;
#                                   prepare it once with  pip install -e '.[dev]'
#   make JOBS=1 test                so many tests at a time instead of one more than there are cores

PYTHON ?= python3
VENV ?= .venv
CONFIG ?= qwen3next_tiny.yaml
PLAN_CONFIG ?= qwen3next_80b.yaml
ARGS ?=
# One more than there are cores: tests wait for ranks, launchers and child processes.
JOBS ?= $(shell expr $$(nproc) + 1)

# Or each of the several hundred processes of the tests would compile the package and the tests for itself.
unexport PYTHONDONTWRITEBYTECODE

RUN := $(VENV)/bin/python -m
PYTEST := $(RUN) pytest
# A file stays on one worker, which builds its fixtures once; files go out in the order of the tree, in which those
# that take longest come first.
PARALLEL := -n $(JOBS) --dist loadfile --no-loadscope-reorder
# In one go, since every worker imports the package and its tests, and what waits leaves the cores to what is fast.
# Behind the fast tests of the same command (`make check test`) those that are left, from the files that have some.
TESTS = -m "not gpu"
ifneq ($(filter check test-fast,$(MAKECMDGOALS)),)
TESTS = -m "not gpu and (dist or slow)" $(shell grep -rlE --include='test_*.py' 'mark\.(dist|slow)' tests | LC_ALL=C sort)
endif
TORCH := $(shell sed -n '/^torch==/p' constraints.txt)

ifeq ($(VENV),.venv)
ENV := .venv/.installed
else
ENV := own-venv
endif

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install own-venv train plan baselines bench bench-curves bench-ops bench-saves check format format-check lint types contracts docs \
        test test-fast test-gpu test-dist clean

help:  ## list the targets
	@awk -F ':.*  ## ' '/^[a-z-]+:.*  ## / { printf "  %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(ENV)  ## build or update .venv

# The stamp is written last, so an interrupted installation is taken up again. torch comes first and by its exact
# version: an unpinned `torch` would fetch the CUDA build even where a CPU build is at hand.
.venv/.installed: setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "error: Python 3.11 or newer is needed, '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo missing);" \
	       "name another: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "error: '$(PYTHON)' has no venv module; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@echo "installing into .venv, this takes some minutes the first time"
	@$(PYTHON) -m venv .venv
	@$(RUN) pip install --quiet --disable-pip-version-check --no-input --constraint constraints.txt $(TORCH)
	@$(RUN) pip install --quiet --disable-pip-version-check --no-input --constraint constraints.txt --editable '.[dev]'
	@touch $@

own-venv:
	@test -x $(VENV)/bin/qwen3next-train || { \
	  echo "error: $(VENV) has no qwen3next-train; first run: $(VENV)/bin/pip install -e '.[dev]'" >&2; exit 1; }

train: $(ENV)  ## train CONFIG (the tiny model, on any machine); more options in ARGS
	$(VENV)/bin/qwen3next-train --config $(CONFIG) $(ARGS)

plan: $(ENV)  ## parameters, FLOPs, memory and days of PLAN_CONFIG; options in ARGS
	$(VENV)/bin/qwen3next-train plan --config $(PLAN_CONFIG) $(ARGS)

baselines: $(ENV)  ## what a model of CONFIG has to beat: gzip and bigrams on its held-out text
	$(VENV)/bin/python scripts/benchmarks/held_out_baselines.py --config $(CONFIG) $(ARGS)

bench: $(ENV)  ## a training step on one GPU: time, rate, memory; options in ARGS
	$(VENV)/bin/python scripts/benchmarks/bench_step.py $(ARGS)

bench-steps: $(ENV)  ## whole training steps on 1, 2 and 4 GPUs, what they consist of; options in ARGS
	$(VENV)/bin/python scripts/benchmarks/bench_steps.py $(ARGS)

bench-curves: $(ENV)  ## loss curves of many layouts against one GPU's, and of three seeds; options in ARGS
	$(VENV)/bin/python scripts/benchmarks/bench_curves.py $(ARGS)

bench-saves: $(ENV)  ## what checkpoints cost training on one GPU; options in ARGS
	$(VENV)/bin/python scripts/benchmarks/bench_saves.py $(ARGS)

bench-ops: $(ENV)  ## each kernel on one GPU: errors, time, share of what the device allows; options in ARGS
	$(VENV)/bin/python scripts/benchmarks/bench_op.py $(ARGS)

check: format-check lint types contracts test-fast  ## everything quick: style, types, import contracts, fast tests

format: $(ENV)  ## rewrite the sources in the project's format
	$(RUN) ruff format

format-check: $(ENV)  ## fail if a source is not formatted
	$(RUN) ruff format --check

lint: $(ENV)  ## ruff's rules (ruff.toml)
	$(RUN) ruff check

types: $(ENV)  ## mypy (setup.cfg)
	$(RUN) mypy

contracts: $(ENV)  ## who may import whom (setup.cfg)
	$(VENV)/bin/lint-imports

test: $(ENV)  ## all tests that need no GPU
	$(PYTEST) $(PARALLEL) $(TESTS)

test-fast: $(ENV)  ## the tests that are neither slow nor start several processes
	$(PYTEST) $(PARALLEL) -m "not gpu and not dist and not slow"

test-dist: $(ENV)  ## the tests that start several processes, on CPU
	$(PYTEST) $(PARALLEL) -m "dist and not gpu"

test-gpu: $(ENV)  ## the tests that need a CUDA device
	$(PYTEST) -m gpu

docs: $(ENV)  ## build the pages with the API reference into build/docs; a broken link is an error
	$(RUN) sphinx -q -W --keep-going -b html docs build/docs

clean:  ## remove .venv, builds and tool caches; runs stay
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find qwen3next_train tests scripts -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
