.PHONY: bench bench-decode bench-load
bench: bench-decode bench-load ## all measurements, into build/bench (those of the cluster apart: see bench-startup)

bench-decode: venv ## tokens per second of a 0.6B shape on CPUs, beside transformers
	$(PY) -m bench.decode

bench-load: venv ## bytes read, peak memory and rate of loading that shape
	$(PY) -m bench.load
