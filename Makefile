# `make help` lists the targets. Everything happens in .venv, which the first target makes.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Two workers, one thread each: the tests are many small ones.
PYTEST_ARGS ?= -n 2 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help install demo check-science test test-gpu lint format bench report clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

install: $(INSTALLED) ## make .venv and install the package with its development tools

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "$(PYTHON) is too old: Python >= 3.10 is needed; give another one: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV) \
		|| { echo "no virtual environment could be made (Debian and Ubuntu: apt install python3-venv)"; exit 1; }
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -e ".[dev]"
	@touch $@

demo: $(INSTALLED) ## fine-tune a small pretrained Vim three ways on real images, on the CPU: a table and a picture
	$(BIN)/python scripts/demo.py

check-science: $(INSTALLED) ## is the order scratch < linear_probe < lora_p_x still there? (CPU; nightly-sized)
	$(BIN)/python scripts/check_science.py

test: $(INSTALLED) ## all tests (GPU tests skip themselves where there is no GPU)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS) --ignore=tests/kernels tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS) tests/kernels # alone: see its conftest.py

test-gpu: $(INSTALLED) ## the tests that need a GPU
	$(BIN)/python -m pytest -m gpu

lint: $(INSTALLED) ## check style and formatting
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: $(INSTALLED) ## apply style and formatting
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

bench: $(INSTALLED) ## kernel benchmarks (needs a GPU)
	$(BIN)/python scripts/bench_kernels.py

report: $(INSTALLED) ## tables and plots of the published runs (results/), as results/report.html
	$(BIN)/python scripts/collect_results.py results --format html --out results/report.html

clean: ## remove the environment and everything that was built; runs and data stay
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
