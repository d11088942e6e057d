# `make quickstart` and `make test` set up everything they need in .venv on a fresh machine.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
OUTPUT ?= runs/quickstart

.PHONY: help install lint test test-distributed test-slow quickstart clean

help:
	@echo "make quickstart   train and evaluate the tiny preset, all five stages (about 12 minutes on 2 cores)"
	@echo "make test         the test suite (under 10 minutes)"
	@echo "make test-distributed   training on several processes: DDP, ZeRO-2, ZeRO-3, FSDP2"
	@echo "make test-slow    the longer tests, quickstart among them"
	@echo "make lint         ruff"
	@echo "make install      only set up $(VENV)"

# torch first: a version that is already there keeps pip from replacing it by another build.
$(BIN)/.installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[train,dev]"
	touch $@

install: $(BIN)/.installed

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: install
	$(BIN)/python -m pytest -n 2

# DeepSpeed compiles nothing here: its kernels are for GPUs.
$(BIN)/.deepspeed: $(BIN)/.installed
	$(BIN)/python -m pip install --quiet wheel packaging py-cpuinfo "setuptools>=77"
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[deepspeed]"
	touch $@

test-distributed: $(BIN)/.deepspeed
	$(BIN)/python -m pytest -m distributed

test-slow: install
	$(BIN)/python -m pytest -m slow

quickstart: install
	$(BIN)/empathic quickstart --output $(OUTPUT)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
