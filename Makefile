# What the project can do from a fresh checkout: `make` lists it. Needs make and Python 3.11+; the rest is installed.

PYTHON ?= $(shell for each in python3.13 python3.12 python3.11 python3.14 python3; do \
	command -v $$each >/dev/null 2>&1 && $$each -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 \
	&& echo $$each && break; done)
VENV := .venv
BIN := $(VENV)/bin
KAFKA := .cache/kafka
PROMETHEUS := .cache/prometheus
HELM := .cache/helm
SUPPLY := .cache/supply
DOCS := .cache/docs
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check
ARGS ?=
AT_A_TIME ?= 4

.DEFAULT_GOAL := help
.PHONY: help demo shop unit coverage release-check test pythons check oracle verdicts audit lock bench format kafka services chromium pgbouncer prometheus helm pictures docs clean

help: ## Show this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/demo ## 20,000 payments, 10 % of them twice, one worker killed: every balance right (about 20 s)
	$(BIN)/consumer demo $(ARGS)

shop: $(VENV)/shop ## A payment page on which a second tap is stopped, layer by layer (ARGS="--port 8081")
	$(BIN)/python -m handlers.shop $(ARGS)

test: $(VENV)/dev $(KAFKA)/.complete chromium pgbouncer prometheus helm ## All tests, on real Kafka, PostgreSQL and Valkey (ARGS="-k name" for some)
	$(BIN)/python -m pytest --numprocesses $(AT_A_TIME) --dist loadfile --no-loadscope-reorder $(ARGS)

# Two processes: each more needs 5 s of CPU time for imports and collection. Few examples for each property, and without the tests that are about many states: `make test` has them.
unit: $(VENV)/dev ## Tests that need no service: pure modules and the project's structure (under 30 s)
	@CORE_EXAMPLES=20 $(BIN)/python -m pytest -q -p no:cacheprovider --numprocesses 2 --dist loadfile -m unit --ignore tests/core/test_model.py \
		--deselect tests/core/test_ordering.py::TestLaneAgainstItsModel \
		--deselect tests/worker/test_partition_table.py::TestTableAgainstItsModel \
		--deselect tests/replay/test_timeline.py::test_the_calendar_is_right_on_every_day $(ARGS)

coverage: $(VENV)/dev $(KAFKA)/.complete chromium pgbouncer prometheus helm ## All tests, and the lines and branches that none of them runs (.cache/coverage/index.html)
	$(BIN)/python -m pytest --numprocesses $(AT_A_TIME) --dist loadfile --no-loadscope-reorder --cov=consumer --cov=handlers --cov-branch \
		--cov-report=term:skip-covered --cov-report=html:.cache/coverage $(ARGS)

release-check: $(SUPPLY)/.complete ## Build the wheel, install it in a clean environment, run the demo from it (KEEP=yes: for a release)
	@KEEP=$(KEEP) sh requirements/release-check.sh $(SUPPLY)/bin/uv $(PYTHON)

pythons: $(VENV)/dev $(KAFKA)/.complete ## The core and the commands on Python 3.11 to 3.13, as far as they are here, and SQLAlchemy 2.0
	@sh tests/pythons.sh $(ARGS)

chaos: $(VENV)/dev $(KAFKA)/.complete ## Random faults on real servers, and what must be true after them (ARGS="--seed 7 --seconds 20 --runs 5")
	@PYTHONPATH=.:tests:tests/support $(BIN)/python -m chaos $(ARGS)

live: $(VENV)/dev $(KAFKA)/.complete ## Checks and rebuilds beside running workers: no wrong verdict (ARGS="--checks 25 --rebuilds 5 --seed 7")
	@PYTHONPATH=.:tests:tests/support $(BIN)/python -m verdicts_live $(ARGS)

oracle: $(VENV)/dev ## Random applications, a batch against one message at a time (ARGS="--seed 7 --seconds 60")
	@PYTHONPATH=.:tests:tests/support $(BIN)/python -m oracle $(ARGS)

verdicts: $(VENV)/dev $(KAFKA)/.complete ## Random applications with planted faults: are the verdicts of replay right? (ARGS="--seed 7 --seconds 60")
	@PYTHONPATH=.:tests:tests/support $(BIN)/python -m verdicts $(ARGS)

