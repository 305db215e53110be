# `make demo` merges two demo checkpoints, `make test` runs the tests. Both set everything up first.

PYTHON ?= python3
VENV ?= .venv
# Where PyPI's Linux wheel would bring gigabytes of CUDA along, take PyTorch's CPU wheel instead:
#     make test TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
# This pin is for working on sdops; the package itself takes any torch from 2.4 on.
TORCH ?= torch==2.13.0
BENCH ?= bench-data
BENCH_OPTIONS ?=

BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help setup demo test test-slow test-gpu check fix bench bench-embed bench-gpu bench-product bench-train clean

help:
	@echo "make demo        set up, make two small checkpoints and merge them"
	@echo "make test        set up and run the tests"
	@echo "make check       formatting, lint, types, import layers"
	@echo "make fix         format and repair what can be repaired by itself"
	@echo "make test-slow   tests that take minutes or gigabytes of disk"
	@echo "make test-gpu    tests that need a CUDA device"
	@echo "make bench       full-size benchmarks into $(BENCH)/, one after another: hours, and 60 GB for merges alone"
	@echo "make bench-NAME  one of them: apply, convert, embed, lora, merge, recipe, sweep; with BENCH_OPTIONS=..."
	@echo "make bench-train training steps, on a CUDA device"
	@echo "make bench-gpu   every kernel on a CUDA device, eight minutes"
	@echo "make clean       remove what the others made, except $(VENV)/"

setup: $(READY)

# torch comes first and alone, so that its options do not reach the other packages.
$(READY): pyproject.toml hatch_build.py $(wildcard sdops/core/*.c sdops/core/*.h)
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "sdops needs Python 3.11 or later: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable . --group dev
	@touch $@

demo: setup
	$(BIN)/python fixtures/make.py demo --output demo
	$(BIN)/sdops merge demo/photo.safetensors demo/painting.safetensors --alpha 0.3 --output demo/merged.safetensors --force
	$(BIN)/sdops inspect demo/merged.safetensors

test: setup
	$(BIN)/python -m pytest -n 2

test-slow: setup
	$(BIN)/python -m pytest -m "slow and not gpu"

test-gpu: setup
	$(BIN)/python -m pytest -m gpu

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fix: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: bench-merge bench-apply bench-convert bench-lora bench-recipe bench-sweep bench-embed bench-product

bench-embed: setup
	mkdir -p $(BENCH)
	$(BIN)/python tools/bench_embed.py $(BENCH) $(BENCH_OPTIONS)

bench-product: setup
	$(BIN)/python tools/bench_product.py $(BENCH_OPTIONS)

bench-train: setup
	$(BIN)/python tools/bench_train.py $(BENCH_OPTIONS)

bench-gpu: setup
	$(BIN)/python kernels/benchmarks/bench_all.py --output $(BENCH)/gpu $(BENCH_OPTIONS)

bench-%: setup
	$(BIN)/python tools/bench_$*.py --folder $(BENCH) $(BENCH_OPTIONS)

clean:
	rm -rf demo $(BENCH) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
