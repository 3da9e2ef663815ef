"""What /openapi.json says is what the server does; HEAD wherever GET is; other pages' scripts by a flag."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest
from tests.support.api_server import SERVED, serving
from tests.support.engine import FakeEngine
from tests.support.http import async_http

from lockstep_runtime.api.limits import Limits
from lockstep_runtime.api.neutral import REFUSED
from lockstep_runtime.api.schemas import ChatRequest, CompletionRequest
from lockstep_runtime.engine.client import Readiness

CHAT = "/v1/chat/completions"
GETS = ["/health", "/ready", "/metrics", "/v1/models", f"/v1/models/{SERVED}", "/openapi.json", "/docs"]


def engine() -> FakeEngine:
    return FakeEngine(lambda _: [70, 71, 72], end=1)


def chat(**extra: Any) -> dict[str, Any]:
    return {"model": SERVED, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2} | extra


@pytest.mark.parametrize("path", GETS)
async def test_head_is_get_without_its_body(path: str) -> None:
    async with serving(engine()) as url, async_http(base_url=url) as client:
        got, headed = await client.get(path), await client.head(path)
        assert (got.status_code, headed.status_code, headed.content) == (200, 200, b"")
        assert headed.headers["content-type"] == got.headers["content-type"]


async def test_curl_too(tmp_path: Path) -> None:
    async with serving(engine()) as url:
        for path in ("/health", "/v1/models"):
            curl = await asyncio.create_subprocess_exec(
                "curl", "--silent", "--head", "--max-time", "20", url + path, stdout=asyncio.subprocess.PIPE
            )
            headers, _ = await curl.communicate()
            assert curl.returncode == 0
            assert headers.startswith(b"HTTP/1.1 200 OK")
        body = tmp_path / "body.json"
        body.write_text(json.dumps(chat(stream=True)))
        curl = await asyncio.create_subprocess_exec(
            "curl", "--silent", "--no-buffer", "--max-time", "20", "--json", f"@{body}", url + CHAT,
            stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        events, _ = await curl.communicate()
        assert (curl.returncode, events.endswith(b"data: [DONE]\n\n")) == (0, True)


async def test_head_of_what_is_not_ready_or_not_there() -> None:
    fake = engine()
    async with serving(fake, api_key="secret") as url, async_http(base_url=url) as client:
        assert (await client.head("/v1/models")).status_code == 401
        assert (await client.head("/nowhere")).status_code == 404
        posted = await client.head(CHAT, headers={"Authorization": "Bearer secret"})
        assert (posted.status_code, posted.headers["allow"]) == (405, "POST")
        fake.state = Readiness(False, "rank 1 is loading")
        assert (await client.head("/ready")).status_code == 503


async def test_a_method_that_is_not_there_says_which_are() -> None:
    async with serving(engine()) as url, async_http(base_url=url) as client:
        for path, allowed in (("/health", "GET, HEAD"), (CHAT, "POST"), ("/v1/models", "GET, HEAD")):
            response = await client.delete(path)
            assert (response.status_code, response.headers["allow"]) == (405, allowed)
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}


async def test_the_schema_names_bodies_answers_and_errors() -> None:
    async with serving(engine(), api_key="secret") as url, async_http(base_url=url) as client:
        document = (await client.get("/openapi.json")).json()
        docs = await client.get("/docs")
    assert (docs.status_code, docs.headers["content-type"]) == (200, "text/html; charset=utf-8")
    schemas = document["components"]["schemas"]
    references = set(_references(document))
    assert references <= {f"#/components/schemas/{name}" for name in schemas}
    operation = document["paths"][CHAT]["post"]
    body = operation["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/ChatRequest"}
    assert {"model", "messages", "temperature", "logit_bias"} <= set(schemas["ChatRequest"]["properties"])
    assert schemas["ChatRequest"]["required"] == ["model", "messages"]
    assert schemas["ChatRequest"]["properties"]["model"]["enum"] == [SERVED]
    assert schemas["Detokenize"]["properties"]["model"]["enum"] == [SERVED, None]
    assert set(operation["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    for status in ("400", "401", "404", "408", "413", "415", "500", "503", "default"):
        assert operation["responses"][status]["content"]["application/json"]["schema"] == {
            "$ref": "#/components/schemas/ErrorBody"
        }
    assert not any("422" in one["responses"] for path in document["paths"].values() for one in path.values())
    assert operation["security"] == [{"key": []}]
    assert "security" not in document["paths"]["/health"]["get"]


def _references(value: object) -> list[str]:
    if isinstance(value, dict):
        own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
        return own + [one for inner in value.values() for one in _references(inner)]
    return [one for inner in value for one in _references(inner)] if isinstance(value, list) else []


async def test_answers_have_no_field_that_the_schema_lacks() -> None:
    async with serving(engine()) as url, async_http(base_url=url) as client:
        schemas = (await client.get("/openapi.json")).json()["components"]["schemas"]
        answer = (await client.post(CHAT, json=chat(logprobs=True, top_logprobs=2))).json()
        text = (await client.post("/v1/completions", json={"model": SERVED, "prompt": "Hi", "logprobs": 2})).json()
        card = (await client.get(f"/v1/models/{SERVED}")).json()
        error = (await client.post(CHAT, json={})).json()
    _fits(answer, schemas["ChatCompletion"], schemas)
    _fits(text, schemas["Completion"], schemas)
    _fits(card, schemas["ModelCard"], schemas)
    _fits(error, schemas["ErrorBody"], schemas)


def _fits(value: Any, schema: dict[str, Any], schemas: dict[str, Any]) -> None:
    """Every field is named by the schema, and every required one is there."""
    options = [schema, *schema.get("anyOf", [])]
    names = [one["$ref"].rpartition("/")[2] for one in options if "$ref" in one]
    if names and value is not None:
        return _fits(value, schemas[names[0]], schemas)
    if isinstance(value, list):
        [items] = [one["items"] for one in options if "items" in one]
        for item in value:
            _fits(item, items, schemas)
    elif isinstance(value, dict) and "properties" in schema:
        assert set(schema.get("required", ())) <= set(value) <= set(schema["properties"]), schema["title"]
        for name, inner in value.items():
            _fits(inner, schema["properties"][name], schemas)
    return None


def test_the_document_names_every_field() -> None:
    text = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    named = set(re.findall(r"`([a-z_]+)`", text))
    taken = {name for kind in (ChatRequest, CompletionRequest) for name in kind.model_fields}
    assert taken | set(REFUSED) <= named
    [refused] = re.findall(r"Refused unless they ask for nothing: (.*?)\.\n", text, re.DOTALL)
    assert set(re.findall(r"`([a-z_]+)`", refused)) == set(REFUSED)


async def test_another_pages_scripts_may_call_only_where_that_was_said() -> None:
    ours, other = "https://chat.example.com", "https://evil.example.com"
    async with serving(engine()) as url, async_http(base_url=url) as client:
        preflight = await client.options(CHAT, headers=_preflight(ours))
        assert preflight.status_code == 405
        answer = await client.post(CHAT, json=chat(), headers={"Origin": ours})
        assert "access-control-allow-origin" not in answer.headers
    async with (
        serving(engine(), api_key="secret", cors=(ours,)) as url,
        async_http(base_url=url) as client,
    ):
        preflight = await client.options(CHAT, headers=_preflight(ours))
        assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (200, ours)
        assert "authorization" in preflight.headers["access-control-allow-headers"]
        assert (await client.options(CHAT, headers=_preflight(other))).status_code == 400
        for headers, status in (({"Authorization": "Bearer secret"}, 200), ({}, 401)):
            answer = await client.post(CHAT, json=chat(stream=True), headers={"Origin": ours, **headers})
            assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, ours)
        answer = await client.get("/health", headers={"Origin": other})
        assert "access-control-allow-origin" not in answer.headers
    async with serving(engine(), cors=("*",)) as url, async_http(base_url=url) as client:
        assert (await client.get("/health", headers={"Origin": other})).headers["access-control-allow-origin"] == "*"


def _preflight(origin: str) -> dict[str, str]:
    return {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, content-type",
    }


async def test_an_errors_words_are_bounded() -> None:
    async with serving(engine(), limits=Limits()) as url, async_http(base_url=url) as client:
        long = "x" * 100_000
        for body in (
            chat(model=long),
            chat(messages=[{"role": long}]),
            chat(response_format={"type": long}),
            chat(stop=[long]),
        ):
            response = await client.post(CHAT, json=body)
            assert response.status_code in (400, 404)
            assert len(response.content) < 5000
