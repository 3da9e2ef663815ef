"""langchain-openai against a model that calls tools."""

from __future__ import annotations

from typing import Any, Final, Literal

import pytest
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, ConfigDict, Field, SecretStr
from tests.clients.conversation import ARGUMENTS, COMPARISON, FINAL, MODEL, OTHERS, PROSE, QUESTION, RESULT, UNKNOWN
from tests.support.serve import Served

asked: Final[list[tuple[str, int]]] = []


@tool
def get_weather(city: str, days: int) -> str:
    """The weather of some days in a city."""
    asked.append((city, days))
    return RESULT


@pytest.fixture
def chat(assistant: Served) -> ChatOpenAI:
    asked.clear()
    return ChatOpenAI(
        model=MODEL, base_url=f"{assistant.api}/v1", api_key=SecretStr("none"), timeout=120, max_retries=0,
        stream_usage=True,
    )  # fmt: skip


def test_a_conversation_and_its_usage(chat: ChatOpenAI) -> None:
    answer = chat.invoke([HumanMessage("Who are you?")])
    assert answer.content == UNKNOWN
    assert isinstance(answer, AIMessage)
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] > 0
    assert answer.response_metadata["finish_reason"] == "stop"


async def test_streamed_asynchronously(chat: ChatOpenAI) -> None:
    chunks = [chunk async for chunk in chat.astream("Who are you?")]
    assert "".join(str(chunk.content) for chunk in chunks) == UNKNOWN
    assert sum(bool(chunk.content) for chunk in chunks) > 3
    whole = joined(chunks)
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] > 0


def joined(chunks: list[Any]) -> AIMessageChunk:
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert isinstance(whole, AIMessageChunk)
    return whole


@pytest.mark.parametrize("streamed", [False, True])
def test_a_loop_of_tool_calls(chat: ChatOpenAI, streamed: bool) -> None:
    model = chat.bind_tools([get_weather])
    messages: list[Any] = [HumanMessage(QUESTION)]
    for _ in range(3):
        answer: Any = joined(list(model.stream(messages))) if streamed else model.invoke(messages)
        messages.append(answer)
        if not answer.tool_calls:
            break
        messages += [get_weather.invoke(call) for call in answer.tool_calls]
    assert [type(message) for message in messages][:3] == [HumanMessage, type(answer), ToolMessage]
    assert messages[1].content == PROSE
    assert messages[-1].content == FINAL
    assert asked == [tuple(ARGUMENTS.values())]


class Booking(BaseModel):
    """A hotel."""

    model_config = ConfigDict(extra="forbid")  # this model would make up fields for ever

    city: Literal["Oslo", "Rome"]
    nights: int = Field(ge=1, le=9)


def test_structured_output_by_a_call(chat: ChatOpenAI) -> None:
    found = chat.with_structured_output(Booking, method="function_calling").invoke("Who are you?")
    assert isinstance(found, Booking)


def test_calls_in_parallel(chat: ChatOpenAI) -> None:
    answer = chat.bind_tools([get_weather]).invoke(COMPARISON)
    assert isinstance(answer, AIMessage)
    assert [call["args"] for call in answer.tool_calls] == list(OTHERS)
