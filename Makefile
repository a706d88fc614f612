# boa-edge: every target sets up what it needs first.
#   make export DEVICE=arm64 MODEL=<dir | hub id | file.gguf> RECIPE=<name | file> OUT=<dir>

.DEFAULT_GOAL := help
.PHONY: help setup export test lint bench bench-accuracy bench-runtimes clean
SHELL := /bin/sh

# The first Python from 3.11 on; PYTHON=... chooses another.
ifndef PYTHON
PYTHON := $(shell for p in python3 python3.11 python3.12 python3.13; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)
endif
BIN := .venv/bin

DEVICE ?= arm64
MODEL ?= default
RUNTIME ?= onnx
# The shell reads these from its environment, so that any character may stand in a path.
export DEVICE MODEL RECIPE RUNTIME CONTEXT OUT CALIBRATION ACCELERATOR TEXT PYTEST_ARGS BENCH_ARGS

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' Makefile

setup: ## .venv, system packages, the ARM64 libraries and the runners; a second run does nothing
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or later on PATH; install one or pass PYTHON=..." >&2; exit 1; }
	@"$(PYTHON)" scripts/setup.py

export: setup ## quantize, lower, run on DEVICE (default arm64) and report; MODEL, RECIPE, RUNTIME (onnx, executorch, all), OUT, CALIBRATION, ACCELERATOR
	@$(BIN)/boa-edge run --model "$$MODEL" --device "$$DEVICE" --runtime "$$RUNTIME" \
		$${RECIPE:+--recipe "$$RECIPE"} $${CONTEXT:+--context "$$CONTEXT"} $${OUT:+--out "$$OUT"} $${CALIBRATION:+--calibration "$$CALIBRATION"} $${ACCELERATOR:+--accelerator "$$ACCELERATOR"}

test: ## everything the tests need, then all tests (PYTEST_ARGS adds to them)
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or later on PATH; install one or pass PYTHON=..." >&2; exit 1; }
	@"$(PYTHON)" scripts/setup.py --tests
	@PATH="$${BOA_EDGE_CACHE:-$(CURDIR)/.cache}/system/chromium/bin:$$PATH" $(BIN)/python -m pytest $(PYTEST_ARGS)

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench-accuracy: setup ## ours and other quantizers side by side: CALIBRATION=<text file> TEXT=<held-out text file>, OUT, MODEL
	@test -n "$$CALIBRATION" -a -n "$$TEXT" || { echo "make: name two text files: make bench-accuracy CALIBRATION=<file> TEXT=<file>" >&2; exit 2; }
	@$(BIN)/python -m benchmarks.accuracy --model "$$MODEL" --calibration "$$CALIBRATION" --text "$$TEXT" \
		-o "$${OUT:-docs/benchmarks}" $$BENCH_ARGS

bench-runtimes: setup ## speed, memory, size and KL beside other runtimes: TEXT=<held-out text file> and CHECKPOINT=<dir> or CALIBRATION=<text file>
	@test -n "$$TEXT" || { echo "make: name a text file: make bench-runtimes TEXT=<file> CHECKPOINT=<dir>" >&2; exit 2; }
	@$(BIN)/python -m benchmarks.runtimes --model "$$MODEL" $${CHECKPOINT:+--checkpoint "$$CHECKPOINT"} \
		$${CALIBRATION:+--calibration "$$CALIBRATION"} --text "$$TEXT" -o "$${OUT:-docs/benchmarks}" $$BENCH_ARGS

bench: bench-accuracy ## bench-accuracy

clean: ## what was built and fetched here: .venv, .cache, out
	rm -rf .venv .cache out build *.egg-info .pytest_cache .mypy_cache .ruff_cache
