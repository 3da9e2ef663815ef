"""Penalties and their kind through a real group: what transformers answers, and the same after rank 0 was killed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from tests.support.chaos import outlive_a_killed_rank_0
from tests.support.serve import TINY_CHAT, Served, served
from tests.support.stream import Stream
from transformers import AutoModelForCausalLM, AutoTokenizer

TOKENS: Final = 200
PROMPT: Final = "The for statement is used to"
SEEDED: Final[Mapping[str, Any]] = {"temperature": 0.8, "top_k": 50, "seed": 3}
RULES: Final[tuple[Mapping[str, Any], ...]] = (
    {"temperature": 0, "repetition_penalty": 1.3, "min_tokens": TOKENS},
    {**SEEDED, "frequency_penalty": 0.4, "presence_penalty": 0.9, "logit_bias": {"489": 2}},
    {**SEEDED, "repetition_penalty": 1.1, "top_p": 0.9, "logprobs": 2},
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    arguments = ("--tensor-parallel-size", "2", "--dtype", "float32", "--threads-per-rank", "1")
    with served(tmp_path_factory.mktemp("rules"), *arguments) as serve:
        serve.ready()
        yield serve


@pytest.fixture(scope="module")
def penalized() -> str:
    """What transformers' `generate` answers with the first of `RULES`."""
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(Path(TINY_CHAT))
    model = AutoModelForCausalLM.from_pretrained(TINY_CHAT, dtype=torch.float32)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    answer = model.generate(
        **inputs, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, repetition_penalty=1.3
    )
    return str(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def begin(serve: Served, rules: Mapping[str, Any]) -> Stream:
    request = {"model": "tiny-chat", "prompt": PROMPT, "max_tokens": TOKENS, "ignore_eos": False, **rules}
    return Stream(serve.api, request, 180)


def test_answers_are_those_of_transformers_and_go_on_as_they_would_have_when_rank_0_is_killed(
    server: Served, penalized: str
) -> None:
    undisturbed = [begin(server, rules).wait() for rules in RULES]
    assert undisturbed[0].text == penalized
    assert all(answer.done and not answer.error for answer in undisturbed)
    for _ in range(2):
        outlive_a_killed_rank_0(server, lambda: [begin(server, rules) for rules in RULES], undisturbed)
