.PHONY: bench-startup
bench-startup: venv ## kubectl apply to Ready, and where the time goes (needs the cluster)
	$(PY) -m bench.startup
