"""The `openai` client against a served model, and transformers beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Final

import openai
import pytest
import torch
from openai.types.chat import ChatCompletionMessageParam
from prometheus_client.parser import text_string_to_metric_families
from tests.support.http import HTTP
from tests.support.serve import TINY_CHAT, Served
from transformers import AutoModelForCausalLM, AutoTokenizer

MODEL: Final = "tiny-chat"
QUESTION: Final = "What is a for loop?"
MESSAGES: Final[list[ChatCompletionMessageParam]] = [{"role": "user", "content": QUESTION}]
FOREVER: Final[dict[str, Any]] = {"max_tokens": 2000, "extra_body": {"ignore_eos": True}}
CLOSE: Final = 1e-3  # of a log probability in float32


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.api}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def oracle() -> tuple[str, list[float]]:
    """transformers' greedy answer to the question, and its tokens' log probabilities."""
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(TINY_CHAT)
    model = AutoModelForCausalLM.from_pretrained(TINY_CHAT, dtype=torch.float32)
    inputs = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(
        **inputs, max_new_tokens=200, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    tokens = answer.sequences[0, inputs["input_ids"].shape[1] :]
    logprobs = torch.stack(answer.logits)[:, 0].log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    return tokenizer.decode(tokens, skip_special_tokens=True), logprobs.tolist()


def running(server: Served) -> float:
    """How many sequences run or wait, as /metrics says."""
    names = ("lockstep_num_requests_running", "lockstep_num_requests_waiting")
    text = HTTP.get(f"{server.api}/metrics", timeout=60).text
    families = [family for family in text_string_to_metric_families(text) if family.name in names]
    assert len(families) == len(names)
    return sum(sample.value for family in families for sample in family.samples)


def test_a_chat_is_transformers_answer(client: openai.OpenAI, oracle: tuple[str, list[float]]) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0)
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", oracle[0], "stop")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(oracle[1])
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_is_the_same_and_tells_its_usage(client: openai.OpenAI, oracle: tuple[str, list[float]]) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0)
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=MESSAGES, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    pieces = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(pieces) == oracle[0]
    assert sum(map(bool, pieces)) > 3
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason] == ["stop"]
    assert chunks[-1].usage == whole.usage


def test_the_clients_own_accumulation_of_a_stream(client: openai.OpenAI, oracle: tuple[str, list[float]]) -> None:
    with client.chat.completions.stream(model=MODEL, messages=MESSAGES, temperature=0) as stream:
        told = [event.type for event in stream]
        final = stream.get_final_completion()
    assert final.choices[0].message.content == oracle[0]
    assert "content.delta" in told
    assert told[-1] == "content.done"


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_are_transformers(
    client: openai.OpenAI, oracle: tuple[str, list[float]], stream: bool
) -> None:
    options: dict[str, Any] = {"temperature": 0, "logprobs": True, "top_logprobs": 3}
    if stream:
        chunks = client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True, **options)
        parts = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
        entries = [entry for part in parts for entry in part.content or []]
    else:
        logprobs = client.chat.completions.create(model=MODEL, messages=MESSAGES, **options).choices[0].logprobs
        assert logprobs is not None
        entries = logprobs.content or []
    text = b"".join(bytes(entry.bytes or []) for entry in entries).decode()
    assert text == oracle[0]
    for entry, expected in zip(entries, oracle[1], strict=False):
        assert abs(entry.logprob - expected) < CLOSE
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].token == entry.token  # greedy
        assert math.isclose(entry.top_logprobs[0].logprob, entry.logprob)


def test_a_seed_decides_and_choices_differ(client: openai.OpenAI) -> None:
    def ask(seed: int) -> list[str | None]:
        answer = client.chat.completions.create(
            model=MODEL, messages=MESSAGES, temperature=1.5, seed=seed, n=3, max_tokens=20
        )
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        return [choice.message.content for choice in answer.choices]

    first = ask(5)
    assert len(set(first)) == 3
    assert ask(5) == first
    assert ask(6) != first


def test_a_stop_string_ends_the_answer_before_it(client: openai.OpenAI, oracle: tuple[str, list[float]]) -> None:
    stop = oracle[0].split()[3]
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0, stop=[stop, "never"])
    assert answer.choices[0].message.content == oracle[0].partition(stop)[0]
    assert answer.choices[0].finish_reason == "stop"


def test_completions_of_several_prompts(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=["The", "An exception"], n=2, max_tokens=6, temperature=0, echo=True, logprobs=0
    )
    assert [choice.text[:2] for choice in answer.choices] == ["Th", "Th", "An", "An"]
    assert answer.choices[0].text == answer.choices[1].text
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert "".join(choice.logprobs.tokens or []) == choice.text


@pytest.mark.parametrize(
    ("options", "code", "param"),
    [
        ({"max_tokens": 100_000}, "context_length_exceeded", "max_tokens"),
        ({"messages": [{"role": "user", "content": "word " * 5000}]}, "context_length_exceeded", "messages"),
        ({"temperature": 3}, "less_than_equal", "temperature"),
        ({"messages": []}, "too_short", "messages"),
        ({"top_logprobs": 2}, None, "top_logprobs"),
    ],
)
def test_what_is_wrong_is_a_bad_request(
    client: openai.OpenAI, options: dict[str, Any], code: str | None, param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(**{"model": MODEL, "messages": MESSAGES, **options})
    assert (error.value.status_code, error.value.code, error.value.param) == (400, code, param)
    assert error.value.type == "invalid_request_error"


def test_another_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as error:
        client.chat.completions.create(model="other", messages=MESSAGES)
    assert error.value.code == "model_not_found"
    assert [card.id for card in client.models.list()] == [MODEL]


def test_a_timeout_of_the_client_ends_the_work(server: Served, client: openai.OpenAI) -> None:
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5).chat.completions.create(model=MODEL, messages=MESSAGES, **FOREVER)
    server.until(lambda: running(server) == 0, "nothing runs")


def test_a_closed_stream_ends_the_work(server: Served, client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True, **FOREVER)
    for number, _ in enumerate(stream):
        if number == 3:
            break
    assert running(server) == 1
    stream.close()
    server.until(lambda: running(server) == 0, "nothing runs")
