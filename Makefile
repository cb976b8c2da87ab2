# Two commands do everything on a fresh clone: `make demo` and `make test`.
# `make help` lists all of them. Recipes longer than a line live in scripts/.

SHELL := bash
VENV ?= .venv
VENV_NEWEST ?= .venv-newest
PROMPT ?= Why is the sky blue?
# As it was typed: make would take `$HOME` for its variable `$H`, followed by OME.
override PROMPT := $(value PROMPT)
export PROMPT

.DEFAULT_GOAL := help
.PHONY: help demo test lint test-newest

help:
	@echo 'make demo         set up $(VENV), fetch the default model (98 MB) and answer a prompt;'
	@echo '                  PROMPT="…" asks something else'
	@echo 'make test         set up $(VENV) for development and run all tests;'
	@echo '                  ARGS="tests/ops -k decode" chooses some, WORKERS=4 the processes'
	@echo 'make lint         ruff, formatting, types, and the examples in docstrings and documents'
	@echo 'make test-newest  run the tests of the ops, and of what needs JAX 0.12, in $(VENV_NEWEST)'
	@echo '                  with the newest JAX allowed'
	@echo
	@echo 'All are safe to repeat. PYTHON=/path/to/python names the Python to use (3.12 or newer).'

demo: $(VENV)/.installed-run
	@scripts/demo.sh $(VENV)

test: $(VENV)/.installed-dev
	@scripts/test.sh $(VENV) $(ARGS)

lint: $(VENV)/.installed-dev
	@scripts/lint.sh $(VENV)

test-newest:
	@scripts/install.sh $(VENV_NEWEST) newest
	@scripts/test.sh $(VENV_NEWEST) tests/ops tests/sharding/test_collective_group.py $(ARGS)

# One stamp per set of packages: `run` for the library, `dev` for tests and checks as well.
$(VENV)/.installed-%: pyproject.toml constraints.txt
	@scripts/install.sh $(VENV) $*
	@touch $@
