# make demo and make test do everything on a fresh machine that has Python >= 3.11 and make.
#
#   make demo TORCH=torch==2.11.0        with another build of torch
#   make demo PYTHON=/path/to/python     in an environment of yours: nothing is created or downloaded
#   make test WORKERS=8                  with eight processes that test a file at a time

TORCH ?= torch==2.13.0
BASE_PYTHON ?= python3
WORKERS ?= 2
VENV := .venv

ifdef PYTHON
# Used as it is; what is missing is listed and ends with exit code 2.
RUN := $(PYTHON)
READY := check-environment
else
RUN := $(VENV)/bin/python
READY := $(VENV)/.installed
endif

.PHONY: help demo test test-slow faults lint report ui install check-environment
.DEFAULT_GOAL := help

help: ## Show this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-10s %s\n", $$1, $$2}'

$(VENV)/.installed: pyproject.toml
	@$(BASE_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "pi0exp needs Python >= 3.11; $(BASE_PYTHON) is $$($(BASE_PYTHON) --version). Set BASE_PYTHON."; exit 2; }
	$(BASE_PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

install: $(READY) ## Make .venv and install pi0exp with its development tools

check-environment:
	@$(RUN) experiments/check_environment.py

demo: $(READY) ## Measure the policy on a recorded observation: Pi0 with a GPU, the tiny model without
	@$(RUN) experiments/demo.py

# Files begin in the order of tests/conftest.py, the longest first.
PYTEST := $(RUN) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test: $(READY) ## The tests of every day, under 15 minutes on 2 cores
	$(PYTEST) -m "not slow"

test-slow: $(READY) ## Compilers, whole sweeps, installs, Ray, submitit, PostgreSQL, 50 kills; under an hour on 2 cores
	$(PYTEST) -m slow

FAULTS := tests/test_fault_table.py tests/test_faults.py tests/test_lost_store.py tests/test_killed.py tests/test_faults_gpu.py
faults: $(READY) ## Inject every fault, then write what came of them to docs/faults.md
	$(RUN) -m pytest $(FAULTS) --deselect tests/test_fault_table.py::test_committed_table_is_that_of_the_suite
	$(RUN) tests/faults.py --write docs/faults.md

lint: $(READY) ## Format, lint and types, as CI checks them
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy

report: $(READY) ## build/report/index.html: every study, its answer, tables and plots, beside published figures
	@$(RUN) -m pi0exp.report --html build/report

# MLflow's workers for jobs of language models would take most of a core, and disturb what is measured meanwhile.
ui: $(READY) ## Compare runs in MLflow, http://127.0.0.1:5000
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(RUN) -m mlflow ui --workers 1 --backend-store-uri sqlite:///mlruns/mlflow.db
