# Everything happens in .venv, made on first use and brought up to date when pyproject.toml changes.
PYTHON = python3
# A torch of your own instead of the one in constraints.txt: make setup TORCH=torch
TORCH =

BIN = .venv/bin
INSTALL = $(BIN)/python -m pip install --quiet $(if $(TORCH),,--constraint constraints.txt)

.PHONY: setup train test test-slow lint bench docs

setup: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	@echo "Installing into .venv (torch first, then seqrl and its development tools) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(INSTALL) $(or $(TORCH),torch)
	@$(INSTALL) --editable '.[dev]'
	@touch $@

train: setup
	$(BIN)/seqrl quickstart

test: setup
	$(BIN)/python -m pytest -m "not slow"

test-slow: setup
	$(BIN)/python -m pytest -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	@$(INSTALL) --editable '.[bench]'
	$(BIN)/python -m benchmarks.step

docs: setup
	$(BIN)/python -m seqrl.config.keys > docs/keys.md
