.PHONY: soak
soak: venv ## 20 minutes of load on busy cores, with a rank slowed threefold: nothing may be taken for a fault
	$(PY) -m pytest -s tests/soak
