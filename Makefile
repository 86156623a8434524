# Each target makes .venv itself, with python3's own venv and pip; nothing is installed outside it.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

# MLX's Linux wheel multiplies matrices with the reference BLAS; where OpenBLAS is installed it is some fifty times
# faster. With one thread on few x86 cores, for which the package has a stream each (mlx_aimv2/x86.py).
OPENBLAS   := $(wildcard /usr/lib/$(shell uname -m)-linux-gnu/libopenblas.so.0)
ONE_THREAD := $(shell [ "$$(uname -m)" = x86_64 ] && [ "$$(nproc 2>/dev/null)" -le 8 ] 2>/dev/null && echo OPENBLAS_NUM_THREADS=1)
RUN        := $(if $(OPENBLAS),env LD_PRELOAD=$(OPENBLAS) $(ONE_THREAD)) $(BIN)/python

.PHONY: help demo test test-all parity check verify train format clean
help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/:/' | sort

demo: $(VENV)/installed  ## convert the embedded checkpoint, embed images, draw one
	$(RUN) -m examples.demo

test: $(VENV)/tested  ## the quick tests: no network, no torch
	$(RUN) -m pytest -m "not slow"

test-all: $(VENV)/tested  ## the quick tests and those of more than two seconds
	$(RUN) -m pytest

parity: $(VENV)/parity  ## the same numbers as transformers on torch, live
	env MLX_ENABLE_TF32=0 HF_HUB_OFFLINE=1 $(RUN) -m pytest -o addopts= -q tests/parity

verify: $(VENV)/tested  ## on a Mac with a network: Apple's weights against the published values (CHECKPOINTS="name …" for more)
	$(RUN) -m convert.verify $(CHECKPOINTS)

train: $(VENV)/train  ## train the embedded checkpoint again
	$(RUN) -m convert.train_digits

check: $(VENV)/tested  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/tested  ## put the code into the house's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove what the targets made
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache

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

$(VENV)/parity: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[test,parity]'
	@# Only its vocabulary file is wanted, not the torchvision that it asks for.
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps open_clip_torch
	@touch $@ $(VENV)/tested $(VENV)/installed
