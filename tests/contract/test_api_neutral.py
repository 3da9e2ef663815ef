"""Values that mean "none" are taken in every field; what asks for something this server can't do is refused by name."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from tests.support.api_server import SERVED, serving
from tests.support.engine import FakeEngine
from tests.support.http import async_http

from lockstep_runtime.api.schemas import ChatRequest, CompletionRequest
from lockstep_runtime.protocol.step import SamplingParams

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
GREEDY = SamplingParams(temperature=0)  # what the example model's authors advise


@pytest.fixture
async def engine() -> FakeEngine:
    return FakeEngine(lambda _: [70, 71, 72], end=1)


@pytest.fixture
async def client(engine: FakeEngine) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(engine) as url, async_http(base_url=url) as client:
        yield client


def chat(**extra: Any) -> dict[str, Any]:
    return {"model": SERVED, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "seed": 0} | extra


def text(**extra: Any) -> dict[str, Any]:
    return {"model": SERVED, "prompt": "Hi", "max_tokens": 2, "seed": 0} | extra


async def asked(client: httpx.AsyncClient, engine: FakeEngine, path: str, body: dict[str, Any]) -> SamplingParams:
    response = await client.post(path, json=body)
    assert response.status_code == 200, (body, response.text)
    return engine.requests[-1].sampling


NONE: list[dict[str, Any]] = [
    {"logprobs": None},
    {"logprobs": False},
    {"stop": None},
    {"stop": ""},
    {"stop": []},
    {"stop": ["", ""]},
    {"stop_token_ids": None},
    {"stop_token_ids": []},
    {"top_k": None},
    {"top_k": 0},
    {"top_k": -1},
    {"top_p": None},
    {"top_p": 1},
    {"min_p": None},
    {"min_p": 0},
    {"temperature": None},
    {"n": None},
    {"ignore_eos": None},
    {"ignore_eos": False},
    {"ignore_eos": 0},
    {"stream": None},
    {"stream": False},
    {"stream_options": None},
    {"stream_options": {}},
    {"stream_options": {"include_usage": False}},
    {"stream_options": {"include_usage": None}},
    {"frequency_penalty": 0},
    {"frequency_penalty": None},
    {"presence_penalty": 0.0},
    {"repetition_penalty": 1},
    {"logit_bias": {}},
    {"logit_bias": None},
    {"best_of": None},
    {"best_of": 1},
    {"min_tokens": 0},
    {"use_beam_search": False},
    {"bad_words": []},
    {"allowed_token_ids": None},
    {"logits_processors": []},
    {"skip_special_tokens": True},
    {"include_stop_str_in_output": 0},
    {"prompt_logprobs": None},
    {"response_format": None},
    {"response_format": {"type": "text"}},
    {"guided_json": None},
    {"guided_choice": []},
    {"guided_regex": ""},
    {"structured_outputs": None},
    {"priority": 0},
    {"user": ""},
    {"metadata": None},
    {"service_tier": None},
    {"truncate_prompt_tokens": None},
    {"length_penalty": 1.0},
]
CHAT_ONLY: list[dict[str, Any]] = [
    {"top_logprobs": 0},
    {"top_logprobs": None},
    {"logprobs": False, "top_logprobs": 0},
    {"logprobs": 0},
    {"max_completion_tokens": None},
    {"max_tokens": None},
    {"tools": []},
    {"tools": None, "tool_choice": None},
    {"tool_choice": "none"},
    {"tool_choice": "auto"},
    {"functions": [], "function_call": "none"},
    {"parallel_tool_calls": False},
    {"modalities": ["text"]},
    {"reasoning_effort": None},
    {"chat_template_kwargs": None},
    {"chat_template_kwargs": {}},
    {"add_generation_prompt": None},
    {"continue_final_message": False},
    {"documents": []},
    {"echo": False},
    {"audio": None},
]
TEXT_ONLY: list[dict[str, Any]] = [
    {"suffix": ""},
    {"suffix": None},
    {"echo": None},
    {"echo": 0},
    {"max_tokens": None},
    {"add_special_tokens": None},
    {"prompt_embeds": None},
]


async def test_none_in_a_chat(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    for number, fields in enumerate(NONE + CHAT_ONLY, 1):
        assert await asked(client, engine, CHAT, chat(**fields)) == GREEDY, fields
        assert len(engine.requests) == number


async def test_none_in_a_completion(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    for number, fields in enumerate(NONE + TEXT_ONLY, 1):
        assert await asked(client, engine, TEXT, text(**fields)) == GREEDY, fields
        assert len(engine.requests) == number


async def test_no_nucleus_is_the_likeliest_token(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    sampling = await asked(client, engine, CHAT, chat(top_p=0, temperature=1, top_k=50))
    assert (sampling.top_p, sampling.top_k, sampling.temperature) == (1, 1, 1)


async def test_null_seed_is_another_each_time(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    seeds = {(await asked(client, engine, CHAT, chat(seed=None))).seed for _ in range(3)}
    assert len(seeds) == 3


async def test_zero_log_probabilities_are_those_of_the_drawn_tokens(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    assert (await asked(client, engine, TEXT, text(logprobs=0))).logprobs == 0
    assert (await asked(client, engine, CHAT, chat(logprobs=True, top_logprobs=0))).logprobs == 0


ASKING: list[dict[str, Any]] = [
    {"use_beam_search": True},
    {"prompt_logprobs": 1},
    {"prompt_logprobs": 0},  # vLLM gives the prompt's own
    {"allowed_token_ids": [5]},
    {"priority": 1},
    {"return_tokens_as_token_ids": True},
    {"truncate_prompt_tokens": 5},
]


async def test_what_asks_for_something_is_refused_by_name(client: httpx.AsyncClient) -> None:
    for fields in ASKING:
        [name] = fields
        for path, body in ((CHAT, chat(**fields)), (TEXT, text(**fields))):
            response = await client.post(path, json=body)
            error = response.json()["error"]
            assert (response.status_code, error["param"]) == (400, name), fields
            assert (error["code"], f"`{name}`" in error["message"]) == ("unsupported_parameter", True)


def test_the_schema_says_what_is_taken() -> None:
    for kind in (ChatRequest, CompletionRequest):
        properties = kind.model_json_schema()["properties"]
        assert properties["priority"]["enum"] == [None, 0]
        assert {"type": "null"} in properties["stop"]["anyOf"]
