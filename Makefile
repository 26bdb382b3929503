# Each target does all the set-up that it needs, in .venv, once.

PYTHON ?= python3
PROMPT ?= a red apple
export PROMPT

# make would expand a $ in the prompt: take the value as it was typed.
override PROMPT := $(value PROMPT)

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt

MAKEFLAGS += --no-print-directory
.SILENT:
.DEFAULT_GOAL := help
.PHONY: help image test check format clean

help: ## Say what there is to make
	grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1|/' | awk -F'|' '{ printf "  make %-8s %s\n", $$1, $$2 }'

image: $(VENV)/base ## Draw a picture: make image PROMPT="a red apple"
	$(BIN)/instaflow generate "$$PROMPT"

test: $(VENV)/all ## Run the tests
	$(BIN)/pytest -q

check: $(VENV)/all ## Lint, format, types and layers, as CI does
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(VENV)/all ## Rewrite the sources in the house format
	$(BIN)/ruff check --fix-only --quiet
	$(BIN)/ruff format

clean: ## Remove .venv and the caches; data and runs stay
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache dist
	find src tests examples -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "InstaFlow needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/base: pyproject.toml constraints.txt | $(BIN)/python
	echo "Setting up $(VENV) (some minutes, once)" >&2
	$(PIP) --editable .
	touch $@

$(VENV)/all: pyproject.toml constraints.txt | $(BIN)/python
	echo "Setting up $(VENV) with the tools for development (some minutes, once)" >&2
	$(PIP) --editable '.[train,eval,dev]'
	$(PIP) --no-deps torch-fidelity # without the torchvision that it asks for and we do not use
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true # the tests start a hundred processes, and each would compile
	touch $@ $(VENV)/base
