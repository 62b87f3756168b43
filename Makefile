# What the project can do from a fresh checkout: `make` lists it. Needs make and Python 3.11+; the rest is installed.

PYTHON ?= $(shell for each in python3.13 python3.12 python3.11 python3.14 python3; do \
	command -v $$each >/dev/null 2>&1 && $$each -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 \
	&& echo $$each && break; done)
VENV := .venv
BIN := $(VENV)/bin
KAFKA := .cache/kafka
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test check bench format kafka chromium clean

help: ## Show this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/demo ## 20,000 payments, 10 % of them twice, one worker killed: every balance right (about 20 s)
	$(BIN)/consumer demo $(ARGS)

test: $(VENV)/dev $(KAFKA)/.complete chromium ## All tests, on real Kafka, PostgreSQL and Valkey (ARGS="-k name" for some)
	$(BIN)/python -m pytest $(ARGS)

check: $(VENV)/dev ## Format, lint, strict types, and the architecture
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py

bench: $(VENV)/dev $(KAFKA)/.complete ## Speed, as ratios in one run (about 5 minutes)
	$(BIN)/python benchmarks/run.py $(ARGS)

format: $(VENV)/dev ## Bring the code into shape
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

kafka: $(KAFKA)/.complete ## Bring Apache Kafka's jars, for the tests

chromium: ## Bring Chromium, for the tests of the page
	@sh tests/chromium/install.sh

clean: ## Remove what was installed here
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Each extra is installed again when pyproject.toml changes.
$(VENV)/python:
	@test -n "$(PYTHON)" || { echo "make: needs Python 3.11 or newer with venv and pip: install python3 and python3-venv, or say PYTHON=/path/to/python"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/demo $(VENV)/dev: $(VENV)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(notdir $@)]'
	@touch $@

$(KAFKA)/.complete: tests/kafka/pom.xml
	@sh tests/kafka/install.sh $(KAFKA)
	@touch $@
