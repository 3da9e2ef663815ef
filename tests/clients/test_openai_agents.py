"""openai-agents: its loop calls tools until the model has said its last word."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final

import openai
import pytest
from agents import Agent, OpenAIChatCompletionsModel, RunConfig, Runner, function_tool
from tests.clients.conversation import ARGUMENTS, COMPARISON, FINAL, MODEL, OTHERS, QUESTION, RESULT
from tests.support.serve import Served

UNTRACED: Final = RunConfig(tracing_disabled=True)  # traces would go to OpenAI
asked: Final[list[dict[str, object]]] = []


@function_tool
def get_weather(city: str, days: int) -> str:
    """The weather of some days in a city."""
    asked.append({"city": city, "days": days})
    return RESULT


@pytest.fixture
async def agent(assistant: Served) -> AsyncIterator[Agent]:
    asked.clear()
    async with openai.AsyncOpenAI(base_url=f"{assistant.api}/v1", api_key="none", max_retries=0) as client:
        model = OpenAIChatCompletionsModel(MODEL, client)
        yield Agent("Weather", instructions="Answer questions on the weather.", model=model, tools=[get_weather])


async def test_a_loop_of_tool_calls(agent: Agent) -> None:
    result = await Runner.run(agent, QUESTION, max_turns=4, run_config=UNTRACED)
    assert result.final_output == FINAL
    assert asked == [ARGUMENTS]
    assert sum(response.usage.output_tokens for response in result.raw_responses) > 0


async def test_calls_in_parallel(agent: Agent) -> None:
    result = await Runner.run(agent, COMPARISON, max_turns=4, run_config=UNTRACED)
    assert result.final_output == FINAL
    assert sorted(asked, key=str) == sorted(OTHERS, key=str)


async def test_a_streamed_loop(agent: Agent) -> None:
    result = Runner.run_streamed(agent, QUESTION, max_turns=4, run_config=UNTRACED)
    pieces = [
        event.data.delta
        async for event in result.stream_events()
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta"
    ]
    assert result.final_output == FINAL
    assert "".join(pieces).endswith(FINAL)
    assert len(pieces) > 5
    assert asked == [ARGUMENTS]
