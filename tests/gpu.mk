.PHONY: test-gpu
# Where this project's environment can't be installed: PYTHONPATH=runtime make test-gpu PY=python3
test-gpu: $(if $(filter $(VENV)/bin/python,$(PY)),venv) ## the tests that need a CUDA GPU; skipped, with the reason, where there is none
	$(PY) -m pytest tests/gpu --durations=10
