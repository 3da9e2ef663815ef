.PHONY: bench bench-all-reduce bench-decode bench-hybrid bench-load bench-prefix bench-same-answer bench-sampling
bench: bench-all-reduce bench-decode bench-hybrid bench-load bench-prefix bench-same-answer bench-sampling ## all measurements, into build/bench (those of the cluster apart: see bench-startup)

bench-all-reduce: venv ## microseconds of an all-reduce between CPU ranks, beside gloo
	$(PY) -m bench.all_reduce

bench-decode: venv ## tokens per second of a 0.6B shape on CPUs, beside transformers
	$(PY) -m bench.decode

bench-hybrid: venv ## the same of Qwen3.5-0.8B's shape, and its delta nets after 1,024 and 16,384 tokens
	$(PY) -m bench.hybrid

bench-load: venv ## bytes read, peak memory and rate of loading that shape
	$(PY) -m bench.load

bench-prefix: venv ## seconds to the first token behind a prefix of 2,000 tokens, cold and warm
	$(PY) -m bench.prefix

bench-same-answer: venv ## how often a draw is another because its logits were rounded otherwise
	$(PY) -m bench.same_answer

bench-sampling: venv ## milliseconds of sampling a batch from a vocabulary of 151,936, beside row by row
	$(PY) -m bench.sampling
