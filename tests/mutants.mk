.PHONY: mutants
mutants: venv ## change the pure modules in every small way: a test must notice (WORDS="policy gathering" for some)
	$(PY) -m dev.mutants $(WORDS)
