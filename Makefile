# `make demo` and `make test` do everything on a fresh machine: environment, installation, the job itself.
#
# Variables, all of them optional, as in `make demo VENV=/path/to/venv`:
#   PYTHON    interpreter that creates the environment (3.10 or newer)
#   VENV      the environment; one that is already there is used, and its torch is kept if it is 2.11 or newer
#   TORCH     what to install where torch is missing or too old
#   PIP_ARGS  passed to every pip install, such as an index with CPU-only builds of torch
#   ARGS      passed to the script of `make demo`, `make bench` and to pytest in `make test`

PYTHON ?= python3
VENV ?= .venv
# Without a GPU the version that is tested here; with one the newest that pip finds.
ifeq ($(shell command -v nvidia-smi 2>/dev/null),)
TORCH ?= torch==2.13.0
else
TORCH ?= torch>=2.11
endif
PIP_ARGS ?=
ARGS ?=

PY := $(VENV)/bin/python
STAMP := $(VENV)/.dynamicrad-installed
DEMO_STAMP := $(VENV)/.dynamicrad-demo
comma := ,
# Fails where torch is missing or older than 2.11.
HAS_TORCH := import torch, re; assert tuple(map(int, re.findall(r'\d+', torch.__version__)[:2])) >= (2, 11)

# Torch-TensorRT gets an environment that sees the packages of the first one.
TRT_PY := $(VENV)-tensorrt/bin/python
SITE := import sysconfig; print(sysconfig.get_path('purelib'))

.DEFAULT_GOAL := help
.PHONY: help env lint test test-slow test-tensorrt docs demo bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(STAMP) ## create the environment and install the package in it

define install # the environment, torch, and the package with these extras
	@test -x $(PY) || { echo "Creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@$(PY) -c "$(HAS_TORCH)" 2>/dev/null || { echo "Installing $(TORCH)"; \
		$(PY) -m pip install --quiet $(PIP_ARGS) "$(TORCH)"; }
	@echo "Installing the package into $(VENV), with $(1)"
	@$(PY) -m pip install --quiet $(PIP_ARGS) -e ".[$(1)]"
	@touch $@
endef

$(STAMP): pyproject.toml
	$(call install,dev$(comma)diffusers)

$(DEMO_STAMP): pyproject.toml
	$(call install,demo)

lint: env ## ruff, mypy, and which room imports which
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	$(PY) .ci/arrows.py

test: env ## the tests of every change; those that need a GPU skip themselves without one
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 $(ARGS)

test-slow: env ## the tests that take long: code generation, exports, examples, fresh installations
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 -m slow $(ARGS)

test-tensorrt: env ## the tests of TensorRT that need no GPU, in an environment of their own
	@test -x $(TRT_PY) || $(PY) -m venv $(VENV)-tensorrt
	@$(PY) -c "$(SITE)" > "$$($(TRT_PY) -c "$(SITE)")/shared.pth"
	@$(TRT_PY) -m pip install --quiet $(PIP_ARGS) --no-deps -r requirements/tensorrt-cpu.txt
	OMP_NUM_THREADS=1 PYTHONPATH=. $(TRT_PY) -m pytest $(ARGS) tests/exporting/test_tensorrt.py

docs: env ## build the documentation site in outputs/site; broken links are errors
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

demo: $(DEMO_STAMP) ## explain a real model, then clips of a small one, dense beside sparse, in outputs/
	$(PY) -m dynamicrad_compile.cli explain --model wan-1.3b
	$(PY) examples/quickstart.py $(ARGS)

bench: env ## dense against block-sparse: attention alone and whole steps (half an hour on 2 cores)
	$(PY) benchmarks/cpu_step.py $(ARGS)

clean: ## remove caches, build results and outputs/; the environment stays
	rm -rf outputs build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +
