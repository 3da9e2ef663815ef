"""Penalties, biases and least numbers of tokens on their way to the engine, and what stop strings mean beside them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from tests.support.api_bodies import CHAT, TEXT, TOKENIZER, chat, engine, text
from tests.support.api_server import serving
from tests.support.engine import FakeEngine
from tests.support.http import async_http

from lockstep_runtime.protocol.step import LogitRules


@pytest.fixture
def answering() -> FakeEngine:
    return engine(TOKENIZER.encode("one stop two stop three"))


@pytest.fixture
async def client(answering: FakeEngine) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(answering) as url, async_http(base_url=url) as client:
        yield client


@pytest.mark.parametrize(
    ("fields", "rules"),
    [
        ({}, None),
        ({"frequency_penalty": 0, "presence_penalty": 0.0, "repetition_penalty": 1, "min_tokens": 0}, None),
        ({"frequency_penalty": None, "logit_bias": {}, "min_tokens": None}, None),
        (
            {"frequency_penalty": -2, "presence_penalty": 2, "repetition_penalty": 1.2},
            LogitRules(frequency_penalty=-2.0, presence_penalty=2.0, repetition_penalty=1.2),
        ),
        ({"logit_bias": {"5": -100, "007": 0.5}}, LogitRules(bias={5: -100.0, 7: 0.5})),
        (
            {"min_tokens": 3, "stop_token_ids": [9], "ignore_eos": True},
            LogitRules(min_tokens=3, end_ids=[9, 2045, 2047]),  # tiny-chat's own, too
        ),
    ],
    ids=str,
)
async def test_the_engine_is_asked_for_them(
    client: httpx.AsyncClient, answering: FakeEngine, fields: dict[str, Any], rules: LogitRules | None
) -> None:
    for path, body in ((CHAT, chat(**fields)), (TEXT, text(**fields))):
        assert (await client.post(path, json=body)).status_code == 200
    assert [request.rules for request in answering.requests] == [rules, rules]


async def test_a_stop_string_counts_from_the_least_number_of_tokens_on(client: httpx.AsyncClient) -> None:
    least = len(TOKENIZER.encode("one stop"))
    for stream in (False, True):
        fields = {"stop": "stop", "max_tokens": 50, "stream": stream}
        early = await client.post(TEXT, json=text(**fields))
        late = await client.post(TEXT, json=text(**fields, min_tokens=least))
        assert "one" in early.text
        assert "two" not in early.text
        assert "two" in late.text
        assert "three" not in late.text
