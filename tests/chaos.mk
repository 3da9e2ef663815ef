.PHONY: chaos
chaos: venv ## every fault at every moment to every rank, on real processes (a quarter of an hour on two cores)
	$(PY) -m pytest tests/chaos --durations=10

.PHONY: test-chaos
test-chaos: venv ## a fixed third of it, different kinds of fault first
	$(PY) -m pytest tests/chaos -m third --durations=5

.PHONY: outages
outages: venv ## pods, their network, their node's kubelet and the operator taken away (make cluster-up images deploy)
	$(PY) -m pytest tests/e2e -m outage --durations=10

.PHONY: lasting-outages
lasting-outages: venv ## outages that nobody ends, until another pod is there (some minutes; make cluster-up images deploy)
	$(PY) -m pytest tests/e2e -m lasting --durations=10
