# On a fresh machine, `make quickstart` and `make test` first set up their environment in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
OUTPUT ?= runs/quickstart

# The minor versions of transformers that the model's remote code supports.
MINORS := 5.17 5.18 5.19 5.20 5.21 5.22 5.23 5.24
VERSIONS ?= .versions
CHECKPOINT ?=

.PHONY: help install lint test test-distributed test-slow test-oldest test-newest test-versions quickstart docs docs-serve dist test-wheel test-gpu clean

help:
	@echo "make quickstart   train and evaluate the tiny preset, all five stages (about 10 minutes on 2 cores)"
	@echo "make test         the test suite (under 10 minutes)"
	@echo "make test-distributed   training on several processes: DDP, ZeRO-2, ZeRO-3, FSDP2"
	@echo "make test-slow    the longer tests, including quickstart"
	@echo "make test-oldest  the test suite with the oldest versions that setup.cfg allows, in a separate environment"
	@echo "make test-newest  the test suite with the newest versions that setup.cfg allows, in a separate environment"
	@echo "make test-versions  load a checkpoint with each transformers from 5.17 to 5.24 (CHECKPOINT=FOLDER: your own)"
	@echo "make lint         ruff, and pyright within the error budget of pyproject.toml"
	@echo "make docs         build the documentation site into site/, in a separate environment"
	@echo "make docs-serve   serve the documentation site at http://127.0.0.1:8000, rebuilt on each change"
	@echo "make test-gpu     check and measure on one GPU (10 minutes at most; GPU_PYTHON=python3, ARGS=--dry_run)"
	@echo "make dist         build the wheel and the source distribution into dist/, and check them"
	@echo "make test-wheel   install the wheel of dist/ into a fresh environment and try it"
	@echo "make install      only set up $(VENV)"

# torch first: pip keeps an installed version instead of choosing another build.
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
	$(BIN)/python .ci/type_errors.py

test: install
	$(BIN)/python -m pytest -n 2

# Do not compile DeepSpeed's kernels, which are for GPUs.
$(BIN)/.deepspeed: $(BIN)/.installed
	$(BIN)/python -m pip install --quiet wheel packaging py-cpuinfo "setuptools>=77"
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[deepspeed]"
	touch $@

test-distributed: $(BIN)/.deepspeed
	$(BIN)/python -m pytest -m distributed

test-slow: install
	$(BIN)/python -m pytest -m slow

# uv resolves the lowest versions. torch is installed before, so that uv does not choose another build.
$(VENV)-oldest/.installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet --upgrade pip uv
	$(VENV)-oldest/bin/python -m pip install --quiet "$(TORCH)"
	$(VENV)-oldest/bin/uv pip install --quiet --python $(VENV)-oldest/bin/python --resolution lowest-direct \
		--editable ".[train,dev]"
	touch $@

test-oldest: $(VENV)-oldest/.installed
	$(VENV)-oldest/bin/python -m pytest -n 2

# No .installed file as in the other environments, because the newest versions change from day to day.
test-newest:
	$(PYTHON) -m venv $(VENV)-newest
	$(VENV)-newest/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-newest/bin/python -m pip install --quiet "$(TORCH)"
	$(VENV)-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable ".[train,dev]" "$(TORCH)"
	$(VENV)-newest/bin/python -m pytest -n 2

# Install only the packages that differ. transformers 5.17 needs huggingface_hub 1.
$(VERSIONS)/%: $(BIN)/.installed
	rm -rf $@
	$(BIN)/python -m pip install --quiet --no-deps --target $@ "transformers==$*.*" \
		"huggingface_hub$(if $(filter 5.17,$*),<2,>=2)"

test-versions: install $(addprefix $(VERSIONS)/,$(MINORS))
	EMPATHIC_VERSIONS=$(VERSIONS) EMPATHIC_CHECKPOINT=$(CHECKPOINT) $(BIN)/python -m pytest -m versions

quickstart: install
	$(BIN)/empathic quickstart --output $(OUTPUT)

# Install only the packages of the extra `docs`: the API pages are built from the sources without importing them.
$(VENV)-docs/.installed: setup.cfg
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python -m pip install --quiet --upgrade pip
	$(PYTHON) -c "import configparser; setup = configparser.ConfigParser(); setup.read('setup.cfg'); \
		print(setup['options.extras_require']['docs'])" > $(VENV)-docs/requirements.txt
	$(VENV)-docs/bin/python -m pip install --quiet --requirement $(VENV)-docs/requirements.txt
	touch $@

# The variable silences an announcement of mkdocs-material's authors.
docs: $(VENV)-docs/.installed
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --strict

docs-serve: $(VENV)-docs/.installed
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs serve

# With the Python of a GPU image and no network: the image has torch, transformers and accelerate, and the folder WHEELS
# has what docs/gpu-check.md lists. No environment is set up; the link makes the repository importable as `empathic`.
GPU_PYTHON ?= python3
GPU_OUTPUT ?= runs/gpu_check
WHEELS ?=
ARGS ?=

test-gpu:
	mkdir -p $(GPU_OUTPUT)/path
	ln -sfn "$(CURDIR)" $(GPU_OUTPUT)/path/empathic
	PYTHONPATH="$(abspath $(GPU_OUTPUT))/path$(if $(WHEELS),:$(abspath $(WHEELS))/site-packages):$$PYTHONPATH" \
		$(GPU_PYTHON) -m empathic.benchmarks.gpu_check --output $(GPU_OUTPUT) $(ARGS)

$(VENV)-dist/.installed:
	$(PYTHON) -m venv $(VENV)-dist
	$(VENV)-dist/bin/python -m pip install --quiet --upgrade pip build twine
	touch $@

dist: $(VENV)-dist/.installed
	rm -rf build dist *.egg-info
	$(VENV)-dist/bin/python -m build
	$(VENV)-dist/bin/python -m twine check --strict dist/*

# Away from the repository, so that nothing of it is found.
test-wheel: dist
	rm -rf $(VENV)-wheel
	$(PYTHON) -m venv $(VENV)-wheel
	$(VENV)-wheel/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-wheel/bin/python -m pip install --quiet "$(TORCH)"
	$(VENV)-wheel/bin/python -m pip install --quiet "$$(ls dist/*.whl)[train]"
	cd / && "$(abspath $(VENV))-wheel/bin/python" "$(CURDIR)/.ci/try_installed.py"

clean:
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache
