"""Nothing that a request brings holds up another's stream: the event loop's longest pause while it is served.

A pause is a property of the code only as far as it comes again: on a machine that does other things, too, the loop may
have to wait for a core. So of several tries the one with the shortest pause counts.
"""

from __future__ import annotations

import asyncio
import functools
import json
import random
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.support.api_server import SERVED, TINY_CHAT, serving
from tests.support.chat_model import CODER, HERMES, LLAMA, chat_tokenizer, write_chat_model
from tests.support.engine import FakeEngine
from tests.support.http import HTTP, async_http
from tests.support.tool_texts import WEATHER
from tests.support.vision import data_uri, encoded
from tests.support.vision_model import write_vision_model

LONGEST_PAUSE = 0.05  # seconds
TRIES = 8
BYTES = 3_900_000
JSON = {"Content-Type": "application/json"}
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


class Watch:
    """Looks at the clock every millisecond."""

    def __init__(self) -> None:
        self.longest = 0.0

    async def run(self) -> None:
        last = time.perf_counter()
        while True:
            await asyncio.sleep(0.001)
            now = time.perf_counter()
            self.longest, last = max(self.longest, now - last), now


@asynccontextmanager
async def watching() -> AsyncIterator[Watch]:
    watch = Watch()
    task = asyncio.create_task(watch.run())
    try:
        yield watch
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def post(url: str, path: str, body: bytes) -> int:
    return HTTP.post(url + path, content=body, headers=JSON, timeout=60).status_code


async def shortest_pause(
    path: str,
    body: bytes,
    statuses: set[int],
    max_model_len: int = 2048,
    *,
    model: Path = TINY_CHAT,
    answer: Sequence[int] = (70, 71, 72),
) -> float:
    """The body is made before, and sent from a thread: what is measured is the server's part."""
    pauses: list[float] = []
    fake = FakeEngine(lambda _: answer, end=1, max_model_len=max_model_len)
    async with serving(fake, model=model) as url:
        with ThreadPoolExecutor(1) as client:
            for _ in range(TRIES):
                async with watching() as watch:
                    status = await asyncio.get_running_loop().run_in_executor(client, post, url, path, body)
                assert status in statuses
                pauses.append(watch.longest)
                if min(pauses) < LONGEST_PAUSE:
                    break
    return min(pauses)


def text(prompt: Any, **more: Any) -> bytes:
    return json.dumps({"model": SERVED, "prompt": prompt, "max_tokens": 2, **more}).encode()


def chat(messages: Any, **more: Any) -> bytes:
    return json.dumps({"model": SERVED, "messages": messages, "max_tokens": 2, **more}).encode()


def tokens_of(prompt: str) -> bytes:
    return json.dumps({"prompt": prompt, "return_token_strs": True}).encode()


