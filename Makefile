# Every target does its own set-up; nothing is repeated while nothing changed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PRESET ?= digits

.PHONY: help install demo test test-long test-fast lint data wheel clean

help: ## Show this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

install: $(VENV)/.installed ## Create .venv with everything pinned in constraints.txt.

demo: install ## Train a mixture, a VAE and a diffusion model on real digits: one table, one page (PRESET=smoke: seconds).
	$(BIN)/python -m experiments.demo $(PRESET)

test: install ## Run the tests, but for the further cases that are marked long.
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not long'

test-long: install ## Run those that are marked long.
	$(BIN)/python -m pytest -n 2 --dist loadfile -m long

test-fast: install ## Run the tests that take seconds.
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow and not long'

lint: install ## Check style and formatting.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

data: install ## Fetch and verify MNIST and Fashion-MNIST into VDIFF_DATA (default ~/.cache/vdiff).
	$(BIN)/python -m vdiff.data

wheel: install ## Build the source distribution and the wheel into dist/.
	$(BIN)/python -m build

clean: ## Remove the environment, caches and builds; runs/ stays.
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache
