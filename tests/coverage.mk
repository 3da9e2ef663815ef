# What covers the pure modules: a minute, where all tests take many.
PURE := tests/sim/test_coordinator_lives.py tests/sim/test_engine_ladder.py tests/sim/test_engine_joining.py \
  tests/sim/test_engine_faults.py tests/sim/test_engine_departures.py tests/sim/test_engine_scores.py tests/unit/test_block_manager.py \
  tests/unit/test_scheduler.py tests/unit/test_scheduler_prefix.py tests/unit/test_scheduler_states.py tests/unit/test_prefix_keys.py \
  tests/unit/test_state_slots.py tests/unit/test_image_book.py tests/unit/test_pacing.py tests/unit/test_scores.py tests/unit/test_shares.py \
  tests/unit/test_supervisor_state_machine.py $(wildcard tests/unit/test_coordinator*.py tests/unit/test_recovery_*.py)

.PHONY: coverage-pure
coverage-pure: venv ## every line and branch of the pure modules is reached by a test
	@mkdir -p build/coverage
	$(PY) -m pytest -q -n 2 $(PURE) --cov --cov-report=
	$(PY) -m dev.coverage_gate --pure

.PHONY: coverage
coverage: venv .dev/bin/helm .dev/bin/promtool .dev/bin/browser .dev/schemas ## branch coverage of both packages, with floors (several times as long as their tests)
	@mkdir -p build/coverage
	$(PY) -m pytest -q -n 2 tests/unit tests/sim --cov --cov-report=
	$(PY) -m pytest -q tests/contract --cov --cov-append --cov-report=
	$(PY) -m dev.coverage_gate
