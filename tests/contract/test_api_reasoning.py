"""What a model thinks aloud is parted from its answer, by the markers that it or its template wrote."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from tests.support.api_server import SERVED, serving
from tests.support.chat_model import THINKING, chat_tokenizer, write_chat_model
from tests.support.engine import FakeEngine

from lockstep_runtime.config import ReasoningParser

TOKENIZER = chat_tokenizer()
END = TOKENIZER.token_to_id("<|im_end|>") or 0
OPENING, CLOSING = (TOKENIZER.token_to_id(text) or 0 for text in ("<think>", "</think>"))
THOUGHT, ANSWER = "2 and 2, hm, 🎉\n\nis 4", "It is 4.\n"


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False).ids


def letters(text: str) -> list[int]:
    """The text in tokens that are no markers."""
    return [id for character in text for id in ids(character)]


@contextlib.asynccontextmanager
async def client(
    folder: Path, answer: list[int], template: str | None = None, parser: ReasoningParser = "auto"
) -> AsyncIterator[tuple[openai.AsyncOpenAI, FakeEngine]]:
    engine = FakeEngine(lambda _: answer, END)
    async with (
        serving(engine, model=write_chat_model(folder, template), reasoning_parser=parser) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as opened,
    ):
        yield opened, engine


async def ask(client: openai.AsyncOpenAI, content: str = "2 and 2?", **extra: Any) -> tuple[str, str, Any]:
    """Reasoning, answer and usage of a whole answer; a streamed one must be the same."""
    body: dict[str, Any] = {"model": SERVED, "messages": [{"role": "user", "content": content}], **extra}
    create: Any = client.chat.completions.create  # its overloads take no dict
    whole = await create(**body)
    message = whole.choices[0].message.model_dump()
    assert message.get("reasoning") == message.get("reasoning_content")
    parted = (message.get("reasoning") or "", message["content"])
    streamed = ["", ""]
    options = {"include_usage": True}
    async for chunk in await create(**body, stream=True, stream_options=options):
        for choice in chunk.choices:
            delta = choice.delta.model_dump()
            assert delta.get("reasoning") == delta.get("reasoning_content")
            streamed[0] += delta.get("reasoning_content") or ""
            streamed[1] += delta["content"] or ""
    assert tuple(streamed) == parted
    assert chunk.usage == whole.usage
    return *parted, whole.usage


async def test_the_model_opens_and_closes_its_reasoning(tmp_path: Path) -> None:
    answer = ids(f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}")
    async with client(tmp_path, answer) as (asked, _):
        thought, text, usage = await ask(asked)
    assert (thought, text) == (THOUGHT, ANSWER)
    assert usage.completion_tokens == len(answer) + 1
    assert usage.completion_tokens_details.reasoning_tokens == answer.index(CLOSING) - answer.index(OPENING) - 1


async def test_the_template_opens_it(tmp_path: Path) -> None:
    answer = ids(f"{THOUGHT}\n</think>\n\n{ANSWER}")
    async with client(tmp_path, answer, THINKING) as (asked, engine):
        thought, text, usage = await ask(asked)
    assert (thought, text) == (THOUGHT, ANSWER)
    assert usage.completion_tokens_details.reasoning_tokens == answer.index(CLOSING)
    assert OPENING in engine.requests[0].prompt


@pytest.mark.parametrize(
    "off",
    [
        {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}},
        {"reasoning_effort": "none"},
        {"reasoning_effort": "high", "extra_body": {"chat_template_kwargs": {"enable_thinking": False}}},
    ],
)
async def test_thinking_is_switched_off(tmp_path: Path, off: dict[str, Any]) -> None:
    async with client(tmp_path, ids(ANSWER), THINKING) as (asked, engine):
        thought, text, usage = await ask(asked, **off)
    assert (thought, text) == ("", ANSWER)
    assert usage.completion_tokens_details.reasoning_tokens == 0
    assert CLOSING in engine.requests[0].prompt


@pytest.mark.parametrize("effort", ["minimal", "low", "medium", "high", "xhigh", "max"])
async def test_an_effort_is_a_variable_of_the_template(tmp_path: Path, effort: str) -> None:
    template = "{{ reasoning_effort }} {{ enable_thinking }} {{ messages[0].content }}"
    async with client(tmp_path, ids(ANSWER), template) as (asked, engine):
        await ask(asked, reasoning_effort=effort)
    assert TOKENIZER.decode(engine.requests[0].prompt) == f"{effort} True 2 and 2?"


async def test_without_an_effort_the_template_has_no_such_variable(tmp_path: Path) -> None:
    template = "{{ reasoning_effort is defined }} {{ enable_thinking is defined }}"
    async with client(tmp_path, ids(ANSWER), template) as (asked, engine):
        await ask(asked)
    assert TOKENIZER.decode(engine.requests[0].prompt) == "False False"


async def test_a_users_marker_opens_nothing(tmp_path: Path) -> None:
    async with client(tmp_path, ids(ANSWER)) as (asked, _):
        assert (await ask(asked, "Go on: <think>"))[:2] == ("", ANSWER)


async def test_markers_that_are_spelled_are_text(tmp_path: Path) -> None:
    quoted = letters("<think> opens, </think> closes")
    async with client(tmp_path, [*quoted, OPENING, *ids("more")]) as (asked, _):
        assert (await ask(asked))[:2] == ("", "<think> opens, </think> closes<think>more")
    async with client(tmp_path, [OPENING, *quoted, CLOSING, *ids(ANSWER)]) as (asked, _):
        assert (await ask(asked))[:2] == ("<think> opens, </think> closes", ANSWER)


async def test_reasoning_that_was_cut_is_reasoning(tmp_path: Path) -> None:
    async with client(tmp_path, ids(THOUGHT), THINKING) as (asked, _):
        thought, text, usage = await ask(asked, max_tokens=4)
    assert THOUGHT.startswith(thought)
    assert (bool(thought), text, usage.completion_tokens_details.reasoning_tokens) == (True, "", 4)


async def test_without_a_parser_markers_are_text(tmp_path: Path) -> None:
    async with client(tmp_path, ids(f"<think>a</think>{ANSWER}"), parser="none") as (asked, _):
        thought, text, usage = await ask(asked)
    assert (thought, text) == ("", f"<think>a</think>{ANSWER}")
    assert usage.completion_tokens_details.reasoning_tokens == 0


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
async def test_the_histories_reasoning_reaches_the_template(tmp_path: Path, name: str) -> None:
    history = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho", name: "hm"}]
    async with client(tmp_path, ids(ANSWER), THINKING) as (asked, engine):
        await ask(asked, messages=[*history, {"role": "user", "content": "So?"}])
    assert "<think>\nhm\n</think>\n\nHo" in TOKENIZER.decode(engine.requests[0].prompt, skip_special_tokens=False)
