# `make demo` and `make test` need a Python and nothing else: each makes .venv and installs into it,
# and does so again only after the files that say what to install have changed.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
SEED := $(or $(SEED),$(shell date +%s))
# Neighbouring tests, which share an export or a session, run in one worker where they can.
WORKERS := -n $(JOBS) --dist worksteal
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test campaign lint types install

demo: $(STAMP)
	$(BIN)/python examples/demo.py

test: lint types
	$(BIN)/python -m pytest $(WORKERS) --durations=30

# The long tests whole, with fresh seeds; SEED=n for those of an earlier run (tests/campaign.py).
campaign: $(STAMP)
	CAMPAIGN=$(SEED) $(BIN)/python -m pytest $(WORKERS) -m "campaign or hypothesis" --hypothesis-seed=$(SEED)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

install: $(STAMP)

# torch comes first and alone, so that an index or a folder with CPU wheels is used where pip has one.
$(STAMP): pyproject.toml setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@
