# Every target works on a fresh clone: the first one makes the virtual environment and installs the project into it.
# A later one installs again only if pyproject.toml has changed since. For another PYTHON, `make clean` or name a VENV.

PYTHON ?= python3
VENV   ?= .venv
JAX    ?=
EXTRAS ?= tests,examples,benchmarks
PRESET ?=
BENCH  ?= attention
ARGS   ?=

comma := ,
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))

# The tests extra carries compilers for TPUs and GPUs. Where there is no accelerator, say so, or JAX lets them look for one.
ifeq ($(wildcard /dev/accel* /dev/vfio/* /dev/nvidia* /dev/kfd /dev/dxg),)
export JAX_PLATFORMS ?= cpu
endif

.DEFAULT_GOAL := help
.PHONY: help install train test test-gpu lint bench clean

help:  ## this list
	@echo "make TARGET [PYTHON=python3] [VENV=.venv] [EXTRAS=tests,examples,benchmarks] [ARGS='...']"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-8s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

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

test-gpu: .venv-gpu/.installed-$(JAX)  ## run the tests of GPU kernels with another JAX: PYTHON=python3.12 JAX=0.11.2
	JFLASH_REQUIRE_CUDA_COMPILER=1 .venv-gpu/bin/python -m pytest -n auto --maxprocesses 8 --dist worksteal -m gpu $(ARGS)

.venv-gpu/.installed-$(JAX): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12) and "GPU kernels need Python 3.12 or newer; say which with make PYTHON=...")'
	test -x .venv-gpu/bin/pip || $(PYTHON) -m venv .venv-gpu
	rm -f .venv-gpu/.installed-*
	.venv-gpu/bin/python -m pip install -qq --disable-pip-version-check -e ".[tests]" \
	  $(if $(JAX),$(foreach package,jax jaxlib jax-cuda13-plugin jax-cuda13-pjrt,$(package)==$(JAX)))
	@touch $@

lint: $(STAMP)  ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(STAMP)  ## time attention, or BENCH=regression, block_sparse, io_ledger, memory, tpu_static, gpu; ARGS='--lengths 1024,4096', '--goals' and the like
	$(BIN)/python -m benchmarks.$(BENCH) $(ARGS)

clean:  ## remove virtual environments and everything built
	rm -rf .venv .venv-new .venv-wheel .venv-gpu $(VENV) build dist ./*.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
