# Two commands are all that a newcomer needs: `make demo` and `make test`. Both work offline once installed.

PYTHON ?= python3
BIN := .venv/bin
# Alone and first, so that a wheel that is already on disk is taken before the resolver looks further.
TORCH := $(shell grep '^torch==' .ci/constraints.txt)
PIP := $(BIN)/python -m pip --disable-pip-version-check install -c .ci/constraints.txt
SOURCES := pyproject.toml .ci/constraints.txt $(wildcard fedmm/native/kernels.*c)

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint bench bench-add bench-gpu results clean

help:
	@echo "make demo      compare FedAvg, FedCMI and CMSFed on real data; the report lies in runs/demo"
	@echo "make test      run the tests and the linters"
	@echo "make test-all  run the slow tests too"
	@echo "make lint      run the linters alone"
	@echo "make bench     time rounds against a bare loop, Flower and pfl (its main part takes 11 minutes; experiments/results/bench)"
	@echo "make bench-add go on with a benchmark of the same code that was interrupted"
	@echo "make bench-gpu time stacked clients on a GPU, where there is one"
	@echo "make results   rebuild experiments/results (hours; can be interrupted and resumed)"
	@echo "make clean     remove runs, caches and .venv"

demo: .venv/run.stamp
	$(BIN)/fedmm compare experiments/configs/demo.yaml --out runs/demo

test: .venv/dev.stamp
	$(BIN)/pytest -m "not slow" -n 2 --dist loadfile
	@$(MAKE) --no-print-directory lint

test-all: .venv/dev.stamp
	$(BIN)/pytest
	@$(MAKE) --no-print-directory lint

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/run.stamp
	$(BIN)/python -m experiments.bench

bench-add: .venv/run.stamp
	$(BIN)/python -m experiments.bench --add

bench-gpu: .venv/run.stamp
	$(BIN)/python -m experiments.bench --gpu

results: .venv/run.stamp
	$(BIN)/fedmm compare experiments/configs/results.yaml --out runs/results --jobs 2
	$(BIN)/fedmm compare experiments/configs/ablations.yaml --out runs/ablations --jobs 2
	$(BIN)/fedmm report runs/results --out experiments/results/study
	$(BIN)/fedmm report runs/ablations --out experiments/results/ablations

clean:
	rm -rf .venv runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

$(BIN)/python:
	$(PYTHON) -m venv .venv

.venv/run.stamp: $(SOURCES) | $(BIN)/python
	$(PIP) $(TORCH)
	$(PIP) -e .
	touch $@

.venv/dev.stamp: $(SOURCES) | $(BIN)/python
	$(PIP) $(TORCH)
	$(PIP) -e ".[dev]"
	touch .venv/run.stamp $@
