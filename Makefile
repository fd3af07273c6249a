# `make help` lists the targets. Everything happens in .venv, which the first target makes.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Two workers, one thread each: the tests are many small ones.
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder
# A constraints file for pip; constraints.txt holds the versions that the project was last tested with.
CONSTRAINTS ?=
OLDEST ?= .venv-oldest
NEWEST ?= .venv-newest

.DEFAULT_GOAL := help
.PHONY: help install demo check-science test test-all test-gpu test-oldest test-newest audit lint format wheel bench report clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

install: $(INSTALLED) ## make .venv and install the package with its development tools [CONSTRAINTS=constraints.txt]

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "$(PYTHON) is too old: Python >= 3.10 is needed; give another one: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV) \
		|| { echo "no virtual environment could be made (Debian and Ubuntu: apt install python3-venv)"; exit 1; }
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e ".[dev]"
	@touch $@

demo: $(INSTALLED) ## fine-tune a small pretrained Vim three ways on real images, on the CPU: a table and a picture
	$(BIN)/mambapeft demo

check-science: $(INSTALLED) ## is the order scratch < linear_probe < lora_p_x there on every small backbone? (CPU, minutes)
	$(BIN)/mambapeft check-science

test-all: override PYTEST_ARGS += --exhaustive
test-all: test ## all tests, with the rest of large products of cases (see CONTRIBUTING.md)

# Bytecode is kept, whatever the shell says: the tests start many processes, and each would compile 300 files.
test test-gpu: export PYTHONDONTWRITEBYTECODE =

test: $(INSTALLED) ## the tests (GPU tests skip themselves where there is no GPU)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

test-gpu: $(INSTALLED) ## the tests that need a GPU
	$(BIN)/python -m pytest -m gpu

test-oldest: ## all tests with the lowest releases that pyproject.toml allows, in .venv-oldest
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python scripts/constraints.py lowest > $(OLDEST)/constraints.txt
	$(MAKE) test-all VENV=$(OLDEST) CONSTRAINTS=$(OLDEST)/constraints.txt

test-newest: ## all tests with the newest releases of everything, in .venv-newest
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --progress-bar off --upgrade --upgrade-strategy eager -e ".[dev]"
	touch $(NEWEST)/.installed
	$(MAKE) test-all VENV=$(NEWEST)

audit: $(INSTALLED) ## known vulnerabilities of the versions in constraints.txt, asked of a public database
	$(PYTHON) -m venv .venv-audit && .venv-audit/bin/python -m pip install --quiet pip-audit
	.venv-audit/bin/pip-audit --requirement constraints.txt --disable-pip --no-deps --strict

lint: $(INSTALLED) ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED) ## apply style and formatting
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

wheel: $(INSTALLED) ## build the package that pip installs, into dist/
	$(BIN)/python -m pip wheel --disable-pip-version-check --no-deps --wheel-dir dist .

bench: $(INSTALLED) ## kernel benchmarks (needs a GPU)
	$(BIN)/python scripts/bench_kernels.py

report: $(INSTALLED) ## every table and picture of the published runs (results/), into results/report/
	$(BIN)/mambapeft report results --out results/report

.PHONY: docs docs-serve
docs: $(INSTALLED) ## build the documentation into site/; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: $(INSTALLED) ## show the documentation on http://127.0.0.1:8000, built again when a page changes
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

clean: ## remove the environment and everything that was built; runs and data stay
	rm -rf $(VENV) $(OLDEST) $(NEWEST) .venv-audit build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
