# `make demo` and `make test` need Python 3.11+, pip, make and a package registry; nothing else.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
TEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --maxprocesses=8 --dist worksteal
BENCHMARKS := step episodes decide scoring levels memory engine_steps conversations preparing
GPU_BENCHMARKS := scoring levels memory

# Some containers turn compiled modules off; then each process of a test compiles all it imports.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help setup demo test test-all test-network clients gpu bench soak lint format type docs dist lock clean

help:  ## List the targets.
	@grep -E '^[a-z-]+:.*##' Makefile | awk -F ':.*## ' '{printf "  make %-13s %s\n", $$1, $$2}'

setup: $(READY)  ## Make .venv with all dependencies (quick if nothing changed).

$(READY): pyproject.toml constraints.txt tools/setup.sh
	@sh tools/setup.sh $(PYTHON) $(VENV)
	@touch $@

demo: setup  ## Train a policy for the default model, compare it, and serve with it.
	@$(RUN) -m experiments.demo

test: setup  ## Run the tests (no network, no GPU needed).
	@$(TEST) -m "not slow and not network and not gpu"

test-all: setup  ## Run also the slow tests, and those of families and agents on all of them.
	@$(TEST) -m "not network and not gpu" --all-cases

test-network: setup  ## Run the tests that download the default model or install other engines.
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -m network --all-cases --ignore=tests/clients

clients: setup  ## Install eight well-known clients and run them against the server.
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -m network tests/clients

gpu: setup  ## On a CUDA device: run the GPU tests and benchmarks, print their table.
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -m gpu --all-cases
	@for name in $(GPU_BENCHMARKS); do $(RUN) -m benchmarks.$$name device=cuda || exit 1; done
	@$(RUN) -m benchmarks

bench: setup  ## Run all benchmarks and print their table (needs an idle machine).
	@for name in $(BENCHMARKS); do $(RUN) -m benchmarks.$$name || exit 1; done
	@$(RUN) -m benchmarks

soak: setup  ## Serve 10,000 valid and invalid requests under a changing budget (at most an hour).
	@OMP_NUM_THREADS=1 RAP_SOAK_REQUESTS=10000 RAP_SOAK_MODEL=smollm2-135m \
		$(RUN) -m pytest --timeout=3600 -m slow tests/serving/test_soak.py

lint: setup  ## Check style and formatting.
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .

format: setup  ## Format the code and fix what ruff can fix.
	@$(RUN) -m ruff format .
	@$(RUN) -m ruff check --fix .

type: setup  ## Check the types.
	@$(RUN) -m mypy

docs: setup  ## Build the documentation site in docs/_build/html; warnings are errors.
	@$(RUN) -m sphinx -W -b html docs docs/_build/html

dist:  ## Build sdist and wheel in dist/, and try both in an empty environment.
	@sh tools/dist.sh $(PYTHON)

lock: setup  ## Write the installed versions into constraints.txt.
	@sh tools/lock.sh $(VENV)

clean:  ## Remove the virtual environment, caches and builds; downloads and runs stay.
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build dist docs/_build *.egg-info
