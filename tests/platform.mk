.PHONY: .dev/bin/kueue
.dev/bin/kueue: # a queue for the tests of gangs; built anew only when its module changes
	@python3 -m dev.go_tool kueue

.PHONY: test-platform
test-platform: venv .dev/bin/helm .dev/bin/kwok .dev/bin/kueue ## queues, gangs and places, on fake nodes in a Kubernetes of the tests' own (minutes)
	$(PY) -m pytest tests/platform --durations=12
