"""Constrained answers of a real group: valid whatever the schema, the same tokens when rank 0 is killed meanwhile."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, Literal

import pytest
from openai import OpenAI
from pydantic import BaseModel
from tests.support.chaos import outlive_a_killed_rank_0
from tests.support.http import HTTP
from tests.support.schemas import fits, random_object
from tests.support.serve import Served, served
from tests.support.stream import Stream

SCHEMAS: Final = 20
MOST_TOKENS: Final = 1500  # of a short answer: the model knows no JSON, and draws any white space
SAMPLING: Final[tuple[Mapping[str, Any], ...]] = (
    {"temperature": 0},
    {"temperature": 0.8},
    {"temperature": 0.6, "top_k": 20},
)
COMPACT: Final[Mapping[str, Any]] = {"x-guidance": {"whitespace_flexible": False, "whitespace_pattern": None}}
# Long enough to be killed in, of a model that would write any length of it.
LIST: Final[dict[str, Any]] = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "even": {"type": "boolean"}},
        "required": ["n", "even"],
        "additionalProperties": False,
    },
    "minItems": 12,
    "maxItems": 12,
    **COMPACT,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    arguments = ("--tensor-parallel-size", "2", "--dtype", "float32", "--threads-per-rank", "1")
    with served(tmp_path_factory.mktemp("forms"), *arguments) as serve:
        serve.ready()
        yield serve


def complete(serve: Served, **fields: Any) -> dict[str, Any]:
    body = {"model": "tiny-chat", "prompt": "Answer in JSON: ", "max_tokens": MOST_TOKENS, **fields}
    answer = HTTP.post(f"{serve.api}/v1/completions", json=body, timeout=300)
    assert answer.status_code == 200, answer.text
    choice: dict[str, Any] = answer.json()["choices"][0]
    return choice


def test_answers_to_random_schemas_are_valid(server: Served) -> None:
    rng = random.Random(20)
    schemas = [{**random_object(rng), **(COMPACT if number % 5 else {})} for number in range(SCHEMAS)]

    def answer(number: int) -> dict[str, Any]:
        return complete(server, guided_json=schemas[number], seed=number, **SAMPLING[number % 3])

    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(answer, range(SCHEMAS)))
    for schema, choice in zip(schemas, answers, strict=True):
        assert choice["finish_reason"] == "stop", choice
        assert fits(json.loads(choice["text"]), schema), (choice["text"], schema)


FORMS: Final[tuple[Mapping[str, Any], ...]] = (
    {"guided_json": LIST, "temperature": 0, "logprobs": 1},
    {"guided_json": LIST, "temperature": 0.7, "seed": 5, "presence_penalty": 0.3, "repetition_penalty": 1.05},
    {"guided_regex": r"([a-z]{3,9} ){30}[a-z]{3,9}\.", "top_k": 30, "seed": 6, "ignore_eos": True},
    {"temperature": 0.9, "seed": 8, "max_tokens": 200, "ignore_eos": True},  # free, in their company
)


def begin(serve: Served, form: Mapping[str, Any]) -> Stream:
    request = {"model": "tiny-chat", "prompt": "A list: ", "max_tokens": MOST_TOKENS, "ignore_eos": False, **form}
    return Stream(serve.api, request, 300)


def test_a_constrained_stream_goes_on_with_the_same_tokens_when_rank_0_is_killed(server: Served) -> None:
    undisturbed = [begin(server, form).wait() for form in FORMS]
    for answer in undisturbed[:2]:
        assert fits(json.loads(answer.text), LIST), answer
    assert re.fullmatch(str(FORMS[2]["guided_regex"]), undisturbed[2].text)
    assert [answer.finish for answer in undisturbed] == ["stop", "stop", "stop", "length"]
    for _ in range(2):
        outlive_a_killed_rank_0(server, lambda: [begin(server, form) for form in FORMS], undisturbed)


def test_other_fields_hold_beside_a_form(server: Served) -> None:
    cut = complete(server, guided_json=LIST, max_tokens=9, temperature=0)
    assert cut["finish_reason"] == "length"
    stopped = complete(server, guided_json=LIST, stop="}", temperature=0)
    assert (stopped["finish_reason"], "}" in stopped["text"]) == ("stop", False)
    described = complete(server, guided_choice=["yes", "no"], logprobs=3, temperature=0)
    assert described["text"] in ("yes", "no")
    assert "".join(described["logprobs"]["tokens"]) == described["text"]
    assert all(len(top) >= 3 for top in described["logprobs"]["top_logprobs"])  # of what the model would have said, too
    least = complete(server, guided_regex="a+", min_tokens=20, max_tokens=60, temperature=0)
    assert re.fullmatch("a+", least["text"])
    free = complete(server, guided_regex="a+", min_tokens=0, max_tokens=60, temperature=0)
    assert len(least["text"]) >= 20 or least["text"] != free["text"]
    short = complete(server, guided_choice=["x"], min_tokens=50, temperature=0)
    assert (short["text"], short["finish_reason"]) == ("x", "stop")


class Person(BaseModel):
    name: Literal["Ada", "Grace"]
    age: int
    pets: list[Literal["cat", "dog"]]


@pytest.mark.parametrize("stream", [False, True])
def test_openais_client_parses_what_it_asked_for(server: Served, stream: bool) -> None:
    """Its schema of a class has titles and definitions."""
    client = OpenAI(base_url=f"{server.api}/v1", api_key="none", timeout=300)
    asked: Any = {
        "model": "tiny-chat", "messages": [{"role": "user", "content": "Who?"}], "response_format": Person,
        "seed": 3, "temperature": 0.7, "max_tokens": MOST_TOKENS, "presence_penalty": 0.5, "frequency_penalty": 0.5,
    }  # fmt: skip
    if stream:
        with client.chat.completions.stream(**asked) as events:
            parsed = events.get_final_completion().choices[0].message.parsed
    else:
        parsed = client.chat.completions.parse(**asked).choices[0].message.parsed
    assert isinstance(parsed, Person)
    client.close()
