.PHONY: coverage
coverage: venv .dev/bin/helm .dev/bin/promtool ## branch coverage: every line of the pure modules, the packages' floors (twice test-unit's time)
	@mkdir -p build/coverage
	$(PY) -m pytest -q -n 2 tests/unit tests/sim --cov --cov-report=
	$(PY) -m pytest -q tests/contract --cov --cov-append --cov-report=
	$(PY) -m dev.coverage_gate