def users(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


WORDS = "word " * (BYTES // 5)
BODIES: dict[str, tuple[str, bytes, set[int]]] = {
    "a text": (TEXT, text(WORDS), {400}),
    "a text without spaces": (TEXT, text("a" * BYTES), {400}),
    "escapes": (TEXT, b'{"model": "m", "prompt": "' + b"\\u00e4" * (BYTES // 6) + b'"}', {404}),
    "token ids": (TEXT, text([151_000] * 290_000), {400}),
    "many prompts": (TEXT, text([WORDS[: BYTES // 128]] * 128), {400}),
    "lists": (TEXT, b'{"model": "m", "prompt": "a", "x": [' + b"[]," * (BYTES // 3) + b"[]]}", {413}),
    "objects": (TEXT, b'{"model": "m", "prompt": "a", "x": [' + b'{"a":1},' * (BYTES // 8) + b"1]}", {413}),
    "strings": (TEXT, text("a", x=["a"] * (BYTES // 5)), {413}),
    "stop strings": (TEXT, text("a", stop=["a"] * 90_000), {400}),
    "names": (TEXT, text("a", **{f"k{number}": 1 for number in range(300_000)}), {413}),
    "numbers": (TEXT, text("a", x=[1.5] * 290_000), {200}),
    "more numbers": (TEXT, text("a", x=[1.5] * (BYTES // 5)), {413}),
    "more token ids": (TEXT, text([5] * (BYTES // 3)), {413}),
    "quotation marks": (TEXT, text('"' * (BYTES // 2)), {400}),
    "brackets in a text": (TEXT, text("[{" * (BYTES // 2)), {400}),
    "backslashes": (TEXT, b'{"model": "m", "prompt": "' + b"\\\\" * (BYTES // 2) + b'"}', {404}),
    "no JSON": (TEXT, b"[" * BYTES, {413}),
    "a chat": (CHAT, chat(users(WORDS)), {400}),
    "special tokens in a chat": (CHAT, chat(users("<|im_end|>" * (BYTES // 10))), {400}),
    "parts": (CHAT, chat(users([{"type": "text", "text": "a"}] * 19_000)), {400}),
    "messages": (CHAT, chat(users("a" * 900) * 4096), {400}),
    "bad messages": (CHAT, chat([{"role": 1}] * 19_000), {400}),
    "tokens of a text": ("/tokenize", tokens_of("word " * 60_000), {200}),
    "tokens of a longer text": ("/tokenize", tokens_of(WORDS), {400}),
    "a text of tokens": ("/detokenize", json.dumps({"tokens": [70, 300, 900] * 99_000}).encode(), {200}),
    "template variables": (CHAT, chat(users("Hi"), chat_template_kwargs={"a": WORDS}), {200}),
}


@pytest.mark.parametrize("name", BODIES)
async def test_no_body_holds_up_the_loop(name: str) -> None:
    path, body, statuses = BODIES[name]
    assert len(body) < 4 * 1024 * 1024
    assert await shortest_pause(path, body, statuses) < LONGEST_PAUSE


async def test_a_long_text_that_is_served_holds_up_nothing() -> None:
    """As a model with a long context would: the whole of it is tokenized."""
    pause = await shortest_pause(TEXT, text("word " * 100_000, echo=True), {200}, max_model_len=10**6)
    assert pause < LONGEST_PAUSE


@pytest.mark.parametrize("fields", [{}, {"stream": True}], ids=str)
async def test_a_long_prompts_log_probabilities_hold_up_nothing(fields: dict[str, Any]) -> None:
    body = text([70] * 10_000, echo=True, logprobs=1, **fields)
    assert await shortest_pause(TEXT, body, {200}, max_model_len=20_000) < LONGEST_PAUSE


@pytest.mark.parametrize("fields", [{}, {"stream": True}], ids=str)
async def test_a_long_answers_log_probabilities_hold_up_nothing(fields: dict[str, Any]) -> None:
    """Its end costs no more than its middle."""
    more = {"logprobs": True, "top_logprobs": 20, "max_tokens": 4000, "ignore_eos": True, **fields}
    pause = await shortest_pause(CHAT, chat(users("Hi"), **more), {200}, max_model_len=20_000)
    assert pause < LONGEST_PAUSE


async def test_many_long_answers_log_probabilities_hold_up_nothing() -> None:
    body = text("a", n=16, max_tokens=400, ignore_eos=True, logprobs=20)
    assert await shortest_pause(TEXT, body, {200}) < LONGEST_PAUSE


async def test_as_many_choices_as_there_may_be_hold_up_nothing() -> None:
    body = text(["a " * 500] * 8, n=16, ignore_eos=True)
    assert await shortest_pause(TEXT, body, {200}) < LONGEST_PAUSE


def called(arguments: str) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": arguments}}]}


TOOLS: dict[str, tuple[bytes, set[int]]] = {
    "many": (chat(users("Hi"), tools=[{**WEATHER, "function": {"name": f"f{n}"}} for n in range(1000)]), {200, 400}),
    "long": (chat(users("Hi"), tools=[{"type": "function", "function": {"name": "f", "description": WORDS}}]), {400}),
    "special": (chat(users("Hi"), tools=[{**WEATHER, "more": ["<|im_end|>"] * 90_000}]), {400}),
    "arguments": (chat([*users("Hi"), called("[" + "[]," * (BYTES // 3) + "[]]")]), {400}),
    "calls": (chat([*users("Hi"), *[called('{"city": "Paris"}')] * 4000]), {400}),
}


@pytest.mark.parametrize("name", TOOLS)
async def test_tools_and_calls_hold_up_nothing(name: str, tmp_path: Path) -> None:
    body, statuses = TOOLS[name]
    assert await shortest_pause(CHAT, body, statuses, model=write_chat_model(tmp_path, HERMES)) < LONGEST_PAUSE


@pytest.mark.parametrize("fields", [{}, {"stream": True}], ids=str)
@pytest.mark.parametrize(
    ("template", "written"),
    [
        (HERMES, '<tool_call>\n{"name": "weather", "arguments": {"many": [' + "[], " * 6000),
        (CODER, "<tool_call>\n<function=weather>\n<parameter=city>\n" + "</parameter>\n" * 3000),
        (CODER, "<tool_call>\n<function=weather>\n<parameter=many>\n[" + "[], " * 6000 + "1]\n</parameter>"),
        (LLAMA, '{"arguments": {"many": [' + "[], " * 6000 + "1]}, "),
        (LLAMA, '{"name": "weather", "parameters": {"city": "' + "\\n" * 9000 + '"}}'),
    ],
    ids=["open", "ends", "held", "unnamed", "text"],
)
async def test_a_long_call_holds_up_nothing(
    template: str, written: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    """Each piece costs what its own text does; and what is looked at as a whole is looked at once."""
    answer = chat_tokenizer().encode(written, add_special_tokens=False).ids
    body = chat(users("Hi"), tools=[WEATHER], max_tokens=len(answer), **fields)
    pause = await shortest_pause(CHAT, body, {200}, 40_000, model=write_chat_model(tmp_path, template), answer=answer)
    assert pause < LONGEST_PAUSE


async def test_a_small_prompt_does_not_wait_for_large_ones() -> None:
    """Large bodies have a thread of their own."""
    fake = FakeEngine(lambda _: [70], end=1, max_model_len=3_000_000)
    large, small = text(WORDS[:1_000_000]), text("Hi")
    async with serving(fake) as url, async_http() as client:
        with ThreadPoolExecutor(4) as threads:
            loop = asyncio.get_running_loop()
            waiting = [loop.run_in_executor(threads, post, url, TEXT, large) for _ in range(4)]
            served = 0
            while not all(one.done() for one in waiting):
                answer = await client.post(url + TEXT, content=small, headers=JSON)
                assert answer.status_code == 200
                served += 1
            assert {await one for one in waiting} == {200}
    assert served > 5


@functools.cache
def large_images() -> dict[str, bytes]:
    """Files of some megabytes: Pillow works on one in a few calls, and composing is a call that lets nobody in."""
    noise = Image.effect_noise((2600, 2000), 90)
    flat = Image.linear_gradient("L").resize(noise.size)
    return {
        "PNG": encoded(Image.merge("RGBA", [noise, flat, noise, flat]), compress_level=1),
        "JPEG": encoded(Image.merge("RGB", [noise] * 3), "JPEG", quality=95),
        "WEBP": encoded(Image.merge("RGB", [noise] * 3), "WEBP", method=0, quality=60),
        "no image": random.Random(0).randbytes(12_000_000),
    }


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vision_model(tmp_path_factory.mktemp("vision"))


@pytest.mark.parametrize("name", large_images())
async def test_images_hold_nobody_up(vision: Path, name: str) -> None:
    url = {"url": data_uri(large_images()[name])}
    body = chat(users([{"type": "image_url", "image_url": url}, {"type": "text", "text": "?"}]))
    assert len(body) > 1_000_000
    statuses = {400} if name == "no image" else {200}
    assert await shortest_pause(CHAT, body, statuses, model=vision) < LONGEST_PAUSE
