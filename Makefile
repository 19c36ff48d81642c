# jaxformer: `make train` and `make test` need only git, make and Python >= 3.11.
#
#   PYTHON  the interpreter a new VENV is made from  make test PYTHON=python3.12 VENV=.venv312
#   VENV    where the environment lives, else .venv
#   PRESET  what `make train` trains                 make train PRESET=text
#   ARGS    passed on to train.py or to pytest       make test ARGS="-k attention"

PYTHON ?= python3
VENV   ?= .venv
PRESET ?= g2p
ARGS   ?=

BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
CODE  := jaxformer kernels tests benchmarks train.py

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

.DEFAULT_GOAL := help
.PHONY: help train test lint format types lock clean .venv

help: ## list what make can do
	@grep -hE '^[a-z.]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

train: $(STAMP) ## train the spelling-to-pronunciation model (PRESET=..., ARGS="--train.steps 500")
	@$(BIN)/python train.py $(PRESET) $(ARGS)

# Neighbouring tests share compiled functions, so a worker keeps a run of them.
test: $(STAMP) ## run the whole test suite (ARGS="-m 'not slow'" for the quick part)
	@$(BIN)/python -m pytest -q -n logical --maxprocesses 8 --dist worksteal $(ARGS)

# Builds whatever VENV names.
.venv: $(STAMP) ## create the environment, nothing else
	@:

lint: $(STAMP) ## ruff: rules and format, changing nothing
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check

format: $(STAMP) ## ruff: mend what it can and format
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

types: $(STAMP) ## type-check both packages
	@$(BIN)/ty check --python $(VENV)

# The lock holds names, versions, hashes and markers for every supported Python and
# platform at once; it names no address, so it installs from whatever index pip is given.
lock: ## resolve pyproject.toml anew into requirements.lock
	@uv=$$(command -v uv) || { $(MAKE) --no-print-directory .cache/uv/bin/uv && uv=.cache/uv/bin/uv; }; \
	$$uv pip compile --quiet --no-config --upgrade --universal --python-version 3.11 --extra dev \
		--generate-hashes --no-annotate \
		--custom-compile-command "make lock" --output-file requirements.lock pyproject.toml
	@echo "requirements.lock: $$(grep -c '^[a-z0-9]' requirements.lock) pinned packages"

.cache/uv/bin/uv:
	@$(PYTHON) -m venv .cache/uv && .cache/uv/bin/python -m pip install -qq uv

clean: ## remove the environments and caches, never a run
	rm -rf .venv* .cache .pytest_cache .ruff_cache .hypothesis build dist
	find $(wildcard $(CODE)) -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is removed first and written last: an install cut short starts over from an
# empty environment, because pip takes a half-copied package for an installed one.
$(STAMP): requirements.lock pyproject.toml
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
	@echo "$(VENV): installing the packages pinned in requirements.lock (a minute or two the first time)"
	@$(BIN)/python -m pip install -qq --require-hashes -r requirements.lock
	@$(BIN)/python -m pip install -qq --no-deps --no-build-isolation --editable .
	@touch $(STAMP)
	@$(BIN)/python -c 'from importlib.metadata import version as v; import platform as p; print("$(VENV): ready: Python", p.python_version(), "jax", v("jax"), "flax", v("flax"))'
