# Every target works on a fresh clone: the first one makes the virtual environment and installs the project into it.
# A later one installs again only if pyproject.toml has changed since. For another PYTHON, `make clean` or name a VENV.

PYTHON ?= python3
VENV   ?= .venv
EXTRAS ?= tests,examples,benchmarks
PRESET ?=
BENCH  ?= attention
ARGS   ?=

comma := ,
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))

# The tests extra carries libtpu for its compiler. Where there is no accelerator, say so, or JAX lets it look for one.
ifeq ($(wildcard /dev/accel* /dev/vfio/* /dev/nvidia* /dev/kfd /dev/dxg),)
export JAX_PLATFORMS ?= cpu
endif

.DEFAULT_GOAL := help
.PHONY: help install train test lint bench clean

help:  ## this list
	@echo "make TARGET [PYTHON=python3] [VENV=.venv] [EXTRAS=tests,examples,benchmarks] [ARGS='...']"
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-8s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: $(STAMP)  ## make the virtual environment; EXTRAS=...,cuda or EXTRAS=...,tpu for a chip

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "jflash needs Python 3.11 or newer; say which with make PYTHON=...")'
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)  # over another Python's environment it would make a mixture
	$(BIN)/python -m pip install -qq --disable-pip-version-check -e ".[$(EXTRAS)]"
	@touch $@

train: $(STAMP)  ## train the example GPT; PRESET=name, ARGS='...' for anything else
	$(BIN)/python examples/gpt/train.py $(if $(PRESET),--preset $(PRESET)) $(ARGS)

test: $(STAMP)  ## run the tests; ARGS='-m "not slow"' for the quick part, ARGS='-n 0 -x tests/test_x.py' for one file
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal $(ARGS)

lint: $(STAMP)  ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(STAMP)  ## time attention, or BENCH=regression, block_sparse, io_ledger, memory; ARGS='--lengths 1024,4096' and the like
	$(BIN)/python -m benchmarks.$(BENCH) $(ARGS)

clean:  ## remove virtual environments and everything built
	rm -rf .venv .venv-new .venv-wheel $(VENV) build dist ./*.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
