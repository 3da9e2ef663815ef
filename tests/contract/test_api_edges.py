"""What stands around the answers: who may ask, how much, when the server is not there yet or soon no more."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.support.api_bodies import CHAT, END, JSON, TEXT, chat, engine, error_of, text
from tests.support.api_server import SERVED, TINY_CHAT, serving
from tests.support.engine import FakeEngine, eventually
from tests.support.http import async_http

from lockstep_runtime.api.limits import Limits
from lockstep_runtime.config import EngineLimits
from lockstep_runtime.engine.client import EngineBusyError, Readiness

MALFORMED_BODIES = 1000
SEED = 20261121


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with serving(engine()) as url, async_http(base_url=url) as client:
        yield client


async def test_health_ready_and_nothing_else(client: httpx.AsyncClient) -> None:
    assert (await client.get("/health")).status_code == 200
    assert (await client.get("/ready")).json() == {"ready": True, "reason": "all 2 ranks are in step"}
    for path in ("/redoc", "/", "/v1", "/v2/chat/completions"):
        response = await client.get(path)
        assert response.status_code == 404
        assert path in error_of(response)["message"]


async def test_another_method_is_405_and_says_which(client: httpx.AsyncClient) -> None:
    response = await client.get(CHAT)
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    error_of(response)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b'{"model": "\xff"}',
        b'{"model": "\\ud800"}',
        b'{"model": NaN}',
        b'{"temperature": Infinity}',
        b'{"temperature": 1e999}',
        b'{"model": "a"} trailing',
        b"\x00",
        b"[" * 10_000,
        b'{"a":' * 33 + b"1" + b"}" * 33,
        b'{"messages":' + b"[" * 5_000 + b"]" * 5_000 + b"}",
    ],
)
async def test_what_is_no_json_object_is_400(client: httpx.AsyncClient, body: bytes) -> None:
    response = await client.post(CHAT, content=body, headers=JSON)
    assert response.status_code == 400
    assert error_of(response)["code"] == "invalid_json"


async def test_a_text_with_nul_is_text(client: httpx.AsyncClient) -> None:
    response = await client.post(TEXT, json=text(prompt="a\0b"))
    assert response.status_code == 200


async def test_other_content_types_are_415(client: httpx.AsyncClient) -> None:
    body = json.dumps(chat()).encode()
    for headers in ({"Content-Type": "text/plain"}, {}, {**JSON, "Content-Encoding": "gzip"}):
        response = await client.post(CHAT, content=body, headers=headers)
        assert response.status_code == 415
        error_of(response)
    assert (
        await client.post(CHAT, content=body, headers={"Content-Type": "application/json; charset=utf-8"})
    ).is_success


async def chunked(parts: int) -> AsyncIterator[bytes]:
    for _ in range(parts):
        yield b" " * 1000


@pytest.mark.parametrize("announced", [True, False])
async def test_a_large_body_is_413(announced: bool) -> None:
    async with serving(engine(), limits=Limits(max_body_bytes=5000)) as url, async_http(base_url=url) as client:
        body = b" " * 6000 if announced else chunked(6)
        response = await client.post(CHAT, content=body, headers=JSON)
        assert response.status_code == 413
        assert "5000" in error_of(response)["message"]


async def test_bodies_are_bounded_together() -> None:
    limits = Limits(max_body_bytes=6000, max_bodies_bytes=8000)
    async with serving(engine(), limits=limits) as url, async_http(base_url=url) as client:
        reader, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(url).port)
        head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 5000\r\n\r\n"
        writer.write(head.encode() + b" " * 4999)
        large = json.dumps(text(prompt="a b " * 1000)).encode()
        async with asyncio.timeout(20):
            while (response := await client.post(TEXT, content=large, headers=JSON)).status_code == 200:
                continue  # the other body has not arrived yet
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        assert error_of(response)["code"] == "too_many_requests"
        assert (await client.post(CHAT, json=chat())).status_code == 200
        writer.write(b"x")
        assert b" 400 " in await reader.readline()
        assert (await client.post(TEXT, content=large, headers=JSON)).status_code == 200
        writer.close()
        await writer.wait_closed()


async def test_a_slow_body_is_given_up() -> None:
    async with serving(engine(), limits=Limits(body_seconds=0.2)) as url:
        reader, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(url).port)
        head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{{"
        writer.write(head.encode())
        async with asyncio.timeout(10):
            assert b" 408 " in await reader.readline()
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer", "Basic secret", "secret", "Bearer sécret"])
async def test_without_the_key_nothing_of_v1_is_served(header: str | None) -> None:
    async with serving(engine(), api_key="secret") as url, async_http(base_url=url) as client:
        headers = {} if header is None else {b"Authorization": header.encode()}
        for method, path in (("GET", "/v1/models"), ("POST", CHAT), ("POST", TEXT)):
            response = await client.request(method, path, headers=headers)
            assert response.status_code == 401
            assert error_of(response)["code"] in ("missing_api_key", "invalid_api_key")
        for path in ("/health", "/ready", "/metrics"):
            assert (await client.get(path)).status_code == 200


async def test_with_the_key_everything_is() -> None:
    async with serving(engine(), api_key="secret") as url, async_http(base_url=url) as client:
        response = await client.post(CHAT, json=chat(), headers={"Authorization": "Bearer secret"})
        assert response.status_code == 200


async def test_keys_are_replaced_while_requests_run(tmp_path: Path) -> None:
    """Old and new together for as long as clients need, and never a wrong answer to one that has either."""
    file = tmp_path / "keys"
    file.write_text("old")

    async def answers(client: httpx.AsyncClient) -> dict[str, int]:
        headers = {key: {"Authorization": f"Bearer {key}"} for key in ("old", "new")}
        return {key: (await client.get("/v1/models", headers=sent)).status_code for key, sent in headers.items()}

    async with serving(engine(), api_key_file=file) as url, async_http(base_url=url) as client:
        assert await answers(client) == {"old": 200, "new": 401}
        for text, expected in (("old\nnew\n", {"old": 200, "new": 200}), ("new\n", {"old": 401, "new": 200})):
            fresh = tmp_path / "fresh"
            fresh.write_text(text)
            fresh.replace(file)
            assert await answers(client) == expected


async def test_too_many_at_once_are_turned_away_and_told_when_to_come_back() -> None:
    resume = asyncio.Event()
    fake = engine([70, resume])
    limits = EngineLimits(max_sequences=1, max_waiting=1)
    async with serving(fake, engine_limits=limits) as url, async_http(base_url=url) as client:
        running = [asyncio.create_task(client.post(CHAT, json=chat())) for _ in range(2)]
        await eventually(lambda: len(fake.running) == 2)
        response = await client.post(CHAT, json=chat())
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        error_of(response)
        assert (await client.get("/health")).status_code == 200
        resume.set()
        assert [task.status_code for task in await asyncio.gather(*running)] == [200, 200]
        assert (await client.post(CHAT, json=chat())).status_code == 200


async def test_until_the_model_is_there_it_says_so_and_then_serves(tmp_path: Path) -> None:
    place = tmp_path / "model"
    async with serving(engine(), model=place, wait_loaded=False) as url, async_http(base_url=url) as client:
        await _says(client, "does not exist")
        assert (await client.get("/health")).status_code == 200
        for method, path in (("GET", "/v1/models"), ("GET", f"/v1/models/{SERVED}"), ("POST", CHAT)):
            response = await client.request(method, path, json=chat() if method == "POST" else None)
            assert response.status_code == 503
            assert (error_of(response)["code"], response.headers["retry-after"]) == ("loading", "5")
        shutil.copytree(TINY_CHAT, tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors"))
        (tmp_path / "copy").rename(place)
        await _says(client, "in step")
        assert (await client.post(CHAT, json=chat())).status_code == 200


async def _says(client: httpx.AsyncClient, words: str) -> None:
    async with asyncio.timeout(20):
        while words not in (await client.get("/ready")).json()["reason"]:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def test_before_the_engine_knows_the_length_it_is_loading() -> None:
    fake = engine()
    async with serving(fake) as url, async_http(base_url=url) as client:
        fake.max_model_len = None
        assert (await client.post(CHAT, json=chat())).status_code == 503
        fake.max_model_len = 100
        assert (await client.post(CHAT, json=chat())).status_code == 200


async def test_ready_is_the_engines_word() -> None:
    fake = engine()
    async with serving(fake) as url, async_http(base_url=url) as client:
        fake.state = Readiness(False, "rank 1 is loading")
        response = await client.get("/ready")
        assert (response.status_code, response.json()["reason"]) == (503, "rank 1 is loading")
        assert response.headers.get("connection") != "close"


async def test_while_draining_clients_are_told_to_move_on() -> None:
    fake = engine()
    async with serving(fake) as url, async_http(base_url=url) as client:
        assert (await client.post(CHAT, json=chat())).headers.get("connection") != "close"
        fake.state = Readiness(False, "asked to end", draining=True)
        assert (await client.get("/ready")).status_code == 503
        served = await client.post(CHAT, json=chat())
        assert (served.status_code, served.headers["connection"]) == (200, "close")
        fake.refusal = EngineBusyError("the group drains", 1)
        refused = await client.post(CHAT, json=chat(stream=True))
        assert (refused.status_code, refused.headers["connection"]) == (503, "close")


async def test_a_client_that_takes_nothing_is_given_up() -> None:
    fake = FakeEngine(lambda _: (70 for _ in range(10**9)), END, max_model_len=10**9)
    async with serving(fake, limits=Limits(write_seconds=0.3)) as url:
        _, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(url).port, limit=1024)
        body = json.dumps(chat(stream=True)).encode()
        head = (
            f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        await eventually(lambda: len(fake.cancelled) == 1, seconds=30)
        writer.close()
        await writer.wait_closed()


async def test_metrics_have_the_names_people_know(client: httpx.AsyncClient) -> None:
    assert (await client.post(CHAT, json=chat(n=2))).status_code == 200
    assert (await client.post(CHAT, json=chat(max_tokens=2))).status_code == 200
    assert (await client.post(CHAT, json=chat(n=0))).status_code == 400
    page = await client.get("/metrics")
    assert page.headers["content-type"].startswith("text/plain")
    samples = {
        (sample.name, *(value for key, value in sorted(sample.labels.items()) if key != "model_name")): sample.value
        for family in text_string_to_metric_families(page.text)
        for sample in family.samples
        if sample.labels["model_name"] == SERVED and not sample.name.endswith(("_bucket", "_created", "_sum"))
    }
    prompt = (await client.post(CHAT, json=chat())).json()["usage"]["prompt_tokens"]
    assert samples == {
        ("lockstep_num_requests_running",): 0,
        ("lockstep_num_requests_waiting",): 3,
        ("lockstep_kv_cache_usage_ratio",): 0.25,
        ("lockstep_epoch",): 7,
        ("lockstep_preemptions_total",): 4,
        ("lockstep_steps_total",): 5,
        ("lockstep_prefix_cache_queries_total",): 13,
        ("lockstep_prefix_cache_hits_total",): 9,
        ("lockstep_recoveries_total",): 6,
        ("lockstep_last_step_timestamp_seconds",): 8.5,
        ("lockstep_time_to_first_token_seconds_count",): 3,
        ("lockstep_inter_token_latency_seconds_count",): 3 + 3 + 1,
        ("lockstep_e2e_request_latency_seconds_count",): 3,
        ("lockstep_prompt_tokens_total",): 3 * prompt,
        ("lockstep_generation_tokens_total",): 4 + 4 + 2,
        ("lockstep_request_success_total", "stop"): 2,
        ("lockstep_request_success_total", "length"): 1,
        ("lockstep_requests_failed_total", "refused"): 1,
        ("lockstep_requests_failed_total", "failed"): 0,
        ("lockstep_requests_failed_total", "unavailable"): 0,
        ("lockstep_requests_failed_total", "disconnected"): 0,
    }


def malformed(random: random.Random) -> bytes:
    """A body made wrong in one of several ways: bytes, cuts, types, nesting, or nothing but noise."""
    body = json.dumps(random.choice([chat, text])(stop=["a"], n=1, stream=random.random() < 0.5, seed=1)).encode()
    way = random.randrange(6)
    if way == 0:
        return random.randbytes(random.randrange(200))
    if way == 1:
        return body[: random.randrange(len(body))]
    if way == 2:
        flipped = bytearray(body)
        for _ in range(random.randrange(1, 6)):
            flipped[random.randrange(len(flipped))] = random.randrange(256)
        return bytes(flipped)
    if way == 3:
        depth = random.randrange(20, 2000)
        return b'{"messages":' + random.choice([b"[", b'{"a":']) * depth + b"]" * depth + b"}"
    value = json.loads(body)
    field = random.choice(
        [*value, "temperature", "logprobs", "top_k", "chat_template_kwargs", "stream_options", "tools"]
    )
    value[field] = odd(random, 0)
    return json.dumps(value).encode()


def odd(random: random.Random, depth: int) -> object:
    values: list[object] = [None, True, -1, 0, 1.5, 1e308, 10**30, -(2**63), "", "\0", "\ud800", "\ufdd0", "x" * 5000]
    if depth < 3 and random.random() < 0.5:
        inner = [odd(random, depth + 1) for _ in range(random.randrange(4))]
        return inner if random.random() < 0.5 else {random.choice(["role", "content", "type", ""]): x for x in inner}
    return random.choice([*values, float("nan"), float("-inf")])


async def test_a_thousand_malformed_bodies_break_nothing(client: httpx.AsyncClient) -> None:
    print(f"seed {SEED}")
    source = random.Random(SEED)
    statuses: dict[int, int] = {}
    for number in range(MALFORMED_BODIES):
        body = malformed(source)
        response = await client.post(source.choice([CHAT, TEXT]), content=body, headers=JSON)
        assert response.status_code < 500, (number, body)
        if response.status_code != 200:
            error_of(response)
        statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
    assert statuses[400] > MALFORMED_BODIES / 2, statuses
    assert (await client.post(CHAT, json=chat())).status_code == 200
    assert (await client.get("/ready")).status_code == 200


async def test_what_is_no_http_breaks_nothing(client: httpx.AsyncClient) -> None:
    source = random.Random(SEED)
    for _ in range(200):
        _, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
        writer.write(source.randbytes(source.randrange(1, 300)) + b"\r\n\r\n")
        writer.close()
        await asyncio.wait_for(writer.wait_closed(), 5)
    assert (await client.post(CHAT, json=chat())).status_code == 200
