.PHONY: bench-scale
bench-scale: venv .dev/bin/kwok ## the operator with 2,000 models on fake nodes: requests, memory, restart, reactions (root; half an hour)
	$(PY) -m bench.scale $(BENCH_SCALE)
