# jaxformer: `make train` and `make test` need only git, make and Python >= 3.11.
#
#   PYTHON  the interpreter a new VENV is made from  make test PYTHON=python3.12 VENV=.venv312
#   VENV    where the environment lives, else .venv
#   PRESET  what `make train` trains                 make train PRESET=text
#   LESSON  which lessons, else all                  make lessons LESSON=7
#   ARGS    passed on to train.py, pytest, aot or    make test ARGS="-k attention"
#           the benchmarks

PYTHON ?= python3
VENV   ?= .venv
LOCK   ?= requirements.lock
PRESET ?= g2p
LESSON ?=
ARGS   ?=

# The first Python 3.12 that really runs: a pyenv shim may be on PATH and not.
PYTHON_312 ?= $(shell for python in python3.12 $$(pyenv root 2>/dev/null)/versions/3.12*/bin/python; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null && echo "$$python" && break; done)

BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
CODE  := jaxformer kernels lessons tests benchmarks train.py

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

.DEFAULT_GOAL := help
.PHONY: help train test lessons bench bench-full lint format types aot-tpu aot-h100 plan-check kernel-table test-mosaic-gpu lock clean .venv

help: ## list what make can do
	@grep -hE '^[a-z0-9.-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-15s %s\n", $$1, $$2}'

train: $(STAMP) ## train the spelling-to-pronunciation model (PRESET=..., ARGS="--train.steps 500")
	@$(BIN)/python train.py $(PRESET) $(ARGS)

# The tests of a file share runs and compiled functions, so a worker takes whole files.
test: $(STAMP) ## run the whole test suite (ARGS="-m 'not slow'" for the quick part)
	@$(BIN)/python -m pytest -q -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder $(ARGS)

# Builds whatever VENV names.
.venv: $(STAMP) ## create the environment, nothing else
	@:

lessons: $(STAMP) ## measure and write the pages of docs/lessons (LESSON="6 7", ARGS=--render)
	@$(BIN)/python -m lessons $(LESSON) $(ARGS)

# Competitors are no dependencies: without them their rows are left out.
run_benchmarks = $(BIN)/python -c 'import importlib.util as u, sys; sys.exit(not (u.find_spec("torch") and u.find_spec("transformers")))' || \
		echo "$@: without PyTorch and transformers; to add them: $(BIN)/python -m pip install 'torch>=2.13' 'transformers>=5'"; \
	for part in $(1); do \
		echo "$@: $$part"; $(BIN)/python -m benchmarks.$$part $(ARGS) || exit 1; \
	done; \
	$(BIN)/python -m benchmarks.performance; $(BIN)/python -m benchmarks.report

bench: $(STAMP) ## measure speed on this machine, in minutes, and write benchmarks/results/report.html
	@$(call run_benchmarks,kernels train decode data)

bench-full: $(STAMP) ## the same at every shape and precision, with growth curves: hours
	@$(call run_benchmarks,"kernels --budget-seconds 3600" "kernels --lengths 256 512 1024 2048 4096 8192" \
		"train --shape all" "train --growth all" "decode --full" data)

lint: $(STAMP) ## ruff: rules and format, changing nothing
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check

format: $(STAMP) ## ruff: mend what it can and format
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

types: $(STAMP) ## type-check both packages
	@$(BIN)/ty check --python $(VENV)

# $(1): the environment, $(2): its lock file.
make_env = test -n "$(PYTHON_312)" || { \
		echo "make $@: needs Python 3.12, on PATH, under pyenv, or named: make $@ PYTHON_312=/path/to/python3.12" >&2; exit 1; }; \
	$(MAKE) --no-print-directory .venv PYTHON="$(PYTHON_312)" VENV=$(1) LOCK=$(2) ARGS=

# Each in an environment of its own, of Python 3.12: jax with the TPU's compiler, and the jax whose
# Mosaic GPU interpreter is complete, with NVIDIA's compiler. Neither needs the hardware.
aot-tpu: ## compile every kernel for v5e, v5p and v6e, without a TPU (ARGS=--small)
	@$(call make_env,.venv-aot-tpu,requirements-aot-tpu.lock)
	@PYTHONPATH=.:kernels .venv-aot-tpu/bin/python -m benchmarks.aot tpu $(ARGS)

