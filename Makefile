# Each target makes .venv itself, with Python's venv and pip. Nothing is installed outside it.
PYTHON ?= python3
VENV   := .venv
WORK   ?= emoji-training
BIN    := $(VENV)/bin

# MLX's Linux wheel multiplies matrices with the reference BLAS; OpenBLAS, where it is installed, is some fifty times
# faster. On up to eight x86 cores it runs in one thread, because the package uses the cores itself (mlx_aimv2/backend/x86.py).
OPENBLAS   := $(wildcard /usr/lib/$(shell uname -m)-linux-gnu/libopenblas.so.0)
ONE_THREAD := $(shell [ "$$(uname -m)" = x86_64 ] && [ "$$(nproc 2>/dev/null)" -le 8 ] 2>/dev/null && echo OPENBLAS_NUM_THREADS=1)
# On AMD with AVX-512 its kernels for Haswell are faster than those it chooses (benchmarks/README.md).
HASWELL    := $(shell grep -qs AuthenticAMD /proc/cpuinfo && grep -q ' avx512f' /proc/cpuinfo && echo OPENBLAS_CORETYPE=$(or $(OPENBLAS_CORETYPE),Haswell))
RUN        := $(if $(OPENBLAS),env LD_PRELOAD=$(OPENBLAS) $(ONE_THREAD) $(HASWELL)) $(BIN)/python

# A process of tests for each core, up to four; each takes over tests of another that has more left.
PARALLEL := -n auto --maxprocesses 4 --dist worksteal

# What `make parity` compares: with transformers, and Core ML packages by coremltools' own evaluation.
PARITY := tests/parity tests/export/test_coreml.py

.PHONY: help demo test test-all rounding coverage mutations parity browser check fuzz verify train docs format clean
help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/:/' | sort

demo: $(VENV)/installed  ## convert the embedded checkpoint offline, embed images, draw the result
	@[ -n "$(OPENBLAS)" ] || [ "$$(uname -s)" = Darwin ] || echo "Without OpenBLAS this takes a minute instead of seconds: sudo apt-get install libopenblas0-pthread"
	$(RUN) -m examples.demo

test: $(VENV)/tested  ## the quick tests: no network, no torch
	$(RUN) -m pytest $(PARALLEL) -m "not slow"

test-all: $(VENV)/tested  ## the quick and the slow tests
	$(RUN) -m pytest $(PARALLEL)

rounding: $(VENV)/tested  ## golden values, gradients and the like (OPENBLAS_CORETYPE=Nehalem: with another kernel of OpenBLAS)
	$(RUN) -m pytest $(PARALLEL) -m rounding

coverage: $(VENV)/tested  ## line and branch coverage of the quick and the slow tests
	$(RUN) -m pytest $(PARALLEL) --cov --cov-report=term:skip-covered

mutations: $(VENV)/tested  ## break the package in some 440 places: which test notices? (ONLY="words of a fault" for some)
	$(RUN) -m tests.mutations $(if $(ONLY),--only "$(ONLY)")

parity: $(VENV)/parity  ## features, pixels and ids against transformers on torch (installs torch)
	env MLX_ENABLE_TF32=0 HF_HUB_OFFLINE=1 $(RUN) -m pytest -o addopts= -q $(PARITY)

browser: $(VENV)/browser  ## the page of `serve` in Chromium (CHROMIUM=its path, if it is not called so)
	$(RUN) -m pytest -o addopts= --import-mode=importlib -q tests/browser

fuzz: $(VENV)/tested  ## 20,000 broken checkpoints, images, indexes, heads, states, data sets, answers of the Hub (FUZZ="--seed 7 --inputs 500" for more)
	$(RUN) -m tests.fuzz $(FUZZ)

verify: $(VENV)/tested  ## with a network: Apple's weights against published values, embed, fit, speed, memory, energy (CHECKPOINTS="name …" for more)
	$(RUN) -m convert.verify $(CHECKPOINTS)

train: $(VENV)/train  ## pre-train and tune the emoji pair from the registries' packages (WORK=folder; goes on where it was interrupted)
	$(RUN) -m tools.train_emoji $(WORK)

check: $(VENV)/tested  ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/docs  ## the site, site/index.html: the documents and a reference from the docstrings; a warning is an error
	rm -rf site
	$(RUN) -m sphinx -W --keep-going -q -E -c docs -d build/doctrees . site

format: $(VENV)/tested  ## format the code and fix what ruff can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove what the targets made
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -e .
	@touch $@

$(VENV)/tested: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[test]'
	@touch $@ $(VENV)/installed

$(VENV)/train: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[train]'
	@touch $@ $(VENV)/installed

$(VENV)/browser: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[test,browser]'
	@touch $@ $(VENV)/tested $(VENV)/installed

$(VENV)/docs: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[docs]'
	@touch $@ $(VENV)/installed

$(VENV)/parity: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[test,parity]'
	@# Without dependencies: only its vocabulary file is used, and it would bring torchvision.
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps open_clip_torch
	@touch $@ $(VENV)/tested $(VENV)/installed
