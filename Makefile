# The one list of commands. A fresh machine needs two: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE := 1

.PHONY: help setup browser demo demo-server hybrid test test-asan test-tsan prove lint format types docs bench lock audit clean

help:            ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

$(VENV)/.venv-made:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check --upgrade pip
	# The CPU build first and by itself: any other spelling may pull gigabytes of CUDA.
	$(BIN)/python -m pip install -q torch==2.13.0
	touch $@

# The package in place, with the compiled core; again when either changes.
$(VENV)/.ready: $(VENV)/.venv-made pyproject.toml CMakeLists.txt $(shell find csrc -type f)
	$(BIN)/python -m pip install -q -e '.[dev]'
	touch $@

setup: $(VENV)/.ready  ## make the virtual environment, compile, install

browser: # Chromium, for the tests of the page
	@scripts/find_browser.sh >/dev/null

demo: setup      ## run the built-in model: coloured drafts, then a short benchmark
	$(BIN)/outdraft generate demo --max-tokens 160 </dev/null
	$(BIN)/outdraft bench demo --prompts 2 --max-tokens 64

demo-server: setup  ## serve the built-in model and its page at http://127.0.0.1:8080
	$(BIN)/outdraft serve demo

hybrid: setup    ## train a small hybrid with a head of its own (half an hour), prove and measure it
	$(BIN)/outdraft pretrain hybrid --minutes 30 --out out/hybrid
	$(BIN)/outdraft verify out/hybrid
	$(BIN)/outdraft bench out/hybrid

test: setup browser ## everything that must hold, in minutes
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	$(BIN)/pytest -n 2

test-asan: setup ## the kernels' tests with the address and undefined-behaviour sanitizers
	$(BIN)/python -m pip install -q --no-deps --upgrade --target build/asan \
	  -C cmake.define.OUTDRAFT_SANITIZE=ON -C build-dir=build/asan-objects .
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 $(BIN)/python scripts/asan_tests.py build/asan

test-tsan:       ## the thread pool with the thread sanitizer
	mkdir -p build
	$(CXX) -std=c++20 -O1 -g -fsanitize=thread -ffp-contract=off -pthread -Icsrc -o build/tsan-pool \
	  tests/csrc/thread_pool_races.cpp csrc/core/thread_pool.cpp csrc/core/program.cpp \
	  csrc/isa/portable.cpp
	TSAN_OPTIONS=halt_on_error=0:exitcode=66 build/tsan-pool

prove: setup browser ## the slow proofs
	$(BIN)/pytest -m prove -n 2 --durations=15
	# What checks input must not be an assert, which -O leaves out.
	PYTHONOPTIMIZE=1 $(BIN)/pytest -n 2 tests/server/test_security.py tests/server/test_wire.py \
	  tests/weights tests/text

lint: setup      ## style and types only
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: setup    ## rewrite to the house style
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

docs: setup      ## write docs/cli.md from the commands themselves
	$(BIN)/python scripts/cli_docs.py

bench: setup     ## the full benchmark of the demo, with transformers beside it
	$(BIN)/outdraft bench demo --json out/bench.json --peer transformers

# Tools for the supply chain, apart from what the project itself needs.
build/supply/.made:
	$(PYTHON) -m venv build/supply
	build/supply/bin/python -m pip install -q --disable-pip-version-check 'uv>=0.9' 'pip-audit>=2.9'
	touch $@

lock: build/supply/.made  ## write requirements.lock: what is needed at run time, with hashes
	build/supply/bin/python scripts/lock.py build/supply/bin/uv

audit: build/supply/.made  ## ask for advisories about the locked versions (needs the network)
	build/supply/bin/python scripts/audit.py build/supply/bin/pip-audit

clean:           ## remove what the commands above made
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis out runs
