# One environment for everything: a .venv beside this file, made when it is missing or when its recipe changes.
# Where the active Python already has torch >= 2.10, the .venv sees that torch and never replaces it.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
# Processes that run tests at once.
JOBS ?= 2
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
BUILT := $(VENV)/.built
# One thread a process: the tests already fill the cores.
export OMP_NUM_THREADS ?= 1

.PHONY: help demo test lint build doctor clean

help: ## Show this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(STAMP) ## Retrieve with the shipped model, thinking when needed, beside PEFT (CPU, under 3 minutes)
	@$(PY) -m twn_kernels demo

test: lint $(BUILT) ## Lint, then every test that this machine can run (CPU, under 15 minutes on 2 cores)
	@$(PY) -m pytest -n $(JOBS) --dist worksteal --durations 10 tests

lint: $(STAMP) ## Check the code with ruff
	@$(PY) -m ruff check .

build: $(STAMP) ## Rebuild what changed of the CUDA extension in place; fails with the reason where it cannot be built
	@TWN_BUILD_CUDA=1 $(PY) -m pip install --quiet --no-build-isolation --no-deps -e .
	@$(PY) -c "from twn_kernels.impl.cuda.loader import build_info; print('CUDA extension', build_info())"
	@touch $(BUILT)

doctor: $(STAMP) ## Check each op against the reference on this machine
	@$(PY) -m twn_kernels doctor

clean: ## Remove the environment and everything built
	rm -rf $(VENV) build dist out *.egg-info .pytest_cache .ruff_cache .hypothesis twn_kernels/_C.abi3.so twn_kernels/_build_info.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): tests/requirements.txt tests/environment.sh tests/torchvision_on_cpu.py pyproject.toml
	@bash tests/environment.sh "$(PYTHON)" "$(VENV)"
	@touch $@ $(BUILT)

# Where the sources are newer than the library, it is brought up to date; where it cannot be built, nothing fails.
RECIPE := csrc setup.py twn_kernels/impl/cuda/build.py
$(BUILT): $(STAMP) $(shell find $(RECIPE))
	@if [ ! -e $@ ] || [ -n "$$(find $(RECIPE) -newer $@)" ]; then \
	  $(PY) -m pip install --quiet --no-build-isolation --no-deps -e . && touch $@; fi
