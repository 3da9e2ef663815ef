.PHONY: test-gpu
# Where this project's environment can't be installed: PYTHONPATH=runtime make test-gpu PY=python3
test-gpu: $(if $(filter $(VENV)/bin/python,$(PY)),venv) ## what only a CUDA GPU can show, as a table, and the tests that need one; elsewhere it says why not
	$(PY) -m tests.gpu.findings
