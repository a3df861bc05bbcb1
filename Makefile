# Everything happens in .venv, made on first use and brought up to date when pyproject.toml changes.
PYTHON = python3
# A torch of your own instead of the one in constraints.txt: make setup TORCH=torch
TORCH =

BIN = .venv/bin
INSTALL = $(BIN)/python -m pip install --quiet $(if $(TORCH),,--constraint constraints.txt)

.PHONY: setup train test fuzz test-slow test-examples test-peers mutations lint bench docs

setup: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	@echo "Installing into .venv (torch first, then seqrl and its development tools) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(INSTALL) $(or $(TORCH),torch)
	@$(INSTALL) --editable '.[dev]'
	@touch $@

train: setup
	$(BIN)/seqrl quickstart

# A process for each core, each with one thread, files in their own order: by number of tests, as is usual, a slow file
# of few would come last and alone. Then what is timed, by itself.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m "not slow and not alone"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "alone and not slow"

# The property tests again, on examples drawn anew.
fuzz: setup
	$(BIN)/python -m pytest -m "not slow and not peers" --hypothesis-profile=anew $$(grep -rl hypothesis tests --include='test_*.py')

test-slow: setup
	$(BIN)/python -m pytest -m slow

# Every recipe of examples/, two steps each on a tiny model.
test-examples: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/examples

# The same numbers through TRL and verl, in an environment of their own. verl without its dependencies, which
# ask for other releases of half of it, but with those that its algorithms import.
PEERS = .venv-peers/bin
PEERS_INSTALL = $(PEERS)/python -m pip install --quiet --constraint constraints.txt

test-peers: .venv-peers/.installed
	$(PEERS)/python -m pytest -m peers tests/peers

.venv-peers/.installed: pyproject.toml constraints.txt
	@echo "Installing TRL and verl into .venv-peers ..."
	@test -x $(PEERS)/python || $(PYTHON) -m venv .venv-peers
	@$(PEERS_INSTALL) torch
	@$(PEERS_INSTALL) --editable '.[bench]' pytest
	@$(PEERS_INSTALL) --no-deps verl==0.9.1
	@$(PEERS_INSTALL) 'tensordict==0.10.*' ray codetiming orjson
	@touch $@

# Breaks every loss on purpose, in a copy, and reports which test notices; fails if none does.
mutations: setup
	$(BIN)/python tests/mutations.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# All benchmarks, or one: make bench BENCH=rollout ARGS='--vllm PYTHON'. What each measures: benchmarks/README.md.
BENCH = step rollout update logprob_head experts losses scaling overhead
ARGS =

bench: setup
	@$(INSTALL) --editable '.[bench]'
	@for name in $(BENCH); do $(BIN)/python -m benchmarks.$$name $(ARGS) || exit 1; done

docs: setup
	$(BIN)/python -m seqrl.config.keys > docs/keys.md
	$(BIN)/python docs/verl_table.py
