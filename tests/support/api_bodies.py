"""Bodies that clients send to the api, an engine that answers them, and the form of errors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import httpx
from tests.support.api_server import SERVED, TINY_CHAT
from tests.support.engine import FakeEngine, Part

from lockstep_runtime.api.tokenizer import TextTokenizer
from lockstep_runtime.engine.client import GenerationRequest

TOKENIZER: Final = TextTokenizer.from_file(TINY_CHAT / "tokenizer.json")
END: Final = TOKENIZER.id_of("<|im_end|>") or 0
CHAT: Final = "/v1/chat/completions"
TEXT: Final = "/v1/completions"
JSON: Final = {"Content-Type": "application/json"}


def engine(parts: Iterable[Part] = (70, 71, 72)) -> FakeEngine:
    kept = list(parts)

    def script(_: GenerationRequest) -> Iterable[Part]:
        return kept

    return FakeEngine(script, END)


def chat(**extra: Any) -> dict[str, Any]:
    return {"model": SERVED, "messages": [{"role": "user", "content": "Hi"}]} | extra


def text(**extra: Any) -> dict[str, Any]:
    return {"model": SERVED, "prompt": "Hi"} | extra


def error_of(response: httpx.Response) -> dict[str, Any]:
    assert response.headers["content-type"] == "application/json"
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error
