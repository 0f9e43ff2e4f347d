# Everything runs in a virtual environment of its own. Another Python: make test PYTHON=python3.12
PYTHON ?= python3
VENV ?= .venv
IN := $(VENV)/bin
PIP := $(IN)/python -m pip install --quiet --disable-pip-version-check
SOURCES := src scripts tests

.DELETE_ON_ERROR:
.PHONY: help demo test check fix engine clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile | expand -t 16

demo: $(VENV)/.demo  ## install llmkit and see it at work on a small model
	$(IN)/llmkit demo

# a process for each core, a file of tests at a time; every test computes with one thread
PARALLEL := -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: $(VENV)/.test  ## run all the tests, the slow ones too
	$(IN)/python -m pytest $(PARALLEL) -m "not network"

check: $(VENV)/.test  ## format, lint, types and the quick tests: before every commit
	$(IN)/ruff format --check $(SOURCES)
	$(IN)/ruff check $(SOURCES)
	$(IN)/mypy
	$(IN)/python -m pytest $(PARALLEL) -m "not slow and not network"

fix: $(VENV)/.test  ## let ruff put format and simple findings right
	$(IN)/ruff check --fix $(SOURCES)
	$(IN)/ruff format $(SOURCES)

engine: $(VENV)/.made  ## build the engine anew, e.g. CMAKE_ARGS="-DGGML_CUDA=ON" make engine
	$(IN)/python scripts/build_engine.py --python $(IN)/python
	@touch $(VENV)/.engine

clean:  ## remove the virtual environment and what tools left
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

# ── what the above stand on; a stamp says that a step is done ──

$(VENV)/.demo: $(VENV)/.engine pyproject.toml
	$(PIP) -e '.[demo]'
	@touch $@

$(VENV)/.test: $(VENV)/.engine pyproject.toml
	$(PIP) -e '.[demo,test,dev]'
	@touch $@ $(VENV)/.demo

$(VENV)/.engine: $(VENV)/.made scripts/build_engine.py
	$(IN)/python scripts/build_engine.py --python $(IN)/python
	@touch $@

# Debian splits the venv module off Python: install it when we may, else say how
$(VENV)/.made:
	@if [ $(PYTHON) = python3 ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
		&& ! python3 -c 'import ensurepip, venv' 2>/dev/null; then \
		echo "Installing python3-venv, which making a virtual environment needs"; \
		apt-get update -qq && apt-get install -y --no-install-recommends python3 python3-venv; \
	fi
	@command -v $(PYTHON) >/dev/null \
		|| { echo "There is no '$(PYTHON)' here. Name one: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "llmkit needs Python 3.10 or newer; $$($(PYTHON) -V 2>&1) is too old. Name another: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo "$(PYTHON) lacks the venv module. On Debian and Ubuntu: sudo apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@
