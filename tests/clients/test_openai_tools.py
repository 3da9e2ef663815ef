"""The `openai` client's tool calls against a model that makes them."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, Final, Literal

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel, Field
from tests.clients.conversation import (
    ARGUMENTS,
    AT_ONCE,
    COMPARISON,
    FINAL,
    MODEL,
    OTHERS,
    PROSE,
    QUESTION,
    RESULT,
    UNKNOWN,
)
from tests.support.http import HTTP
from tests.support.serve import Served

TOOL: Final[ChatCompletionToolParam] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of some days in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city", "days"],
        },
    },
}
NOTHING: Final[list[ChatCompletionMessageParam]] = [{"role": "user", "content": "Who are you?"}]
ASKED: Final[list[ChatCompletionMessageParam]] = [{"role": "user", "content": QUESTION}]


class Booking(BaseModel):
    city: Literal["Oslo", "Rome"]
    nights: int = Field(ge=1, le=9)


@pytest.fixture(scope="module")
def client(assistant: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{assistant.api}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def ask(client: openai.OpenAI, question: str = QUESTION, **options: Any) -> Any:
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": question}]
    return client.chat.completions.create(model=MODEL, messages=messages, tools=[TOOL], **options)


def test_a_call_and_the_answer_to_its_result(client: openai.OpenAI) -> None:
    [choice] = ask(client).choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", PROSE)
    [call] = choice.message.tool_calls
    assert (call.type, call.function.name) == ("function", "get_weather")
    assert json.loads(call.function.arguments) == ARGUMENTS
    messages: list[ChatCompletionMessageParam] = [
        *ASKED,
        choice.message.to_dict(),
        {"role": "tool", "tool_call_id": call.id, "content": RESULT},
    ]
    answer = client.chat.completions.create(model=MODEL, messages=messages, tools=[TOOL])
    [last] = answer.choices
    assert (last.finish_reason, last.message.content, last.message.tool_calls) == ("stop", FINAL, None)


def test_calls_in_parallel(client: openai.OpenAI) -> None:
    [choice] = ask(client, COMPARISON).choices
    calls = choice.message.tool_calls
    assert [json.loads(call.function.arguments) for call in calls] == list(OTHERS)
    assert len({call.id for call in calls}) == 2
    [one] = ask(client, COMPARISON, parallel_tool_calls=False).choices
    assert [json.loads(call.function.arguments) for call in one.message.tool_calls] == [OTHERS[0]]


def test_streamed_argument_by_argument(client: openai.OpenAI) -> None:
    whole = ask(client, COMPARISON).choices[0].message.tool_calls
    deltas = [choice.delta for chunk in ask(client, COMPARISON, stream=True) for choice in chunk.choices]
    parts = [part for delta in deltas for part in delta.tool_calls or []]
    for index, call in enumerate(whole):
        own = [part for part in parts if part.index == index]
        assert [part.function.name for part in own if part.function.name] == [call.function.name]
        assert [bool(part.id) for part in own] == [True] + [False] * (len(own) - 1)
        pieces = [part.function.arguments for part in own if part.function.arguments]
        assert "".join(pieces) == call.function.arguments
        assert len(pieces) > 3


def test_the_clients_own_accumulation_of_calls(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model=MODEL, messages=ASKED, tools=[TOOL]) as stream:
        events = list(stream)
        [choice] = stream.get_final_completion().choices
    pieces = [event.arguments_delta for event in events if event.type == "tool_calls.function.arguments.delta"]
    assert json.loads("".join(pieces)) == ARGUMENTS
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls is not None
    assert choice.message.tool_calls[0].function.name == "get_weather"


def test_a_model_that_may_call_nothing_says_something(client: openai.OpenAI) -> None:
    [choice] = ask(client, "Who are you?").choices
    assert (choice.finish_reason, choice.message.content, choice.message.tool_calls) == ("stop", UNKNOWN, None)
    [choice] = ask(client, tool_choice="none").choices
    assert (choice.finish_reason, choice.message.tool_calls) == ("stop", None)
    assert "get_weather" in choice.message.content


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "book"}}])
def test_a_call_that_is_asked_for_fits_its_schema(client: openai.OpenAI, choice: Any, stream: bool) -> None:
    """The model by itself would call nothing, and knows nothing of this tool."""
    tool = openai.pydantic_function_tool(Booking, name="book")
    options: dict[str, Any] = {"model": MODEL, "messages": NOTHING, "tools": [tool], "tool_choice": choice}
    if stream:
        with client.chat.completions.stream(**options) as events:
            events.until_done()
            answer: Any = events.get_final_completion()
    else:
        answer = client.chat.completions.parse(**options)
    [call] = answer.choices[0].message.tool_calls
    assert call.function.name == "book"
    assert isinstance(call.function.parsed_arguments, Booking)


def refusals(server: Served) -> float:
    """How many requests were answered with 503."""
    text = HTTP.get(f"{server.api}/metrics", timeout=60).text
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.labels.get("reason") == "unavailable"
    )


def test_a_client_that_is_told_to_wait_tries_again(assistant: Served, client: openai.OpenAI) -> None:
    forever: dict[str, Any] = {"stream": True, "max_tokens": 1900, "extra_body": {"ignore_eos": True}}
    with ExitStack() as streams:
        for _ in range(AT_ONCE + 1):
            streams.enter_context(client.completions.create(model=MODEL, prompt="a", **forever))
        with pytest.raises(openai.InternalServerError) as error:
            ask(client)
        assert error.value.status_code == 503
        assert int(error.value.response.headers["retry-after"]) >= 1
        before, answers = refusals(assistant), []
        patient = client.with_options(max_retries=20)
        asker = threading.Thread(target=lambda: answers.append(ask(patient)))
        asker.start()
        assistant.until(lambda: refusals(assistant) > before, "it was refused, too")
    asker.join(120)
    assert [answer.choices[0].finish_reason for answer in answers] == ["tool_calls"]
