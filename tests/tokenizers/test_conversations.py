"""Conversations become transformers' prompts, and answers stream to its decoding. `make test-tokenizers` fetches what
this needs."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from functools import cache
from typing import Any

import httpx
import pytest
from tests.support.api_server import SERVED, serving
from tests.support.engine import FakeEngine
from tests.support.http import async_http
from tests.tokenizers import conversations
from tests.tokenizers.conversations import Conversation
from tests.tokenizers.test_real import TEXTS, folder, oracle, served

from lockstep_runtime.api.chat_prompt import chat_prompt
from lockstep_runtime.api.errors import ApiError
from lockstep_runtime.api.limits import Limits
from lockstep_runtime.api.model import ServedModel
from lockstep_runtime.api.schemas import ChatRequest, validate

model = cache(served)
expected = cache(oracle)
Opened = tuple[httpx.AsyncClient, Callable[[list[int]], None]]
CHAT = "/v1/chat/completions"
WRITTEN = [
    *TEXTS,
    conversations.CODE,
    conversations.ARABIC,
    conversations.HEBREW,
    conversations.EMOJI * 3,
    conversations.ASIAN,
    conversations.SPACES,
]


def prompt(known: ServedModel, conversation: Conversation) -> list[int]:
    request = validate(ChatRequest, {"model": "m", **conversation})
    return chat_prompt(known, request, Limits(), most=100_000).ids


def test_there_are_thirty() -> None:
    assert len(conversations.ALL) == 30


@pytest.mark.parametrize("number", range(len(conversations.ALL)))
def test_qwen3s_prompts_are_transformers(number: int) -> None:
    conversation = conversations.ALL[number]
    messages, settings = conversations.for_transformers(conversation)
    ids = expected("qwen3").apply_chat_template(messages, return_dict=False, **settings)
    assert prompt(model("qwen3"), conversation) == ids


@pytest.mark.parametrize("number", range(len(conversations.ALL)))
def test_llama3s_prompts_are_transformers(number: int) -> None:
    """Its template tells the model of no tools, so they are refused, and it skips calls."""
    conversation = conversations.ALL[number]
    if conversation in conversations.WITH_TOOLS:
        with pytest.raises(ApiError, match="tells the model of none"):
            prompt(model("llama3"), conversation)
        conversation = {name: value for name, value in conversation.items() if name != "tools"}
    messages, settings = conversations.for_transformers(conversation)
    ids = expected("llama3").apply_chat_template(messages, return_dict=False, **settings)
    assert prompt(model("llama3"), conversation) == ids


@pytest.mark.parametrize("name", ["qwen3", "llama3"])
@pytest.mark.parametrize("last", ["It is ", "It", "", "```python\n", conversations.EMOJI, conversations.ARABIC + " "])
def test_a_message_is_continued_as_in_transformers(name: str, last: str) -> None:
    messages = [conversations.user("Hi"), conversations.assistant(last)]
    settings = {"add_generation_prompt": False, "continue_final_message": True}
    ids = expected(name).apply_chat_template(messages, return_dict=False, **settings)
    assert prompt(model(name), {"messages": messages, "continue_final_message": True}) == ids


@pytest.fixture
async def opened(
    request: pytest.FixtureRequest,
) -> AsyncIterator[tuple[httpx.AsyncClient, Callable[[list[int]], None]]]:
    """A client, and a way to say what the model answers."""
    answer: list[int] = []
    end = served(request.param).tokenizer.size  # no token at all
    fake = FakeEngine(lambda _: answer, end, max_model_len=100_000)

    def says(ids: list[int]) -> None:
        answer[:] = ids

    async with serving(fake, model=folder(request.param)) as url, async_http(base_url=url) as client:
        yield client, says


async def streamed(client: httpx.AsyncClient, count: int, **fields: Any) -> list[dict[str, Any]]:
    body = {"model": SERVED, "messages": [conversations.user("Hi")], "stream": True, "max_tokens": count, **fields}
    text = (await client.post(CHAT, json=body)).text
    events = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: {")]
    return [event["choices"][0]["delta"] for event in events]


@pytest.mark.parametrize(("opened", "name"), [("qwen3", "qwen3"), ("llama3", "llama3")], indirect=["opened"])
async def test_streamed_text_joins_to_transformers_decoding(opened: Opened, name: str) -> None:
    client, says = opened
    for written in filter(None, WRITTEN):
        ids = expected(name).encode(written, add_special_tokens=False)
        says(ids)
        for fields in ({}, {"tools": [conversations.WEATHER]} if name == "qwen3" else {}):
            deltas = await streamed(client, len(ids), **fields)
            joined = "".join(delta.get("content") or "" for delta in deltas)
            assert joined == expected(name).decode(ids, skip_special_tokens=True)


MESSAGES = [
    conversations.assistant("I look. 🎉", conversations.ZURICH, conversations.ODD, reasoning_content="hm\n\nha"),
    conversations.assistant("", conversations.TOKYO, reasoning_content=conversations.ARABIC),
    conversations.assistant(conversations.ASIAN, reasoning_content=conversations.CODE.strip()),
]


@pytest.mark.parametrize("opened", ["qwen3"], indirect=True)
async def test_an_answer_is_what_the_template_would_write_of_it(opened: Opened) -> None:
    """What Qwen3's template makes of a message is streamed as that message."""
    client, says = opened
    for message in MESSAGES:
        chat = conversations.chat(conversations.user("Hi"), message, add_generation_prompt=False)
        messages, settings = conversations.for_transformers(chat)
        text = expected("qwen3").apply_chat_template(messages, tokenize=False, **settings)
        written = text.split("<|im_start|>assistant\n")[1].removesuffix("<|im_end|>\n")
        ids = expected("qwen3").encode(written, add_special_tokens=False)
        says(ids)
        deltas = await streamed(client, len(ids), tools=conversations.TOOLS)
        assert "".join(delta.get("content") or "" for delta in deltas) == message["content"]
        assert "".join(delta.get("reasoning_content") or "" for delta in deltas) == message["reasoning_content"]
        wanted = [call["function"] for call in messages[1].get("tool_calls", [])]
        assert calls(deltas) == [(function["name"], function["arguments"]) for function in wanted]


def calls(deltas: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    found: dict[int, list[str]] = {}
    for call in (call for delta in deltas for call in delta.get("tool_calls", [])):
        entry = found.setdefault(call["index"], [call["function"].get("name", ""), ""])
        entry[1] += call["function"]["arguments"]
    return [(name, json.loads(arguments)) for name, arguments in found.values()]
