"""Where an answer begins and ends, what is text of it, and which of several is returned."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.support.api_bodies import CHAT, TEXT, chat, error_of, text
from tests.support.api_server import TINY_CHAT, serving
from tests.support.chat_model import THINKING, chat_tokenizer, write_chat_model
from tests.support.engine import FakeEngine
from tests.support.http import async_http
from tests.support.sse import joined

from lockstep_runtime.engine.client import GenerationRequest

TOKENIZER = chat_tokenizer()
END = TOKENIZER.token_to_id("<|im_end|>") or 0


def ids(written: str) -> list[int]:
    return TOKENIZER.encode(written, add_special_tokens=False).ids


def engine(answer: str) -> FakeEngine:
    return FakeEngine(lambda _: ids(answer), END)


@contextlib.asynccontextmanager
async def client(fake: FakeEngine, model: Path = TINY_CHAT) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(fake, model=model) as url, async_http(base_url=url) as opened:
        yield opened


async def answers(opened: httpx.AsyncClient, body: dict[str, Any]) -> str:
    """A whole answer, which a streamed one equals."""
    path = CHAT if "messages" in body else TEXT
    response = await opened.post(path, json=body)
    assert response.status_code == 200, response.text
    [choice] = response.json()["choices"]
    whole: str = choice["text"] if path == TEXT else choice["message"]["content"]
    assert joined((await opened.post(path, json=body | {"stream": True})).text) == whole
    return whole


@pytest.mark.parametrize("body", [chat(), text(max_tokens=50)], ids=["chat", "completion"])
async def test_a_stop_string_may_be_included(body: dict[str, Any]) -> None:
    async with client(engine("one two three")) as opened:
        assert await answers(opened, body | {"stop": ["wo", "two th"]}) == "one t"
        included = body | {"stop": ["wo", "two th"], "include_stop_str_in_output": True}
        assert await answers(opened, included) == "one two"
        assert await answers(opened, body | {"stop": "four", "include_stop_str_in_output": True}) == "one two three"


@pytest.mark.parametrize("body", [chat(), text(max_tokens=50)], ids=["chat", "completion"])
async def test_special_tokens_may_be_shown(body: dict[str, Any]) -> None:
    async with client(engine("a<|im_start|>b")) as opened:
        assert await answers(opened, body) == "ab"
        assert await answers(opened, body | {"skip_special_tokens": True}) == "ab"
        shown = body | {"skip_special_tokens": False}
        assert await answers(opened, shown) == "a<|im_start|>b"
        assert await answers(opened, shown | {"include_stop_str_in_output": True}) == "a<|im_start|>b<|im_end|>"
        assert await answers(opened, body | {"include_stop_str_in_output": True}) == "ab"
        three = ids("b")[0]
        stopped = shown | {"stop_token_ids": [three]}
        assert await answers(opened, stopped) == "a<|im_start|>"
        assert await answers(opened, stopped | {"include_stop_str_in_output": True}) == "a<|im_start|>b"


async def test_shown_tokens_have_their_width() -> None:
    async with client(engine("a<|im_start|>b")) as opened:
        for shown, offsets in ((True, [0, 1, 1]), (False, [0, 1, 13])):
            body = text(max_tokens=3, logprobs=0, skip_special_tokens=shown)
            [choice] = (await opened.post(TEXT, json=body)).json()["choices"]
            assert choice["logprobs"]["text_offset"] == offsets


def ranked() -> FakeEngine:
    """Choice i answers with i, with its own probability."""
    likelihoods = [-3.0, -1.0, -2.0, -0.5]

    def number(request: GenerationRequest) -> int:
        return int(request.request_id.rpartition("-")[2])

    def script(request: GenerationRequest) -> Sequence[int]:
        return ids(str(number(request)))

    return FakeEngine(script, END, logprob=lambda request: likelihoods[number(request) % 4])


async def test_the_best_of_several_are_returned() -> None:
    fake = ranked()
    async with client(fake) as opened:
        whole = (await opened.post(TEXT, json=text(prompt=["a", "b"], n=2, best_of=4, max_tokens=5))).json()
        assert [choice["text"] for choice in whole["choices"]] == ["3", "1", "7", "5"]
        assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3]
        assert [choice["logprobs"] for choice in whole["choices"]] == [None] * 4
        assert whole["usage"]["completion_tokens"] == 8 * 2, "all that were generated"
        assert whole["usage"]["prompt_tokens"] == 2
        whole = (await opened.post(CHAT, json=chat(best_of=3))).json()
        assert [choice["message"]["content"] for choice in whole["choices"]] == ["1"]
    assert len({request.sampling.seed for request in fake.requests[:4]}) == 4


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"n": 3, "best_of": 2}, "at least `n`"),
        ({"best_of": 2, "stream": True}, "in a stream"),
        ({"best_of": 17}, "less than or equal to 16"),
        ({"prompt": ["a"] * 100, "best_of": 2}, "more than 128"),
    ],
)
async def test_a_best_of_that_cannot_be(fields: dict[str, Any], words: str) -> None:
    async with client(engine("a")) as opened:
        response = await opened.post(TEXT, json=text(**fields))
        assert (response.status_code, error_of(response)["param"]) == (400, "best_of")
        assert words in error_of(response)["message"]


async def test_as_many_as_are_returned_are_the_best_of_themselves() -> None:
    fake = ranked()
    async with client(fake) as opened:
        whole = (await opened.post(TEXT, json=text(n=3, best_of=3, max_tokens=5))).json()
        assert [choice["text"] for choice in whole["choices"]] == ["0", "1", "2"]
        assert joined((await opened.post(TEXT, json=text(n=1, best_of=1, stream=True))).text) == "0"
    assert {request.sampling.logprobs for request in fake.requests} == {-1}


def conversation(last: str, role: str = "assistant", **extra: Any) -> dict[str, Any]:
    return chat(messages=[{"role": "user", "content": "Hi"}, {"role": role, "content": last}], **extra)


PREFIX = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("last", ["It is ", "It is", "", "a<|im_end|>b ", "\ufdd0"])
async def test_the_last_message_is_continued(last: str) -> None:
    fake = engine(" so.")
    async with client(fake) as opened:
        assert await answers(opened, conversation(last, continue_final_message=True)) == " so."
        echoed = conversation(last, continue_final_message=True, add_generation_prompt=False, echo=True)
        assert await answers(opened, echoed) == last + " so."
    assert {TOKENIZER.decode(request.prompt, skip_special_tokens=False) for request in fake.requests} == {PREFIX + last}
    assert {list(request.prompt).count(END) for request in fake.requests} == {1}


async def test_a_message_of_which_a_template_trims_the_end_is_continued_there(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content | trim }}|{% endfor %}"
    fake = engine("so.")
    async with client(fake, write_chat_model(tmp_path, template)) as opened:
        await opened.post(CHAT, json=conversation(" It is \n", continue_final_message=True))
    assert TOKENIZER.decode(fake.requests[0].prompt) == "Hi|It is"


async def test_open_reasoning_is_continued(tmp_path: Path) -> None:
    fake = engine("\n\nmore</think>\n\nSo.")
    async with client(fake, write_chat_model(tmp_path, THINKING)) as opened:
        body = conversation("<think>\nhm", continue_final_message=True)
        message = (await opened.post(CHAT, json=body)).json()["choices"][0]["message"]
        assert (message["reasoning"], message["content"]) == ("\n\nmore", "So.")
        body = conversation("<think>\nhm</think> It", continue_final_message=True)
        message = (await opened.post(CHAT, json=body)).json()["choices"][0]["message"]
        assert ("reasoning" in message, message["content"]) == (False, "\n\nmore</think>\n\nSo.")


async def test_what_cannot_be_continued(tmp_path: Path) -> None:
    hidden = "{{ messages[0].content }}"
    async with client(engine("a"), write_chat_model(tmp_path, hidden)) as opened:
        for body, words in (
            (conversation("It", continue_final_message=True), "doesn't show the end"),
            (conversation("It", continue_final_message=True, add_generation_prompt=True), "can't both be true"),
        ):
            response = await opened.post(CHAT, json=body)
            assert (response.status_code, error_of(response)["param"]) == (400, "continue_final_message")
            assert words in error_of(response)["message"]


async def test_only_an_assistants_message_is_echoed() -> None:
    async with client(engine("a")) as opened:
        assert await answers(opened, chat(echo=True)) == "a"
        assert await answers(opened, conversation("It is ", "user", echo=True)) == "a"


async def test_a_tokenizers_own_special_tokens_may_be_added(tmp_path: Path) -> None:
    from tests.support.tokenizer_kinds import llama

    write_chat_model(tmp_path, "{{ messages[0].content }}")
    tokenizer = llama()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    fake = FakeEngine(lambda _: [70], 2)
    async with client(fake, tmp_path) as opened:
        for special, first in ((None, False), (False, False), (True, True)):
            assert (await opened.post(CHAT, json=chat(max_tokens=1, add_special_tokens=special))).status_code == 200
            assert (fake.requests[-1].prompt[0] == tokenizer.token_to_id("<s>")) is first
