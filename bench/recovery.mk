.PHONY: bench-recovery bench-watch
bench-recovery: venv ## each fault injected into a stream: its pause, phase by phase, beside starting everything anew
	$(PY) -m bench.recovery

bench-watch: venv ## what watching costs of the speed of decoding
	$(PY) -m bench.watch
