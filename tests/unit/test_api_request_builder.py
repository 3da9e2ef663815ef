"""From what a client sent to what the engine is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from tests.support.api_server import TINY_CHAT
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers

from lockstep_runtime.api.bounds import longest_token
from lockstep_runtime.api.chat_template import ChatTemplate
from lockstep_runtime.api.errors import ApiError
from lockstep_runtime.api.limits import Limits
from lockstep_runtime.api.model import SamplingDefaults, ServedModel
from lockstep_runtime.api.reasoning import find_markers
from lockstep_runtime.api.request_builder import RequestBuilder
from lockstep_runtime.api.schemas import ChatRequest, CompletionRequest, validate
from lockstep_runtime.api.tokenizer import TextTokenizer, TooManyTokensError

TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
PLAIN = TURNS + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
OPENS = TURNS + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
CLOSES = TURNS + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"


def raw() -> Tokenizer:
    return Tokenizer.from_file(str(TINY_CHAT / "tokenizer.json"))


def preparation(template: str = PLAIN, max_model_len: int = 2048) -> RequestBuilder:
    tokenizer = raw()
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    text = TextTokenizer(tokenizer)
    model = ServedModel(
        tokenizer=text,
        template=ChatTemplate(template, {}),
        markers=find_markers(text.added, "auto"),
        stop_ids=frozenset(),
        defaults=SamplingDefaults(),
    )
    return RequestBuilder(model, "m", max_model_len, Limits())


def thinks(template: str, *messages: tuple[str, str]) -> bool:
    body = {"model": "m", "messages": [{"role": role, "content": content} for role, content in messages]}
    return preparation(template).chat(validate(ChatRequest, body))[0].thinks


ABOUT_TAGS: Sequence[Sequence[tuple[str, str]]] = [
    [("user", "end with <think>")],
    [("user", "<think>")],
    [("user", "which closes it, </think> or <think>")],
    [("system", "never say <think>"), ("user", "Hi")],
    [("user", "Hi"), ("assistant", "<think>a</think>b"), ("user", "say <think>")],
    [("user", "Hi"), ("assistant", "<think>")],
    [("user", "<think></think>")],
    [("user", "Hi")],
]


@pytest.mark.parametrize("messages", ABOUT_TAGS)
def test_a_marker_that_a_user_wrote_opens_no_reasoning(messages: Sequence[tuple[str, str]]) -> None:
    assert not thinks(PLAIN, *messages)
    assert not thinks(CLOSES, *messages)


@pytest.mark.parametrize("messages", ABOUT_TAGS)
def test_what_the_template_opened_is_open_whatever_users_wrote(messages: Sequence[tuple[str, str]]) -> None:
    assert thinks(OPENS, *messages)


def completion(prompt: Any, *, max_model_len: int = 64, **fields: Any) -> list[tuple[int, ...]]:
    request = validate(CompletionRequest, {"model": "m", "prompt": prompt, **fields})
    return [one.prompt for one in preparation(max_model_len=max_model_len).completion(request)[0].requests]


@pytest.mark.parametrize("prompt", ["word " * 700_000, "a" * 3_000_000, "e\u0301" * 1_000_000, " " * 3_000_000])
def test_a_text_that_is_certainly_too_long_is_refused_before_it_is_tokenized(prompt: str) -> None:
    with pytest.raises(ApiError, match="64 tokens, but the prompt has more than 64") as error:
        completion(prompt)
    assert (error.value.code, error.value.param) == ("context_length_exceeded", "prompt")


def test_a_long_text_of_few_tokens_is_not_refused() -> None:
    longest = max(raw().get_vocab(), key=len)
    bound = longest_token(raw())
    assert bound is not None
    assert bound >= len(longest)
    text = TextTokenizer(raw()).decode([raw().get_vocab()[longest]])
    [ids] = completion(text * 62, max_tokens=1)
    assert len(ids) <= 63


def test_the_beginning_of_a_very_long_text_is_enough() -> None:
    tokenizer = TextTokenizer(raw())
    tokenizer.longest_token = None
    with pytest.raises(TooManyTokensError, match="more than 500"):
        tokenizer.encode("one two " * 500_000, most=500)
    ids = tokenizer.encode("one two " * 100)
    assert tokenizer.encode("one two " * 100, most=len(ids)) == ids
    with pytest.raises(TooManyTokensError, match=f"^{len(ids)}$"):
        tokenizer.encode("one two " * 100, most=len(ids) - 1)


def test_a_tokenizer_that_drops_characters_has_no_bound() -> None:
    assert longest_token(raw()) is not None
    for change in ("strip", "collapse", "whitespace", "greedy token"):
        tokenizer = raw()
        if change == "strip":
            tokenizer.normalizer = normalizers.Strip()
        elif change == "collapse":
            tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace("  ", " ")])
        elif change == "whitespace":
            tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        else:
            tokenizer.add_tokens([AddedToken("<mask>", lstrip=True)])
        assert longest_token(tokenizer) is None, change
