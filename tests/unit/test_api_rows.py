"""A token that the model has no embedding for is refused, or spelled out; it never reaches a rank."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.support.api_server import TINY_CHAT

from lockstep_runtime.api.errors import ApiError
from lockstep_runtime.api.limits import Limits
from lockstep_runtime.api.model import load
from lockstep_runtime.api.request_builder import RequestBuilder
from lockstep_runtime.api.schemas import ChatRequest, CompletionRequest, validate
from lockstep_runtime.config import ServeConfig

ROWS = 2048


def added(content: str, *, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": 2050, "content": content, "special": special, **flags}


@pytest.fixture
def preparation(tmp_path: Path) -> RequestBuilder:
    return prepared(tmp_path)


def prepared(tmp_path: Path, template: str | None = None) -> RequestBuilder:
    folder = tmp_path / "m"
    shutil.copytree(TINY_CHAT, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"] += [added("<|extra|>", special=True), added("<tool_call>", special=False)]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return RequestBuilder(load(ServeConfig(model=str(folder), served_name="m")), "m", 2048, Limits())


def chat(preparation: RequestBuilder, text: str, **fields: object) -> tuple[int, ...]:
    body = {"model": "m", "messages": [{"role": "user", "content": text}], **fields}
    return preparation.chat(validate(ChatRequest, body))[0].requests[0].prompt


def completion(preparation: RequestBuilder, prompt: object) -> tuple[int, ...]:
    return preparation.completion(validate(CompletionRequest, {"model": "m", "prompt": prompt}))[0].requests[0].prompt


def test_the_tokenizer_knows_more_than_the_model(preparation: RequestBuilder) -> None:
    ids = [preparation.model.tokenizer.id_of(text) for text in ("<|extra|>", "<tool_call>")]
    assert all(id is not None and id >= ROWS for id in ids)
    assert preparation.model.vocabulary == ROWS


@pytest.mark.parametrize("text", ["hi <|extra|> there", "<|extra|>", "<|im_end|><|extra|>"])
def test_a_special_token_without_a_row_is_refused(preparation: RequestBuilder, text: str) -> None:
    with pytest.raises(
        ApiError, match=r"contains '<\|extra\|>', a token that this model has no embedding for"
    ) as caught:
        chat(preparation, text)
    assert caught.value.status == 400


@pytest.mark.parametrize("text", ["a <tool_call> b", "<tool_call>", "<tool_call><|im_end|><tool_call>"])
def test_another_added_token_without_a_row_is_spelled_out(preparation: RequestBuilder, text: str) -> None:
    prompt = chat(preparation, text)
    assert max(prompt) < ROWS
    assert text in preparation.model.tokenizer.decode(prompt)


@pytest.mark.parametrize("prompt", ["a<|extra|>", "<tool_call>", [5, 2048], ["fine", "<tool_call>"]])
def test_a_completions_prompt_with_one_is_refused(preparation: RequestBuilder, prompt: object) -> None:
    with pytest.raises(ApiError, match=r"the model knows no token 20(48|49)") as caught:
        completion(preparation, prompt)
    assert caught.value.status == 400


@pytest.mark.parametrize("end", ["<|extra|>", "<tool_call>\n"])
def test_one_that_the_template_writes_is_refused(tmp_path: Path, end: str) -> None:
    preparation = prepared(tmp_path, "{% for m in messages %}{{ m.content }}{% endfor %}" + end)
    with pytest.raises(ApiError, match="messages: the model knows no token"):
        chat(preparation, "a")


@pytest.mark.parametrize("prompt", ["plain", [0, 2047], "<|im_end|>"])
def test_every_row_can_be_asked_for(preparation: RequestBuilder, prompt: object) -> None:
    assert max(completion(preparation, prompt)) < ROWS
