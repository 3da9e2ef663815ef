.PHONY: .dev/bin/lws
.dev/bin/lws: # a controller of the same kind, beside which ours is measured; built anew only when its module changes
	@python3 -m dev.go_tool lws

.PHONY: bench-scale
bench-scale: venv .dev/bin/helm .dev/bin/kwok .dev/bin/lws ## the operator with 2,000 models on fake nodes, beside LeaderWorkerSet's controller (root; an hour and more)
	$(PY) -m bench.scale $(BENCH_SCALE)
