# make demo | train-demo | test (lint and pytest) | slow | lint | pytest | format | clean
#
# PYTHON       the interpreter that makes .venv (3.11 or newer)
# WORDNET      for train-demo: folder of WordNet's database files (apt-get install wordnet-base)
# TORCH_INDEX  an index with CPU-only wheels, e.g. https://download.pytorch.org/whl/cpu: saves gigabytes without a GPU
PYTHON ?= python3
TORCH_INDEX ?=
WORDNET ?= /usr/share/wordnet
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt

# With more OpenMP threads than free cores torch runs tens of times slower; say OMP_NUM_THREADS=8 make demo to use more.
OMP_NUM_THREADS ?= 1
export OMP_NUM_THREADS
export TOKENIZERS_PARALLELISM = false

.PHONY: demo train-demo test pytest slow lint format clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/iedit demo

train-demo: $(VENV)/.installed-train
	$(BIN)/iedit train renders --out train-demo/renders --n 2000
	$(BIN)/iedit train pairs train-demo/renders --out train-demo/pairs --clip picturebook --masks own --size 128 \
		--candidates 16 --wordnet $(WORDNET) --show 8
	$(BIN)/iedit train finetune --pairs train-demo/pairs --out train-demo/run --losses mask,global,local \
		--steps 100 --batch 4 --processes 2 --no-gradient-checkpointing --save-every 50 --sample-every 50
	@echo "edits before and after: train-demo/run/samples/step-000100.png"

# What lint finds stands between the lines of pytest: mypy takes a core for a minute, which would be idle before or after.
test: $(VENV)/.installed-test
	@$(MAKE) --no-print-directory --jobs=2 lint pytest

pytest: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m "not slow and not gpu" -q -n 2 --dist worksteal

slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m "slow and not gpu" -q

lint: $(VENV)/.installed-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	PYTHONPATH=.types $(BIN)/lint-imports

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# The stamps make a second call free: pip runs again only when the requirements changed.
$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "iedit needs Python 3.11 or newer: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing into $(VENV) (the first time this downloads torch)"
	$(PIP) torch==2.13.0 $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-train: $(VENV)/.installed
	$(PIP) -e ".[train]"
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) -e ".[test]"
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache demo train-demo
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
