# Every target does the set-up it needs: an own virtual environment in .venv, installed from the
# pins of constraints.txt. The stamp file makes that happen once, and again when a pin changes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt
# One thread per test process: `make test` runs two of them.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
STRESS_XML := .pytest_cache/stress.xml

.DEFAULT_GOAL := help
.PHONY: help setup format lint test stress gpu demo map clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv and install everything pinned

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python %d.%d is too old. Allowed: 3.11 or newer. Name one, for example: make PYTHON=python3.12 $(or $(MAKECMDGOALS),setup)" % sys.version_info[:2])'
	@echo "Installing into $(VENV) (once; about a minute after the downloads)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) setuptools
	@$(PIP_INSTALL) --no-build-isolation --editable '.[dev]'
	@touch $@

format: $(STAMP) ## rewrite the code in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lint: $(STAMP) ## style, types, import layers, size limits, generated pages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python tools/check_limits.py
	$(BIN)/python tools/check_architecture.py
	$(BIN)/python tools/file_map.py --check
	$(BIN)/python tools/results_page.py --check

test: lint ## lint, then all tests but the stress tests
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 -q

stress: $(STAMP) ## the long tests; writes tests/stress_result.txt
	@rm -f $(STRESS_XML)
	@status=0; \
	$(ONE_THREAD) $(BIN)/python -m pytest -m stress --junitxml=$(STRESS_XML) || status=$$?; \
	$(BIN)/python tools/stress_result.py $(STRESS_XML) tests/stress_result.txt && exit $$status

gpu: $(STAMP) ## the tests that need an accelerator
	$(BIN)/python -m pytest tests/gpu

demo: $(STAMP) ## train two small models in fp32 and in auto, and compare
	$(BIN)/deepseek-mp demo

map: $(STAMP) ## write the file map into ARCHITECTURE.md
	$(BIN)/python tools/file_map.py

results: $(STAMP) ## write docs/results.md from benchmarks/results
	$(BIN)/python tools/results_page.py

clean: ## remove .venv and everything the tools made
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
