"""/tokenize, /detokenize and /version, as vLLM's clients know them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.support.api_bodies import CHAT, END, TOKENIZER, chat, engine, error_of
from tests.support.api_server import SERVED, TINY_CHAT, serving
from tests.support.chat_model import HERMES, write_chat_model
from tests.support.engine import FakeEngine
from tests.support.http import async_http
from tests.support.tokenizer_kinds import llama
from tests.support.tool_texts import TOOLS

import lockstep_runtime

TEXT = "Grüße, 日本 🎉<|im_end|>\n"
HI = [{"role": "user", "content": "Hi"}]


@contextlib.asynccontextmanager
async def client(
    fake: FakeEngine | None = None, model: Path = TINY_CHAT, **options: Any
) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(fake or engine(), model=model, **options) as url, async_http(base_url=url) as opened:
        yield opened


async def test_a_texts_tokens_and_back() -> None:
    ids = TOKENIZER.encode(TEXT)
    assert END in ids
    async with client() as opened:
        for named in ({}, {"model": SERVED}, {"model": None}):
            found = (await opened.post("/tokenize", json={"prompt": TEXT, **named})).json()
            assert found == {"count": len(ids), "max_model_len": 2048, "tokens": ids, "token_strs": None}
        found = (await opened.post("/tokenize", json={"prompt": TEXT, "return_token_strs": True})).json()
        assert found["token_strs"] == [TOKENIZER.token_of(id) for id in ids]
        assert (await opened.post("/detokenize", json={"tokens": ids})).json() == {"prompt": TEXT}
        assert (await opened.post("/detokenize", json={"tokens": []})).json() == {"prompt": ""}
        assert (await opened.post("/tokenize", json={"prompt": ""})).json()["tokens"] == []


async def test_a_tokenizers_own_special_tokens(tmp_path: Path) -> None:
    write_chat_model(tmp_path)
    tokenizer = llama()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    async with client(model=tmp_path) as opened:
        for special in (None, True, False):
            body = {"prompt": "hello", "add_special_tokens": special}
            found = (await opened.post("/tokenize", json=body)).json()["tokens"]
            assert (found[0] == tokenizer.token_to_id("<s>")) is (special is not False)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"add_generation_prompt": False},
        {"tools": TOOLS.ALL},
        {"messages": [*HI, {"role": "assistant", "content": "It is "}], "continue_final_message": True},
        {"add_special_tokens": True, "chat_template_kwargs": {"x": 1}},
    ],
)
async def test_a_conversations_tokens_are_what_the_model_is_given(tmp_path: Path, more: dict[str, Any]) -> None:
    fake = engine()
    async with client(fake, write_chat_model(tmp_path, HERMES)) as opened:
        found = (await opened.post("/tokenize", json={"messages": HI, **more})).json()["tokens"]
        assert (await opened.post(CHAT, json=chat(**{"messages": HI, **more}))).status_code == 200
    assert tuple(found) == fake.requests[0].prompt


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": 5}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404, "model"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/tokenize", {"messages": HI, "chat_template": "{{ messages }}"}, 400, "chat_template"),
        ("/tokenize", {"prompt": "word " * 300_000}, 400, None),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": "a"}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
        ("/detokenize", {"tokens": [True]}, 400, "tokens"),
        ("/detokenize", {"tokens": [TOKENIZER.size]}, 400, "tokens"),
        ("/detokenize", {"tokens": [5], "model": "other"}, 404, "model"),
    ],
)
async def test_what_is_wrong_is_named(path: str, body: dict[str, Any], status: int, param: str | None) -> None:
    async with client() as opened:
        response = await opened.post(path, json=body)
    assert (response.status_code, error_of(response)["param"]) == (status, param)


async def test_they_need_the_key_and_the_version_does_not() -> None:
    async with client(api_key="secret") as opened:
        for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [5]})):
            assert (await opened.post(path, json=body)).status_code == 401
            headers = {"Authorization": "Bearer secret"}
            assert (await opened.post(path, json=body, headers=headers)).status_code == 200
        assert (await opened.get("/version")).json() == {"version": lockstep_runtime.__version__}
        document = (await opened.get("/openapi.json")).json()
    assert document["paths"]["/tokenize"]["post"]["security"] == [{"key": []}]
    assert "security" not in document["paths"]["/version"]["get"]
