"""A wrong field is named; what asks for nothing is taken; what nobody knows is ignored."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from tests.support.api_bodies import CHAT, TEXT, TOKENIZER, chat, engine, error_of, text
from tests.support.api_server import SERVED, serving
from tests.support.http import async_http


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with serving(engine()) as url, async_http(base_url=url) as client:
        yield client


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (chat(temperature=-1), "temperature"),
        (chat(temperature=2.5), "temperature"),
        (chat(temperature="hot"), "temperature"),
        (chat(temperature=True), "temperature"),
        (chat(top_p=-0.1), "top_p"),
        (chat(top_p=1.1), "top_p"),
        (chat(top_k=-2), "top_k"),
        (chat(min_p=1.5), "min_p"),
        (chat(frequency_penalty=2.1), "frequency_penalty"),
        (chat(frequency_penalty=False), "frequency_penalty"),
        (text(presence_penalty=-2.1), "presence_penalty"),
        (chat(presence_penalty="0"), "presence_penalty"),
        (chat(repetition_penalty=0), "repetition_penalty"),
        (chat(repetition_penalty=-1), "repetition_penalty"),
        (chat(repetition_penalty=True), "repetition_penalty"),
        (chat(logit_bias={"5": 101}), "logit_bias"),
        (chat(logit_bias={"5": "1"}), "logit_bias"),
        (chat(logit_bias={"-5": 1}), "logit_bias"),
        (chat(logit_bias={"five": 1}), "logit_bias"),
        (chat(logit_bias={"\u0665": 1}), "logit_bias"),
        (chat(logit_bias={"2048": 1}), "logit_bias"),  # the vocabulary ends before it
        (chat(logit_bias={str(token): 1 for token in range(1025)}), "logit_bias"),
        (chat(logit_bias=0), "logit_bias"),
        (chat(min_tokens=-1), "min_tokens"),
        (chat(min_tokens=6, max_tokens=5), "min_tokens"),
        (text(min_tokens=17), "min_tokens"),
        (chat(n=0), "n"),
        (chat(n=17), "n"),
        (chat(n=10**40), "n"),
        (chat(best_of=0), "best_of"),
        (chat(best_of=True), "best_of"),
        (chat(skip_special_tokens="no"), "skip_special_tokens"),
        (chat(include_stop_str_in_output=2), "include_stop_str_in_output"),
        (chat(continue_final_message="yes"), "continue_final_message"),
        (chat(add_special_tokens="yes"), "add_special_tokens"),
        (chat(echo="yes"), "echo"),
        (chat(max_tokens=0), "max_tokens"),
        (chat(max_completion_tokens=1.5), "max_completion_tokens"),
        (chat(seed=2**64), "seed"),
        (chat(stop=["a"] * 17), "stop"),
        (chat(stop=5), "stop"),
        (chat(stop=[None]), "stop[0]"),
        (chat(stop_token_ids=[1] * 65), "stop_token_ids"),
        (chat(ignore_eos=2), "ignore_eos"),
        (chat(stop=["x" * 300]), "stop[0]"),
        (chat(stop_token_ids=["a"]), "stop_token_ids[0]"),
        (chat(logprobs=5), "logprobs"),
        (chat(top_logprobs=5), "top_logprobs"),
        (chat(logprobs=True, top_logprobs=21), "top_logprobs"),
        (chat(stream="yes"), "stream"),
        (chat(stream_options={"include_usage": True}), "stream_options"),
        (chat(messages=[]), "messages"),
        (chat(messages="Hi"), "messages"),
        (chat(messages=[{"role": "king", "content": "Hi"}]), "messages[0].role"),
        (chat(messages=[{"content": "Hi"}]), "messages[0].role"),
        (chat(messages=[{"role": "user", "content": 5}]), "messages[0].content"),
        (chat(messages=[{"role": "user", "content": [5]}]), "messages[0].content"),
        (chat(messages=[{"role": "user", "content": [{"type": "text"}]}]), "messages[0].content"),
        (chat(chat_template_kwargs={"messages": []}), "chat_template_kwargs"),
        ({"model": SERVED}, "messages"),
        ({"messages": []}, "model"),
        (chat(model=None), "model"),
        (text(prompt=[]), "prompt"),
        (text(prompt=""), "prompt"),
        (text(prompt=None), "prompt"),
        (text(prompt=[-1]), "prompt"),
        (text(prompt=[TOKENIZER.size]), "prompt"),
        (text(prompt=[True]), "prompt"),
        (text(prompt=["a", 5]), "prompt"),
        (text(prompt=[[]]), "prompt"),
        (text(prompt=["a"] * 129), "prompt"),
        (text(prompt=["a"] * 100, n=2), "n"),
        (text(logprobs=21), "logprobs"),
        (text(logprobs=True), "logprobs"),
        (text(logprobs=-1), "logprobs"),
        (text(max_tokens=-1), "max_tokens"),
    ],
)
async def test_a_wrong_field_is_named(client: httpx.AsyncClient, body: dict[str, Any], param: str) -> None:
    response = await client.post(TEXT if "prompt" in body else CHAT, json=body)
    assert response.status_code == 400
    assert error_of(response)["param"] == param


@pytest.mark.parametrize(
    ("field", "neutral", "asking"),
    [
        ("functions", [], [{"name": "f"}]),
        ("function_call", "none", {"name": "f"}),
    ],
)
async def test_what_is_not_built_is_taken_only_when_it_asks_for_nothing(
    client: httpx.AsyncClient, field: str, neutral: object, asking: object
) -> None:
    assert (await client.post(CHAT, json=chat(**{field: neutral}))).status_code == 200
    response = await client.post(CHAT, json=chat(**{field: asking}))
    assert response.status_code == 400
    assert (error_of(response)["param"], error_of(response)["code"]) == (field, "unsupported_parameter")


async def test_unknown_fields_are_ignored(client: httpx.AsyncClient) -> None:
    response = await client.post(CHAT, json=chat(user="me", metadata={"a": "b"}, brand_new=[1]))
    assert response.status_code == 200


async def test_parts_of_text_are_joined_and_others_refused(client: httpx.AsyncClient) -> None:
    parts: list[dict[str, Any]] = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    joined = await client.post(CHAT, json=chat(messages=[{"role": "user", "content": parts}]))
    plain = await client.post(CHAT, json=chat(messages=[{"role": "user", "content": "one\ntwo"}]))
    assert joined.json()["usage"] == plain.json()["usage"]
    parts.append({"type": "image_url", "image_url": {"url": "data:image/png;base64,"}})
    response = await client.post(CHAT, json=chat(messages=[{"role": "user", "content": parts}]))
    assert response.status_code == 400
    assert "takes text only" in error_of(response)["message"]


async def test_a_developer_is_the_system(client: httpx.AsyncClient) -> None:
    developer = await client.post(CHAT, json=chat(messages=[{"role": "developer", "content": "Hi"}]))
    system = await client.post(CHAT, json=chat(messages=[{"role": "system", "content": "Hi"}]))
    assert developer.json()["usage"] == system.json()["usage"]


@pytest.mark.parametrize(
    ("whole", "floating"),
    [
        (chat(max_tokens=2, n=2, seed=5, top_k=3, logprobs=True, top_logprobs=2),
         chat(max_tokens=2.0, n=2.0, seed=5.0, top_k=3.0, logprobs=True, top_logprobs=2.0)),
        (text(prompt=[70, 71], stop_token_ids=[5], logprobs=1, seed=1),
         text(prompt=[70.0, 71], stop_token_ids=[5.0], logprobs=1.0, seed=1)),
        (text(prompt=[[70], [71]], seed=1, min_tokens=1), text(prompt=[[70.0], [71]], seed=1, min_tokens=1.0)),
    ],
)  # fmt: skip
async def test_a_whole_number_may_be_written_with_a_point(whole: dict[str, Any], floating: dict[str, Any]) -> None:
    """As JSON Schema has it; Python's division makes such numbers."""
    fake = engine()
    path = CHAT if "messages" in whole else TEXT
    async with serving(fake) as url, async_http(base_url=url) as client:
        answers = [(await client.post(path, json=body)).json()["choices"] for body in (whole, floating)]
    assert answers[0] == answers[1]
    half = len(fake.requests) // 2
    asked = [(one.prompt, one.max_tokens, one.sampling, one.stop_token_ids) for one in fake.requests]
    assert asked[:half] == asked[half:]


async def test_a_number_with_a_fraction_is_no_token(client: httpx.AsyncClient) -> None:
    for path, body, param in (
        (TEXT, text(prompt=[70.5]), "prompt"),
        (TEXT, text(stop_token_ids=[5.5]), "stop_token_ids[0]"),
        ("/detokenize", {"tokens": [1.5]}, "tokens"),
    ):
        response = await client.post(path, json=body)
        assert (response.status_code, error_of(response)["param"]) == (400, param)
    assert (await client.post("/detokenize", json={"tokens": [70.0]})).json() == {"prompt": TOKENIZER.decode([70])}
