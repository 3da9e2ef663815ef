LM_EVAL := build/lm_eval

# An environment of its own: what it brings for data science nothing else here needs.
$(LM_EVAL)/.installed: $(UV) requirements/lm_eval.txt
	$(UV) venv --quiet --clear --python $(PYTHON) $(LM_EVAL)
	$(UV) pip install --quiet --system-certs --python $(LM_EVAL)/bin/python --require-hashes \
	  --build-constraint requirements/lm_eval.txt -r requirements/lm_eval.txt
	touch $@

.PHONY: test-clients
test-clients: venv $(LM_EVAL)/.installed ## programs that people call the API with, against served models
	$(PY) -m pytest tests/clients --durations=5