check: $(VENV)/dev ## Format, lint, strict types, the architecture, and known holes in what we depend on
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/project/test_architecture.py tests/project/test_sql_names.py tests/project/test_supply.py
	@$(MAKE) --no-print-directory audit

audit: ## Known vulnerabilities in locked versions (passes if the service cannot be reached)
	-@$(MAKE) --no-print-directory --silent $(SUPPLY)/.complete
	@$(PYTHON) requirements/audit.py $(SUPPLY)/bin/python

# One resolution for all of Python and all platforms, with the hash of every file that may be installed.
COMPILE = $(SUPPLY)/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-header --no-emit-index-url
lock: $(SUPPLY)/.complete ## Resolve the dependencies again and write requirements/*.lock
	$(COMPILE) --upgrade --extra dev pyproject.toml --output-file requirements/dev.lock
	$(COMPILE) --upgrade --constraint requirements/dev.lock pyproject.toml --output-file requirements/runtime.lock
	$(SUPPLY)/bin/python -c 'import tomllib; print("\n".join(tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"]))' \
		| $(COMPILE) --upgrade - --output-file requirements/docs.lock
	$(SUPPLY)/bin/python -c 'import tomllib; print("\n".join(tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"]))' \
		| $(COMPILE) --upgrade - --output-file requirements/build.lock
	echo 'sqlalchemy>=2.0.31,<2.1' | $(COMPILE) --upgrade --no-deps - --output-file requirements/sqlalchemy.lock

bench: $(VENV)/dev $(KAFKA)/.complete ## Speed, as ratios in one run (about 5 minutes)
	$(BIN)/python benchmarks/run.py $(ARGS)

format: $(VENV)/dev ## Bring the code into shape
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

kafka: $(KAFKA)/.complete ## Bring Apache Kafka's jars, for the tests

services: $(VENV)/dev $(KAFKA)/.complete ## Kafka, PostgreSQL and Valkey on free ports until Ctrl-C, and the variables that lead to them; TOPICS="orders payments" creates these
	@$(BIN)/python tests/support/run_services.py $(TOPICS)

chromium: ## Bring Chromium, for the tests of the page
	@sh tests/chromium/install.sh

pgbouncer: ## Bring PgBouncer, for one test
	@sh tests/pgbouncer/install.sh

prometheus: ## Bring Prometheus and promtool, for the alerts and one scrape
	@sh tests/prometheus/install.sh $(PROMETHEUS)

helm: $(VENV)/python ## Bring Helm and the schemas of Kubernetes, for the chart and the manifests
	@sh tests/helm/install.sh $(HELM) $(BIN)/python

pictures: $(VENV)/dev $(KAFKA)/.complete chromium ## Take the pictures of docs/how-to/shop.md and console.md again
	$(BIN)/python tests/shop/pictures.py
	$(BIN)/python tests/console/pictures.py

# Not --quiet: strict mode counts the warnings that are printed.
docs: $(DOCS)/.complete ## Build the site of the documents, strictly (.cache/site/index.html)
	@NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build
	@echo "good: .cache/site/index.html"

clean: ## Remove what was installed here
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Each extra is installed again when pyproject.toml changes.
$(VENV)/python:
	@test -n "$(PYTHON)" || { echo "make: needs Python 3.11 or newer with venv and pip: install python3 and python3-venv, or say PYTHON=/path/to/python"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/dev: requirements/dev.lock
$(VENV)/demo $(VENV)/shop $(VENV)/dev: $(VENV)/python pyproject.toml
	@# What the tests run with is exactly what is locked.
	test $(notdir $@) != dev || $(PIP) --require-hashes --requirement requirements/dev.lock
	$(PIP) --editable '.[$(notdir $@)]'
	@touch $@

# Apart from the rest, whose versions its own dependencies would change.
$(SUPPLY)/.complete: Makefile
	@$(PYTHON) -m venv $(SUPPLY)
	@$(SUPPLY)/bin/python -m pip install --quiet --disable-pip-version-check 'uv>=0.11,<1' 'pip-audit>=2.10,<3'
	@touch $@

# Apart from the rest, too: what is installed for the site cannot come between the tests.
$(DOCS)/.complete: requirements/docs.lock
	@$(PYTHON) -m venv $(DOCS)
	@$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements/docs.lock
	@touch $@

$(KAFKA)/.complete: tests/kafka/pom.xml
	@sh tests/kafka/install.sh $(KAFKA)
	@touch $@
