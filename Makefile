# Every command of the project. `make` alone lists them.
PYTHON ?= python3.11
VENV   ?= .venv
BIN     = $(VENV)/bin
STAMP   = $(VENV)/.installed
# C++ and build files: a change rebuilds the native module.
NATIVE  = $(wildcard csrc/*) CMakeLists.txt pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help venv serve test lint demo bench e2e sanitize soak perf-check docs clean

help: ## list the commands
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /\1\t/' | expand -t 14

venv: $(STAMP) ## the environment alone: dependencies and the native module, in .venv

$(STAMP): $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt scikit-build-core pybind11 cmake ninja
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[server,train,dev]"
	touch $(STAMP)

serve: $(STAMP) ## the Label Studio backend on port 9090
	$(BIN)/python -m backends.label_studio --port 9090

test: $(STAMP) ## unit, contract, property and native tests
	$(BIN)/python -m pytest tests/unit tests/contract tests/property tests/native --cov=inter2former --cov-report=term --cov-fail-under=90 -q

lint: $(STAMP) ## ruff, mypy and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

demo: $(STAMP) ## three clicks on a photo: IoU and an overlay picture in out/
	$(BIN)/python -m benchmarks.demo --out out

clean: ## remove what was built; the environment stays
	rm -rf build dist out .pytest_cache .mypy_cache .ruff_cache .coverage
