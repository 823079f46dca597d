# Every target sets up what it needs: a virtual environment in .venv, the package and its pinned dependencies.

PYTHON ?= python3
VENV ?= .venv
# PyTorch's package index, for machines where the pinned torch would bring a CUDA build:
#   make test TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
# Anything else for pip, such as a proxy or an index.
PIP_ARGS ?=
# A downloaded or already resharded checkpoint, or its address; the embedded demo model when empty.
MODEL ?=
# Somebody who wrote MODEL= meant a model of their own, as with a variable that was not set.
ifeq ($(origin MODEL)$(strip $(MODEL)),command line)
$(error MODEL is empty: give the folder of a checkpoint, or leave MODEL out for the embedded model)
endif
# Where MODEL is resharded to; beside it when empty.
OUT ?=
PROMPT ?= def read_lines(path
TOKENS ?= 60

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_ARGS) \
	$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

export MODEL OUT PROMPT TOKENS

.DEFAULT_GOAL := help
.PHONY: help install run-inference test check fmt clean

help: ## Show the targets
	@echo "make run-inference   reshard the embedded model, inspect it, generate text"
	@echo "                     MODEL=/path/to/checkpoint  a downloaded or resharded one instead, or an address"
	@echo "                     OUT=/path  where it is resharded to (default: beside it, with -experts; an"
	@echo "                     address is run where it is)"
	@echo "                     PROMPT='...'  TOKENS=60"
	@echo "make test            the full test suite"
	@echo "make check           lint, types, import contracts"
	@echo "make install         the commands alone, in $(VENV)/bin"
	@echo "make fmt             format the sources"
	@echo "make clean           remove $(VENV), build/, the compiled library and caches"
	@echo "TORCH_INDEX=https://download.pytorch.org/whl/cpu chooses PyTorch's CPU build; PIP_ARGS=... goes to pip"

# The stamps hold what was installed, so a changed requirement installs again and an unchanged one costs nothing.
$(VENV)/.base: pyproject.toml constraints.txt $(wildcard runner/native/*)
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -e '.[hub]'
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	$(INSTALL) -e '.[dev]'
	@touch $@

install: $(VENV)/.base

# The whole road: reshard once, inspect, generate.
run-inference: $(VENV)/.base
	@set -eu; model=$${MODEL%/}; out=$$OUT; \
	if [ -z "$$model" ]; then \
	    model=$$($(BIN)/python -c 'from runner import demo; print(demo.path())'); \
	    [ -n "$$out" ] || { out=build/demo-experts; rm -rf "$$out"; }; \
	fi; \
	case "$$model" in *://*) is_far=yes;; *) is_far=;; esac; \
	if [ -f "$$model/manifest.json" ] || [ -n "$$is_far" -a -z "$$out" ]; then \
	    out=$$model; \
	else \
	    $(BIN)/reshard run "$$model" "$${out:=$$model-experts}"; \
	fi; \
	$(BIN)/manifests show "$$out"; \
	printf '\n%s' "$$PROMPT"; \
	$(BIN)/runner generate -m "$$out" -p "$$PROMPT" -n "$$TOKENS"

test: $(VENV)/.dev
	$(BIN)/python -m pytest

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict -p manifests -p reshard
	$(BIN)/mypy -p runner
	$(BIN)/lint-imports --no-cache

fmt: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -f runner/_native*.so
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
