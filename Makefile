# Every command of the project. `make` alone lists them.
PYTHON ?= python3.11
VENV   ?= .venv
BIN     = $(VENV)/bin
STAMP   = $(VENV)/.installed
COMMA   = ,
# One process a core, one thread each.
TEST_PROCESSES ?= 2
# Of the repetitions of `make soak`.
SCALE  ?= 1
# C++ and build files: a change rebuilds the native module.
NATIVE  = $(wildcard csrc/*) CMakeLists.txt pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help venv serve test lint demo bench docs perf-check soak e2e sanitize sanitize-threads clean

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
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit tests/contract tests/property tests/native -m "not soak" -n $(TEST_PROCESSES) \
		--cov=inter2former --cov-report=term --cov-fail-under=90 -q

lint: $(STAMP) ## ruff, mypy and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

demo: $(STAMP) ## three clicks on a photo: IoU and an overlay picture in out/
	$(BIN)/python -m benchmarks.demo --out out

bench: $(STAMP) ## stage times of the shipped weights, served and plain, as a table
	$(BIN)/inter2former bench --preset small

perf-check: $(STAMP) ## is the native click a tenth slower than that of BASE (a commit; the one before)?
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.perf_check $(or $(BASE),HEAD~1)

soak: $(STAMP) ## long load and kill tests, an hour; SCALE=0.02 for three minutes. Figures in out/soak.json
	SOAK_SCALE=$(SCALE) $(BIN)/python -m pytest tests -m soak -q

docs: $(STAMP) ## check that the pages' links and anchors lead somewhere
	$(BIN)/python -m pytest tests/unit/test_docs.py -q

e2e: $(STAMP) ## a real Label Studio, and its labeling page where there is a Chromium
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt playwright
	$(BIN)/python -m pytest tests/e2e -m e2e -q

# Sanitizer runtimes must be loaded before Python. libstdc++ with them, so that exceptions are seen; Python itself never
# frees everything, so leaks are not looked for.
RUNTIME = $(shell $(CXX) -print-file-name=$(1))
NATIVE_BUILD = $(BIN)/cmake -S . -B build/$(1) -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DI2F_WERROR=ON \
	-DI2F_SANITIZE=$(1) -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
	-Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) && $(BIN)/cmake --build build/$(1)

sanitize: $(STAMP) ## native tests under the address and undefined-behaviour sanitizers
	$(call NATIVE_BUILD,address$(COMMA)undefined)
	LD_PRELOAD="$(call RUNTIME,libasan.so) $(call RUNTIME,libubsan.so) $(call RUNTIME,libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=1 \
	$(BIN)/python -m tests.native.with_module build/address,undefined/_native*.so tests/native -q

sanitize-threads: $(STAMP) ## the native thread pool under the thread sanitizer
	$(call NATIVE_BUILD,thread)
	LD_PRELOAD="$(call RUNTIME,libtsan.so)" OMP_NUM_THREADS=1 \
	TSAN_OPTIONS="die_after_fork=0 halt_on_error=0 suppressions=$(CURDIR)/tests/native/tsan.supp" \
	$(BIN)/python -m tests.native.with_module build/thread/_native*.so tests/native/test_threads.py -q

clean: ## remove what was built; the environment stays
	rm -rf build dist out .pytest_cache .mypy_cache .ruff_cache .coverage
