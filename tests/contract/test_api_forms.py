"""Forms of answers on their way to the engine: what is asked for, what can't be, and what a hostile one costs."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from tests.support.api_bodies import CHAT, TEXT, chat, engine, error_of, text
from tests.support.api_server import serving
from tests.support.engine import FakeEngine
from tests.support.http import async_http

from lockstep_runtime.protocol.step import Grammar

ENDS = (2045, 2047)  # tiny-chat's
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
SCHEMA_TEXT = json.dumps(SCHEMA, separators=(",", ":"))


@pytest.fixture
def answering() -> FakeEngine:
    return engine()


@pytest.fixture
async def client(answering: FakeEngine) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(answering) as url, async_http(base_url=url, timeout=120) as client:
        yield client


def of_schema(schema: Any, **more: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **more}}}


@pytest.mark.parametrize(
    ("fields", "kind", "wanted"),
    [
        (of_schema(SCHEMA), "json_schema", SCHEMA_TEXT),
        (of_schema(SCHEMA, strict=True, description="an a"), "json_schema", SCHEMA_TEXT),
        ({"response_format": {"type": "json_object"}}, "json_schema", '{"type":"object"}'),
        ({"guided_json": SCHEMA}, "json_schema", SCHEMA_TEXT),
        ({"guided_json": json.dumps(SCHEMA)}, "json_schema", json.dumps(SCHEMA)),
        ({"guided_regex": r"\d+"}, "regex", r"\d+"),
        ({"guided_choice": ['a "b"', "é\n"]}, "lark", 'start: "a \\"b\\"" | "é\\n"'),
        ({"guided_grammar": 'root ::= "a"'}, "gbnf", 'root ::= "a"'),
        ({"guided_grammar": 'start: "a"'}, "lark", 'start: "a"'),
        ({"structured_outputs": {"json": SCHEMA}}, "json_schema", SCHEMA_TEXT),
        ({"structured_outputs": {"regex": "a+"}}, "regex", "a+"),
        ({"structured_outputs": {"choice": ["a"]}}, "lark", 'start: "a"'),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, "lark", 'start: "a"'),
        ({"structured_outputs": {"json_object": True}}, "json_schema", '{"type":"object"}'),
    ],
    ids=str,
)
async def test_the_engine_is_asked_for_them(
    client: httpx.AsyncClient, answering: FakeEngine, fields: dict[str, Any], kind: Any, wanted: str
) -> None:
    for path, body in ((CHAT, chat(**fields)), (TEXT, text(**fields, ignore_eos=True))):
        response = await client.post(path, json=body)
        assert response.status_code == 200, response.text
    for request in answering.requests:
        assert request.rules is not None
        assert request.rules.grammar == Grammar(kind=kind, text=wanted, end_ids=ENDS)
        assert request.stop_token_ids == frozenset(ENDS), "a complete answer ends, though ends are ignored"


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        (of_schema({"type": "quaternion"}), "response_format", "quaternion"),
        (of_schema({"type": "integer", "minimum": 5, "maximum": 1}), "response_format", "nsatisfiable"),
        (of_schema([]), "response_format.json_schema.schema", "dictionary"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_object"),
        ({"response_format": "json"}, "response_format", ""),
        ({"guided_json": "{"}, "guided_json", ""),
        ({"guided_json": "[" * 3000}, "guided_json", "recursion limit"),
        ({"guided_regex": "a("}, "guided_regex", "unclosed group"),
        ({"guided_choice": [1]}, "guided_choice[0]", "string"),
        ({"guided_choice": ["a"] * 4097}, "guided_choice", "4096"),
        ({"guided_grammar": "root ::= ("}, "guided_grammar", ""),
        ({"guided_grammar": "root ::= " + "(" * 20_000}, "guided_grammar", ""),
        ({"guided_grammar": "start: a"}, "guided_grammar", "a"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "two forms"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag", "None"),
        ({"guided_regex": "a", **of_schema(SCHEMA)}, "guided_regex", "two forms"),
        ({"guided_regex": "a" * 70_000}, "guided_regex", "65536 bytes"),
        ({"guided_json": {"type": "integer", "multipleOf": 999_983}}, "guided_json", "too complex"),
        ({"guided_json": {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}}, "guided_json", ""),
    ],
    ids=lambda value: str(value)[:60],
)
async def test_what_can_not_be_used_is_refused_with_the_reason(
    client: httpx.AsyncClient, answering: FakeEngine, fields: dict[str, Any], param: str, words: str
) -> None:
    body = json.dumps(chat(**fields)).encode()
    response = await client.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    assert (response.status_code, error_of(response)["param"]) == (400, param), response.text
    assert words in error_of(response)["message"]
    assert len(error_of(response)["message"]) < 500
    assert not answering.requests


async def test_a_hostile_schema_holds_up_nobody_else(client: httpx.AsyncClient) -> None:
    hostile = [client.post(CHAT, json=chat(guided_json={"multipleOf": 999_983 + 2 * number})) for number in range(3)]
    waiting = [asyncio.create_task(one) for one in hostile]
    await client.post(CHAT, json=chat())
    longest = 0.0
    while not all(task.done() for task in waiting):
        began = time.monotonic()
        assert (await client.post(CHAT, json=chat())).status_code == 200
        longest = max(longest, time.monotonic() - began)
    assert [task.result().status_code for task in waiting] == [400] * 3
    assert longest < 5


@pytest.mark.parametrize("fields", [{"response_format": None}, {"response_format": {"type": "text"}},
                                    {"response_format": {}}, {"guided_json": None}, {"guided_json": {}},
                                    {"guided_choice": []}, {"guided_regex": ""}, {"guided_grammar": ""},
                                    {"structured_outputs": None}, {"structured_outputs": {}}], ids=str)  # fmt: skip
async def test_what_asks_for_no_form_is_taken(
    client: httpx.AsyncClient, answering: FakeEngine, fields: dict[str, Any]
) -> None:
    assert (await client.post(CHAT, json=chat(**fields))).status_code == 200
    assert [request.rules for request in answering.requests] == [None]
