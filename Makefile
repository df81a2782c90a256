# Needs Python 3.11 or newer and nothing else: every target sets up what it uses.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
TEST_FLAGS ?=
WORKERS ?= 3
DURATION ?= 300
ROUNDS ?=
SECONDS ?=
SHORT ?=
CHECK ?=
CHARGES ?=

.PHONY: help run test test-clients check chaos soak bench bench-ledger bench-book format clean lock hooks coverage prices audit-deps

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: $(VENV)/.run ## set everything up and serve on 127.0.0.1:8080 (HOST= and PORT= override)
	@exec $(BIN)/tollgate serve --config config.toml $(if $(HOST),--host $(HOST)) $(if $(PORT),--port $(PORT))

test: $(VENV)/.dev ## set everything up and run the tests, on SQLite and on PostgreSQL (WORKERS=3 at once)
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal $(TEST_FLAGS)

test-clients: $(VENV)/.dev $(VENV)/clients-python/.done ## drive a server with clients that nobody here wrote (needs Node for some)
	$(BIN)/python -m pytest $(TEST_FLAGS) tests/clients

chaos: $(VENV)/.dev ## crash proxies and databases under load, then judge the books (DURATION= seconds for each, SEED=)
	$(BIN)/python -m tests.chaos.run --duration $(DURATION) $(if $(SEED),--seed $(SEED))

soak: DURATION = 600
soak: $(VENV)/.dev ## a thousand streams at once, readers that do not read, then a long mixed load: memory and handles stay flat
	$(BIN)/python -m tests.bench.soak --duration $(DURATION)

coverage: $(VENV)/.dev ## every branch of the ledger and of what counts money is taken by a test
	$(BIN)/python -m pytest --numprocesses $(WORKERS) $(MONEY_TESTS) --cov-config=pyproject.toml --cov-branch $(addprefix --cov=,$(MONEY)) \
		--cov-report=term-missing:skip-covered --cov-fail-under=100

check: $(VENV)/.dev ## format, lint, types, import contract, compose file
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml
	$(BIN)/pre-commit validate-config

bench: $(VENV)/.dev ## what a paid call costs, against a relay without accounts (SHORT=1, CHECK=1 against the stored ratios, ROUNDS=5)
	$(BIN)/python -m tests.bench.calls $(if $(SHORT),--short) $(if $(CHECK),--check) $(if $(ROUNDS),--rounds $(ROUNDS))

bench-ledger: $(VENV)/.dev ## the ledger against a transaction for each operation (ROUNDS=3 SECONDS=1.5, or SHORT=1)
	$(BIN)/python -m tests.bench.ledger --check $(if $(SHORT),--short) $(if $(ROUNDS),--rounds $(ROUNDS)) \
		$(if $(SECONDS),--seconds $(SECONDS))

bench-book: $(VENV)/.dev ## what people ask of a book of a million charges on PostgreSQL, timed, and how it is read (CHARGES=)
	$(BIN)/python -m tests.bench.book $(if $(CHARGES),--charges $(CHARGES)) --plans

format: $(VENV)/.dev ## rewrite the code in the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

hooks: $(VENV)/.dev ## run the fast checks before every commit
	$(BIN)/pre-commit install

lock: $(VENV)/.dev ## pin the newest dependencies anew
	$(PIP) install uv
	$(BIN)/uv pip compile $(LOCK_FLAGS) --upgrade pyproject.toml --group build -o .locks/run.txt
	$(BIN)/uv pip compile $(LOCK_FLAGS) --upgrade --constraint .locks/run.txt pyproject.toml --group build --group dev -o .locks/dev.txt
	$(BIN)/uv pip compile $(LOCK_FLAGS) --upgrade --group clients -o .locks/clients.txt
	$(BIN)/uv pip compile $(LOCK_FLAGS) --upgrade --group audit -o .locks/audit.txt

prices: $(VENV)/.dev ## write the price list of the pinned genai-prices, and what we know of its models, into proxy/data/prices.json
	$(BIN)/tollgate prices sync --file proxy/data/prices.json

audit-deps: $(VENV)/audit/.done ## look for known vulnerabilities in what is pinned (says so where the advisories cannot be reached)
	@if said=$$($(VENV)/audit/bin/pip-audit --disable-pip --no-deps --progress-spinner off \
		--requirement .locks/run.txt --requirement .locks/dev.txt 2>&1); then \
		echo "$$said" | grep -v -e 'could not be audited' -e '^Name ' -e '^-----'; \
		echo "Not audited, because nothing is published about them here: $$(echo "$$said" | grep -c 'could not be audited')"; \
	elif grep --quiet 'Found .* known vulnerabilit' <<< "$$said"; then echo "$$said"; exit 1; \
	else echo "Nothing was audited: $$(tail -1 <<< "$$said")"; fi

clean: ## forget the environment (the data folder stays)
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage

MONEY := proxy.ledger proxy.pricing proxy.units
# Those that start processes are left out: what a process of its own covers is not counted.
MONEY_TESTS := tests/test_pricing.py tests/test_units.py tests/ledger \
	--ignore=tests/ledger/test_faults.py --ignore=tests/ledger/test_rivals.py

# Extras stay named: pip 23 takes a newer release of what another package wants with an extra, and refuses it for want of a hash.
LOCK_FLAGS := --quiet --universal --no-strip-extras --generate-hashes --no-emit-index-url --no-emit-find-links --no-header --no-annotate

$(VENV)/bin/python:
	@if [ -z "$(PYTHON)" ]; then echo "Tollgate needs Python 3.11 or newer; set PYTHON=/path/to/python" >&2; exit 1; fi
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: $(VENV)/bin/python .locks/run.txt pyproject.toml
	$(PIP) install --require-hashes --requirement .locks/run.txt
	$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.run .locks/dev.txt
	$(PIP) install --require-hashes --requirement .locks/dev.txt
	@touch $@

$(VENV)/clients-python/.done: $(VENV)/bin/python .locks/clients.txt
	$(BIN)/python -m venv --clear $(VENV)/clients-python
	$(VENV)/clients-python/bin/python -m pip --disable-pip-version-check --quiet install --require-hashes --requirement .locks/clients.txt
	@touch $@

$(VENV)/audit/.done: $(VENV)/bin/python .locks/audit.txt
	$(BIN)/python -m venv --clear $(VENV)/audit
	$(VENV)/audit/bin/python -m pip --disable-pip-version-check --quiet install --require-hashes --requirement .locks/audit.txt
	@touch $@
