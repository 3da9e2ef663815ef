"""Answers in a form that the client asks for: `parse()` of the `openai` client, and what others make of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Final, Literal

import openai
import pytest
from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, RunConfig, Runner
from langchain_openai import ChatOpenAI
from openai.types.chat import ChatCompletionMessageParam
from pydantic import BaseModel, Field, SecretStr
from tests.support.serve import Served

MODEL: Final = "tiny-chat"
MESSAGES: Final[list[ChatCompletionMessageParam]] = [{"role": "user", "content": "What is a for loop?"}]
LONG: Final = 400  # tokens: more than any value of the schema has
DRAWN: Final[dict[str, Any]] = {
    "temperature": 1.5,
    "seed": 3,
}  # its likeliest tokens are spaces, for ever


class Statement(BaseModel):
    keyword: Literal["for", "while", "größer"]
    lines: int = Field(ge=1, le=99)


class Answer(BaseModel):
    """What a model that knows nothing of forms must fill in."""

    statements: Annotated[list[Statement], Field(min_length=1, max_length=2)]
    certain: bool
    note: Literal["none", "some"] | None


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.api}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


@pytest.mark.parametrize("options", [DRAWN, {"temperature": 2, "seed": 4}])
def test_parse_gives_an_object(client: openai.OpenAI, options: dict[str, Any]) -> None:
    answer = client.chat.completions.parse(
        model=MODEL, messages=MESSAGES, response_format=Answer, max_tokens=LONG, **options
    )
    [choice] = answer.choices
    assert isinstance(choice.message.parsed, Answer)
    assert choice.finish_reason == "stop"
    assert Answer.model_validate_json(choice.message.content or "") == choice.message.parsed


def test_streamed_it_is_the_same(client: openai.OpenAI) -> None:
    whole = client.chat.completions.parse(
        model=MODEL, messages=MESSAGES, response_format=Answer, max_tokens=LONG, **DRAWN
    )
    with client.chat.completions.stream(
        model=MODEL, messages=MESSAGES, response_format=Answer, max_tokens=LONG, **DRAWN
    ) as stream:
        pieces = [event.delta for event in stream if event.type == "content.delta"]
        streamed = stream.get_final_completion()
    assert streamed.choices[0].message.parsed == whole.choices[0].message.parsed
    assert "".join(pieces) == whole.choices[0].message.content
    assert len(pieces) > 3


def test_langchain_too(server: Served) -> None:
    chat = ChatOpenAI(
        model=MODEL, base_url=f"{server.api}/v1", api_key=SecretStr("none"), timeout=120, max_retries=0,
        max_completion_tokens=LONG, temperature=1.5, seed=3,
    )  # fmt: skip
    found = chat.with_structured_output(Answer, method="json_schema").invoke("What is a for loop?")
    assert isinstance(found, Answer)


async def test_an_agents_output_type(server: Served) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.api}/v1", api_key="none", max_retries=0) as client:
        agent = Agent(
            "Forms",
            model=OpenAIChatCompletionsModel(MODEL, client),
            model_settings=ModelSettings(temperature=1.5, max_tokens=LONG, extra_args={"seed": 3}),
            output_type=Answer,
        )
        result = await Runner.run(agent, "What is a for loop?", run_config=RunConfig(tracing_disabled=True))
    assert isinstance(result.final_output, Answer)
