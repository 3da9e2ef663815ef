"""Clients in front of the Service of a model in two pods."""

from __future__ import annotations

import asyncio
import pydoc_data.topics
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
import torch
from openai import AsyncOpenAI, NotFoundError
from tests.support.cluster_model import Model
from transformers import AutoModelForCausalLM, AutoTokenizer

QUESTION: Final = "What is a decorator?"
EXAMPLE: Final = Path(__file__).parents[2] / "examples" / "tiny-chat"
LENGTHS: Final = (1, 2, 3, 5, 8, 13, 16, 17, 31, 64, 100, 127, 128, 255, 300, 420, 511, 640, 777, 900)
ANSWER: Final = 12  # tokens


def test_a_chat_is_answered_with_words(served: Model) -> None:
    with served.client() as client:
        answer = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": QUESTION}], max_tokens=24, temperature=0
        )

    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert len((choice.message.content or "").split()) >= 3, choice.message.content
    assert choice.finish_reason in ("stop", "length")
    assert answer.model == "tiny"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert 0 < answer.usage.completion_tokens <= 24


def test_a_streamed_chat_says_the_same_piece_by_piece(served: Model) -> None:
    with served.client() as client:
        whole = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": QUESTION}], max_tokens=24, temperature=0
        )
        chunks = list(
            client.chat.completions.create(
                model="tiny",
                messages=[{"role": "user", "content": QUESTION}],
                max_tokens=24,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
            )
        )

    *parts, last = chunks
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content or "" for part in parts) == whole.choices[0].message.content
    assert len(parts) > 5, "a stream comes in pieces"
    finishes = [part.choices[0].finish_reason for part in parts if part.choices[0].finish_reason]
    assert finishes == [whole.choices[0].finish_reason]
    assert last.choices == []
    assert last.usage == whole.usage


def test_the_served_name_is_listed_and_another_is_unknown(served: Model) -> None:
    with served.client() as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        with pytest.raises(NotFoundError, match="tiny-chat"):
            client.completions.create(model="tiny-chat", prompt="x", max_tokens=1)


@dataclass(frozen=True, slots=True)
class Answer:
    """What followed a prompt: the text of each token, and why there are no more."""

    tokens: tuple[str, ...]
    finish: str


async def test_twenty_prompts_at_once_are_continued_as_transformers_does(served: Model) -> None:
    """Greedy, float32, two ranks in two pods: token for token."""
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE)
    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    ids = tokenizer(text[:6_300])["input_ids"]
    prompts = [ids[50 * number : 50 * number + length] for number, length in enumerate(LENGTHS)]
    assert [len(prompt) for prompt in prompts] == list(LENGTHS)

    async with AsyncOpenAI(base_url=f"{served.url()}/v1", api_key="unused", max_retries=0) as client:
        given = await asyncio.gather(*(_ask(client, prompt) for prompt in prompts))

    model = AutoModelForCausalLM.from_pretrained(EXAMPLE, dtype=torch.float32)
    expected = [_generate(model, tokenizer, prompt) for prompt in prompts]
    different = [length for length, want, have in zip(LENGTHS, expected, given, strict=True) if want != have]
    assert given == expected, f"prompts of {different} tokens were continued otherwise"


async def _ask(client: AsyncOpenAI, prompt: list[int]) -> Answer:
    answer = await client.completions.create(model="tiny", prompt=prompt, max_tokens=ANSWER, temperature=0, logprobs=0)
    choice = answer.choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.tokens is not None
    return Answer(tuple(choice.logprobs.tokens), choice.finish_reason)


def _generate(model: AutoModelForCausalLM, tokenizer: AutoTokenizer, prompt: list[int]) -> Answer:
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=ANSWER,
            do_sample=False,
        )
    new = output[0, len(prompt) :].tolist()
    finish = "length"
    if new[-1] in model.generation_config.eos_token_id:
        del new[-1]  # an answer doesn't show the token that ends it
        finish = "stop"
    return Answer(tuple(tokenizer.decode([token]) for token in new), finish)
