# `make demo` and `make test` need Python 3.11+, pip, make and a package registry; nothing else.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
BENCHMARKS := step load apply live decide decode repair memory nll_many gsi stream

.PHONY: help setup demo test test-network bench soak lint format type lock clean

help:  ## Show what there is to make.
	@grep -E '^[a-z-]+:.*##' Makefile | awk -F ':.*## ' '{printf "  make %-13s %s\n", $$1, $$2}'

setup: $(READY)  ## Make .venv with all that is needed (quick when nothing changed).

$(READY): pyproject.toml constraints.txt tools/setup.sh
	@sh tools/setup.sh $(PYTHON) $(VENV)
	@touch $@

demo: setup  ## The main job on the default model: importance, training, comparison, report.
	@$(RUN) -m experiments.demo

test: setup  ## Run the tests (no network, no GPU needed).
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --maxprocesses=8 -m "not slow and not network and not gpu"

test-network: setup  ## Run the tests that download the default model.
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -m "network or slow"

bench: setup  ## Run all benchmarks and print their table (wants a quiet machine).
	@for name in $(BENCHMARKS); do $(RUN) -m benchmarks.$$name || exit 1; done
	@$(RUN) -m benchmarks.table

soak: setup  ## Serve 10,000 good and bad requests under a moving budget (half an hour at most).
	@OMP_NUM_THREADS=1 $(RUN) -m experiments.soak

lint: setup  ## Check style and formatting.
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .

format: setup  ## Format the code and mend what can be mended.
	@$(RUN) -m ruff format .
	@$(RUN) -m ruff check --fix .

type: setup  ## Check the types.
	@$(RUN) -m mypy

lock: setup  ## Write the installed versions into constraints.txt.
	@sh tools/lock.sh $(VENV)

clean:  ## Remove the virtual environment and caches; downloads and runs stay.
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build *.egg-info