aot-h100: ## compile every kernel to sm_90a machine code, without a GPU (ARGS=--small)
	@$(call make_env,.venv-aot-h100,requirements-aot-h100.lock)
	@PYTHONPATH=.:kernels .venv-aot-h100/bin/python -m benchmarks.aot h100 $(ARGS)

plan-check: ## plan a small training step with the compilers of TPU and H100, without either
	@$(call make_env,.venv-aot-tpu,requirements-aot-tpu.lock)
	@.venv-aot-tpu/bin/python -m pytest -q -n 0 tests/plan/test_compilers.py $(ARGS)
	@$(call make_env,.venv-aot-h100,requirements-aot-h100.lock)
	@.venv-aot-h100/bin/python -m pytest -q -n 0 tests/plan/test_compilers.py $(ARGS)

test-mosaic-gpu: ## run the Mosaic GPU kernels in their interpreter
	@$(call make_env,.venv-aot-h100,requirements-aot-h100.lock)
	@NPROC=16 .venv-aot-h100/bin/python -m pytest -q -n logical --maxprocesses 8 -m mosaic_gpu tests/kernels $(ARGS)

kernel-table: ## measure errors and write the table of kernels/README.md, after both aot targets
	@$(call make_env,.venv-aot-h100,requirements-aot-h100.lock)
	@NPROC=16 JAX_PLATFORMS=cpu PYTHONPATH=.:kernels .venv-aot-h100/bin/python -m benchmarks.accuracy
	@PYTHONPATH=.:kernels .venv-aot-h100/bin/python -m benchmarks.aot.table

# The lock holds names, versions, hashes and markers for every supported Python and
# platform at once; it names no address, so it installs from whatever index pip is given.
lock: ## resolve pyproject.toml anew into the lock files
	@uv=$$(command -v uv) || { $(MAKE) --no-print-directory .cache/uv/bin/uv && uv=.cache/uv/bin/uv; }; \
	$$uv pip compile --quiet --no-config --upgrade --universal --python-version 3.11 --extra dev \
		--generate-hashes --no-annotate \
		--custom-compile-command "make lock" --output-file requirements.lock pyproject.toml
	@uv=$$(command -v uv) || uv=.cache/uv/bin/uv; for group in aot-tpu aot-h100; do \
		$$uv pip compile --quiet --no-config --upgrade --group $$group --python-version 3.12 \
			--python-platform x86_64-manylinux_2_31 --generate-hashes --no-annotate \
			--custom-compile-command "make lock" --output-file requirements-$$group.lock \
			pyproject.toml; \
	done
	@for file in requirements*.lock; do echo "$$file: $$(grep -c '^[a-z0-9]' $$file) pinned packages"; done

.cache/uv/bin/uv:
	@$(PYTHON) -m venv .cache/uv && .cache/uv/bin/python -m pip install -qq uv

clean: ## remove the environments and caches, never a run
	rm -rf .venv* .cache .pytest_cache .ruff_cache .hypothesis build dist
	find $(wildcard $(CODE)) -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is removed first and written last: an install cut short starts over from an
# empty environment, because pip takes a half-copied package for an installed one.
$(STAMP): $(LOCK) pyproject.toml
	@command -v "$(PYTHON)" >/dev/null || { \
		echo "make: $(PYTHON): no such program. Install Python 3.11 or newer, or name yours: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "make: $$("$(PYTHON)" --version 2>&1) is too old, jaxformer needs 3.11 or newer. Name one: make PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "make: $(PYTHON) lacks the venv module. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@if [ ! -e $(STAMP) ]; then \
		echo "$(VENV): new environment, $$("$(PYTHON)" --version)"; \
		"$(PYTHON)" -m venv --clear $(VENV); \
	fi
	@rm -f $(STAMP)
	@echo "$(VENV): installing the packages pinned in $(LOCK) (a minute or two the first time)"
	@$(BIN)/python -m pip install -qq --require-hashes -r $(LOCK)
	@[ $(LOCK) != requirements.lock ] || $(BIN)/python -m pip install -qq --no-deps --no-build-isolation --editable .
	@touch $(STAMP)
	@$(BIN)/python -c 'from importlib.metadata import version as v; import platform as p; print("$(VENV): ready: Python", p.python_version(), "jax", v("jax"))'
