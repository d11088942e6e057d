# `make quickstart` and `make test` set up everything they need in .venv on a fresh machine.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
OUTPUT ?= runs/quickstart

.PHONY: help install lint test test-slow quickstart clean

help:
	@echo "make quickstart   train and evaluate the tiny preset, all five stages (about 15 to 20 minutes on 2 cores)"
	@echo "make test         the test suite (under 10 minutes)"
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
	$(BIN)/python -m pytest

test-slow: install
	$(BIN)/python -m pytest -m slow

quickstart: install
	$(BIN)/empathic quickstart --output $(OUTPUT)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
