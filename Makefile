# Every target sets up what it needs: a virtual environment in $(VENV), made by $(PYTHON), with the tested versions.
# A second Python beside the first:  make test PYTHON=/path/to/python3.12 VENV=.venv-3.12

PYTHON ?= python3
VENV ?= .venv
DATA ?=
JOBS ?= 2

RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
# Into a file or a pipe pip says nothing; on a terminal it shows what it downloads.
INSTALL := $(RUN) -m pip install $(if $(MAKE_TERMOUT),,-q) --disable-pip-version-check -c constraints.txt
CODE := $(wildcard cosmos_mcore examples scripts benchmarks tests)
MAX_LINES := 450

.PHONY: help setup demo test test-layouts test-slurm test-soak test-gpu check format bench clean
.DELETE_ON_ERROR:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make the virtual environment (PYTHON=python3, VENV=.venv); the tests add what they need

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys, venv; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo 'PYTHON=$(PYTHON) is not a working Python 3.10 to 3.13 with venv; name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3' >&2; exit 1; }
	@echo 'Installing into $(VENV) (about a minute on a machine without a GPU)'
	@$(PYTHON) -m venv $(VENV)
	@$(INSTALL) -e .
	@touch $@

$(DEV): $(STAMP)
	@echo 'Adding what the tests need'
	@$(INSTALL) -e '.[dev]'
	@touch $@

demo: $(STAMP) ## train, resume and generate on this machine; DATA=folder takes your own MP4 files
	$(RUN) scripts/demo.py $(if $(DATA),--data '$(DATA)') --output outputs/demo

test: $(DEV) ## the tests that need no GPU, JOBS=2 files at a time; many of them start several processes
	$(RUN) -m pytest -q -n $(JOBS) --dist loadfile

test-layouts: $(DEV) ## every parallel layout against one process (slow)
	$(RUN) -m pytest -q -m layouts

test-slurm: $(DEV) ## the batch file on two SLURM nodes on this machine: root, apt-get install slurm-wlm munge (slow)
	$(RUN) -m pytest -q -m slurm tests/training/test_slurm.py

test-soak: $(DEV) ## 20 kills at random moments, and 5,000 steps with an eye on memory, files and threads (slow)
	$(RUN) -m pytest -q -m soak tests/training/test_soak.py

test-gpu: $(DEV) ## the tests that need GPUs
	$(RUN) -m pytest -q tests/gpu

check: $(DEV) ## style, types, import rules, length of modules
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports --no-logo
	$(VENV)/bin/shellcheck -x scripts/slurm/* scripts/container/* benchmarks/*.sh .ci/run
	@if [ -x $(VENV)/bin/hadolint ]; then $(VENV)/bin/hadolint Dockerfile; fi  # it has a package for x86-64 Linux only
	@find $(CODE) -name '*.py' -exec awk \
	  'FNR == $(MAX_LINES) + 1 {print FILENAME ": longer than $(MAX_LINES) lines; split it"; long = 1} END {exit long}' {} +

format: $(DEV) ## put the code in order
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

bench: $(STAMP) ## the benchmarks that need no GPU (24 GB of disk); DATA=folder measures the tokenizer on your MP4 files, too
	$(RUN) benchmarks/convert.py
	$(RUN) benchmarks/tokenizer_psnr.py $(if $(DATA),'$(DATA)')

clean: ## remove the environment, caches and the demo's output; checkpoints stay
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build *.egg-info outputs/demo
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +
