# Everything runs in a virtual environment that is made on first use. Later runs install again only
# after pyproject.toml or constraints.txt has changed.
#
#   make demo                     convert the example checkpoint and show what came of it
#   make test                     run the tests         make test ARGS="-k writer"
#   make lint                     run every check that is not a test
#   make fmt | wheel | clean      format the code | build dist/*.whl | remove what make made

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
RUNTIME := $(VENV)/.installed-runtime
DEVELOP := $(VENV)/.installed-develop
INPUTS := pyproject.toml constraints.txt $(BIN)/python

define install
@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '$(WHAT)'
@touch $@
endef

# One process a core, each module in one of them, in the order of the folders: the slow ones first.
WHOLE_SUITE := --numprocesses auto --maxprocesses 8 --dist loadscope --no-loadscope-reorder

.PHONY: demo test lint fmt wheel clean
.DELETE_ON_ERROR:

demo: $(RUNTIME)
	$(BIN)/kimi-convert demo $(ARGS)

test: $(DEVELOP)
	$(BIN)/python -m pytest $(or $(ARGS),$(WHOLE_SUITE))

lint: $(DEVELOP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports --no-logo
	$(BIN)/codespell

fmt: $(DEVELOP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(BIN)/python
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) dist .pytest_cache .ruff_cache .import_linter_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "kimi-convert needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv --clear $(VENV)

$(RUNTIME): WHAT := .
$(RUNTIME): $(INPUTS)
	$(install)

$(DEVELOP): WHAT := .[dev,onnx,oracles,ray]
$(DEVELOP): $(INPUTS)
	$(install)
	@touch $(RUNTIME)
