"""lm-evaluation-harness against a served model: each score is what transformers computes for the same model."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from tests.support.serve import TINY_CHAT, Served
from transformers import AutoModelForCausalLM, AutoTokenizer

HARNESS: Final = Path(__file__).parent / "harness"
PYTHON: Final = Path(__file__).resolve().parents[2] / "build" / "lm_eval" / "bin" / "python"
OFFLINE: Final = {
    "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
    "OMP_NUM_THREADS": "1",
}  # fmt: skip
CLOSE: Final = 1e-3  # of sums of up to 20 log probabilities in float32
SECONDS: Final = 300.0

Samples = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def samples(server: Served, tmp_path_factory: pytest.TempPathFactory) -> Samples:
    """What the harness asked and was answered, by task."""
    if not PYTHON.exists():
        pytest.fail(f"{PYTHON} is missing: run `make test-clients`, which makes the harness' environment")
    directory = tmp_path_factory.mktemp("lm_eval")
    arguments = {
        "model": "tiny-chat", "base_url": f"{server.api}/v1/completions", "tokenizer_backend": "huggingface",
        "tokenizer": str(TINY_CHAT), "num_concurrent": "4", "max_retries": "1", "tokenized_requests": "True",
    }  # fmt: skip
    command = [
        str(PYTHON), "-m", "lm_eval", "run", "--model", "local-completions",
        "--model_args", ",".join(f"{name}={value}" for name, value in arguments.items()),
        "--include_path", str(HARNESS), "--tasks", "lockstep_choice,lockstep_generate",
        "--batch_size", "4", "--log_samples", "--output_path", str(directory),
    ]  # fmt: skip
    variables = os.environ | OFFLINE | {"HF_HOME": str(directory / "home")}
    ended = subprocess.run(command, cwd=HARNESS, env=variables, capture_output=True, text=True, timeout=SECONDS)
    assert ended.returncode == 0, ended.stderr[-5000:]
    return {name: _samples(directory, name) for name in ("lockstep_choice", "lockstep_generate")}


def _samples(directory: Path, task: str) -> list[dict[str, Any]]:
    [file] = directory.rglob(f"samples_{task}_*")
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def oracle() -> Any:
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(TINY_CHAT, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY_CHAT)


def questions() -> int:
    return len((HARNESS / "questions.jsonl").read_text().splitlines())


def test_log_likelihoods_equal_transformers(samples: Samples, oracle: Any, tokenizer: Any) -> None:
    assert len(samples["lockstep_choice"]) == questions()
    scored = 0
    for sample in samples["lockstep_choice"]:
        for asked, [[value, greedy]] in zip(sample["arguments"].values(), sample["resps"], strict=True):
            expected, is_greedy = likelihood(oracle, tokenizer, asked["arg_0"], asked["arg_1"])
            assert abs(float(value) - expected) < CLOSE, asked
            assert (str(greedy) == "True") == is_greedy
            scored += 1
    assert scored > 2 * questions()


def test_greedy_answers_equal_transformers(samples: Samples, oracle: Any, tokenizer: Any) -> None:
    assert len(samples["lockstep_generate"]) == questions()
    for sample in samples["lockstep_generate"]:
        [asked] = sample["arguments"].values()
        until, most = asked["arg_1"]["until"], asked["arg_1"]["max_gen_toks"]
        inputs = tokenizer(asked["arg_0"], return_tensors="pt")
        tokens = oracle.generate(**inputs, max_new_tokens=most, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        expected = tokenizer.decode(tokens, skip_special_tokens=True)
        for stop in until:
            expected = expected.partition(stop)[0]
        assert sample["resps"] == [[expected]]


def likelihood(oracle: Any, tokenizer: Any, context: str, continuation: str) -> tuple[float, bool]:
    """The log likelihood of a text's second part, and whether it is what greedy decoding would say."""
    ids = tokenizer(context + continuation)["input_ids"]
    start = len(tokenizer(context)["input_ids"])
    with torch.inference_mode():
        logprobs = oracle(torch.tensor([ids])).logits[0, start - 1 : -1].float().log_softmax(-1)
    chosen = torch.tensor(ids[start:])
    return float(logprobs.gather(1, chosen[:, None]).sum()), bool((logprobs.argmax(-1) == chosen).all())
