# `make help` lists the targets. Everything is installed into .venv and .dev, nothing elsewhere but Debian packages.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
VENV := .venv
PY := $(VENV)/bin/python

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  \033[1m%-18s\033[0m %s\n", $$1, $$2}'

# uv, itself pinned, installs the rest: several times as fast as pip, and never twice on one machine.
$(VENV)/.installed: requirements/dev.txt images/installer.txt pyproject.toml
	@echo "installing the development environment into $(VENV) (torch with CUDA's libraries: some minutes the first time)"
	python3 -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --require-hashes -r images/installer.txt
	$(VENV)/bin/uv pip install --quiet --system-certs --python $(PY) --require-hashes -r requirements/dev.txt
	$(VENV)/bin/uv pip install --quiet --python $(PY) --no-deps --no-build-isolation -e .
	touch $@

.PHONY: venv
venv: $(VENV)/.installed ## the development environment in .venv

.PHONY: requirements
requirements: ## pin the requirements anew, with hashes
	for extra in operator runtime; do \
	  $(VENV)/bin/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-header --extra $$extra \
	    pyproject.toml -o requirements/$$extra.txt; done
	$(VENV)/bin/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-header --all-extras \
	  pyproject.toml requirements/build.in -o requirements/dev.txt
	$(VENV)/bin/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-header \
	  --constraint requirements/dev.txt images/installer.in -o images/installer.txt

.PHONY: lint
lint: venv ## ruff, mypy, import-linter
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

.PHONY: test-unit
test-unit: venv ## the tests of the parts, and the simulations
	$(PY) -m pytest tests/unit tests/sim

.PHONY: test-contract
test-contract: venv .dev/bin/helm ## the tests of the interfaces: real ranks, clients and charts, no cluster
	$(PY) -m pytest tests/contract

.PHONY: test
test: ## every test that needs no GPU, on a real cluster that is brought up for them and taken down again
	@python3 tests/run.py

.PHONY: test-e2e
test-e2e: venv ## the tests on the cluster (make cluster-up images deploy)
	$(PY) -m pytest tests/e2e -m "not outage" --durations=12

include $(wildcard bench/*.mk tests/*.mk)
include dev/cluster.mk
