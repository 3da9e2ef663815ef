# `make help` lists the targets. Everything is installed into .venv and .dev, nothing elsewhere but Debian packages.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
VENV := .venv
PY := $(VENV)/bin/python
UV := build/installer/bin/uv
# The distribution's Python where it is new enough: it is built with optimizations that one of pyenv's has not, and it
# is the one in the images.
PYTHON ?= $(shell /usr/bin/python3 -c 'import ctypes, ssl, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
  && echo /usr/bin/python3 || echo python3)

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  \033[1m%-18s\033[0m %s\n", $$1, $$2}'

# uv, itself pinned, installs the rest: several times as fast as pip, and never twice on one machine.
$(UV): images/installer.txt
	python3 -m venv --clear build/installer
	build/installer/bin/pip install --quiet --require-hashes -r images/installer.txt
	touch $@

$(VENV)/.installed: $(UV) requirements/dev.txt pyproject.toml
	@echo "installing the development environment into $(VENV) (torch with CUDA's libraries: some minutes the first time)"
	$(UV) venv --quiet --clear --python $(PYTHON) $(VENV)
	$(UV) pip install --quiet --system-certs --python $(PY) --require-hashes -r requirements/dev.txt
	$(UV) pip install --quiet --python $(PY) --no-deps --no-build-isolation -e .
	touch $@

# A kernel of CPUs is compiled again when its source changes.
NATIVE := runtime/lockstep_runtime/layers/native
$(VENV)/.compiled: $(VENV)/.installed $(wildcard $(NATIVE)/*.c $(NATIVE)/*.h) $(NATIVE)/library.py
	$(PY) -m lockstep_runtime.layers.native.library
	touch $@

.PHONY: venv
venv: $(VENV)/.compiled ## the development environment in .venv

.PHONY: requirements
requirements: $(UV) ## pin the requirements anew, with hashes
	for extra in operator runtime; do \
	  $(UV) pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-header --extra $$extra \
	    --extra tracing pyproject.toml -o requirements/$$extra.txt; done
	$(UV) pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-header --all-extras \
	  pyproject.toml requirements/build.in -o requirements/dev.txt
	for other in images/installer requirements/lm_eval; do \
	  $(UV) pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-header \
	    --constraint requirements/dev.txt $$other.in -o $$other.txt; done

.PHONY: lint
lint: venv ## ruff, mypy, import-linter
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

.PHONY: krew
krew: venv ## kubectl lockstep in krew's form, in build/krew (URI: where its archive will be found)
	$(PY) -m dev.krew $(URI)

.PHONY: picture
picture: venv ## the packages and what they import, drawn into docs/architecture.md
	$(PY) -m dev.import_graph

.PHONY: test-unit
test-unit: venv ## the tests of the parts, and the simulations
	$(PY) -m pytest -n 2 tests/unit tests/sim

.PHONY: test-contract
test-contract: venv .dev/bin/helm .dev/bin/krew .dev/bin/promtool .dev/bin/browser .dev/schemas ## the tests of the interfaces: real ranks, clients and charts, no cluster
	$(PY) -m pytest tests/contract

.PHONY: .dev/bin/krew
.dev/bin/krew: # what krew takes of a plugin's manifest; built anew only when its module changes
	@python3 -m dev.go_tool krew

.dev/bin/browser: # which the live page is opened in
	@python3 -m dev.browser

.dev/bin/prometheus .dev/bin/promtool &: # for the tests of what is monitored, and of alerts
	@python3 -m dev.prometheus

.PHONY: .dev/schemas
.dev/schemas: # other projects' CRDs, which the tests hold the examples and the chart against
	@python3 -m dev.schemas

.PHONY: .dev/bin/kwok
.dev/bin/kwok: # fake nodes for the tests that need many; built anew only when its module changes
	@python3 -m dev.go_tool kwok

.PHONY: test
test: ## every test that needs no GPU, on a real cluster that is brought up for them and taken down again
	@python3 tests/run.py

.PHONY: test-e2e
test-e2e: venv .dev/bin/kwok .dev/bin/browser .dev/bin/prometheus .dev/schemas ## the tests on the cluster (make cluster-up images deploy)
	$(PY) -m pytest tests/e2e -m "not outage and not lasting" --durations=12

include $(wildcard bench/*.mk tests/*.mk)
include dev/cluster.mk dev/release.mk
