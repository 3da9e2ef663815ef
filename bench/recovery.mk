.PHONY: bench-recovery
bench-recovery: venv ## each fault injected into a stream: its pause, phase by phase, beside a start of everything
	$(PY) -m bench.recovery
