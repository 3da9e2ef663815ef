"""Each field in README's table does what the table says: asked with it, the api does something else than without."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
from tests.support.api_bodies import CHAT, TEXT
from tests.support.api_server import SERVED, serving
from tests.support.chat_model import HERMES, chat_tokenizer, write_chat_model
from tests.support.engine import FakeEngine
from tests.support.http import async_http
from tests.support.tool_texts import TOOLS

from lockstep_runtime.engine.client import GenerationRequest

ROOT: Final = Path(__file__).parents[2]
TOKENIZER = chat_tokenizer()
END: Final = TOKENIZER.token_to_id("<|im_end|>") or 0
TEMPLATE: Final = "{{ style }}{{ reasoning_effort }}" + HERMES
CALL: Final = '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>'
ANSWER: Final = f"<think>\nhm\n</think>\n\none<|im_start|> two\n{CALL}\n{CALL}"
PROMPT: Final = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
LAST: Final = {"role": "assistant", "content": "It is "}


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False).ids


@dataclass
class Seen:
    """What came of a request: the answer, and what the engine was asked for."""

    text: str
    asked: list[GenerationRequest]

    @property
    def body(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.text)
        return found

    @property
    def choice(self) -> dict[str, Any]:
        choice: dict[str, Any] = self.body["choices"][0]
        return choice

    @property
    def message(self) -> dict[str, Any]:
        message: dict[str, Any] = self.choice["message"]
        return message

    @property
    def request(self) -> GenerationRequest:
        return self.asked[0]

    @property
    def prompt(self) -> str:
        return str(TOKENIZER.decode(self.request.prompt, skip_special_tokens=False))


@dataclass(frozen=True)
class Case:
    """A body with the field, and what is so then, and not without the field."""

    fields: dict[str, Any]
    shows: Callable[[Seen], bool]
    path: str = CHAT
    without: dict[str, Any] | None = None  # the body that it is compared with, if the field can't be left out


def rule(name: str, value: float) -> Case:
    return Case(
        {name: value}, lambda seen: seen.request.rules is not None and getattr(seen.request.rules, name) == value
    )


def draw(name: str, value: float) -> Case:
    return Case({name: value}, lambda seen: getattr(seen.request.sampling, name) == value)


def form(name: str, value: Any, kind: str, text: str) -> Case:
    def shows(seen: Seen) -> bool:
        rules = seen.request.rules
        grammar = None if rules is None else rules.grammar
        return grammar is not None and (grammar.kind, grammar.text) == (kind, text)

    return Case({name: value}, shows)


CASES: Final[dict[str, Case]] = {
    "model": Case({"model": SERVED}, lambda seen: "choices" in seen.body, without={"model": "another"}),
    "messages": Case(
        {"messages": [{"role": "user", "content": "Ho"}]}, lambda seen: "\nHo<" in seen.prompt
    ),
    "prompt": Case({"prompt": "Ho"}, lambda seen: seen.prompt.endswith("Ho"), TEXT),
    "max_tokens": Case({"max_tokens": 3}, lambda seen: seen.body["usage"]["completion_tokens"] == 3),
    "max_completion_tokens": Case({"max_completion_tokens": 3}, lambda seen: seen.request.max_tokens == 3),
    "temperature": draw("temperature", 0.3),
    "top_p": draw("top_p", 0.4),
    "top_k": draw("top_k", 5),
    "min_p": draw("min_p", 0.1),
    "seed": draw("seed", 7),
    "frequency_penalty": rule("frequency_penalty", 0.5),
    "presence_penalty": rule("presence_penalty", 0.5),
    "repetition_penalty": rule("repetition_penalty", 1.5),
    "logit_bias": Case({"logit_bias": {"5": 9}}, lambda seen: getattr(seen.request.rules, "bias", None) == {5: 9}),
    "min_tokens": rule("min_tokens", 4),
    "response_format": form("response_format", {"type": "json_object"}, "json_schema", '{"type":"object"}'),
    "structured_outputs": form("structured_outputs", {"json": {"type": "null"}}, "json_schema", '{"type":"null"}'),
    "guided_json": form("guided_json", {"type": "null"}, "json_schema", '{"type":"null"}'),
    "guided_regex": form("guided_regex", "a+", "regex", "a+"),
    "guided_choice": form("guided_choice", ["a", "b"], "lark", 'start: "a" | "b"'),
    "guided_grammar": form("guided_grammar", 'root ::= "a"', "gbnf", 'root ::= "a"'),
    "n": Case({"n": 3}, lambda seen: len(seen.body["choices"]) == 3),
    "best_of": Case({"best_of": 3}, lambda seen: (len(seen.asked), len(seen.body["choices"])) == (3, 1)),
    "stop": Case({"stop": "two"}, lambda seen: seen.message["content"] == "one "),
    "stop_token_ids": Case({"stop_token_ids": [9]}, lambda seen: 9 in seen.request.stop_token_ids),
    "ignore_eos": Case({"ignore_eos": True, "max_tokens": 90}, lambda seen: seen.choice["finish_reason"] == "length",
                       without={"max_tokens": 90}),
    "include_stop_str_in_output": Case(
        {"stop": "two", "include_stop_str_in_output": True}, lambda seen: seen.message["content"] == "one two"
    ),
    "skip_special_tokens": Case({"skip_special_tokens": False}, lambda seen: "<|im_start|>" in seen.message["content"]),
    "stream": Case({"stream": True}, lambda seen: seen.text.endswith("data: [DONE]\n\n")),
    "stream_options": Case(
        {"stream": True, "stream_options": {"include_usage": True}}, lambda seen: '"usage":{' in seen.text,
        without={"stream": True},
    ),
    "logprobs": Case({"logprobs": True}, lambda seen: bool(seen.choice["logprobs"])),
    "top_logprobs": Case(
        {"logprobs": True, "top_logprobs": 2},
        lambda seen: len(seen.choice["logprobs"]["content"][0]["top_logprobs"]) == 2,
        without={"logprobs": True},
    ),
    "echo": Case({"prompt": "Ho", "echo": True}, lambda seen: seen.choice["text"].startswith("Ho"), TEXT),
    "add_special_tokens": Case(
        {"prompt": "Ho", "add_special_tokens": False}, lambda seen: seen.request.prompt[0] != END, TEXT
    ),
    "cache_salt": Case({"cache_salt": "mine"}, lambda seen: seen.request.cache_salt == "mine"),
    "continue_final_message": Case(
        {"messages": [LAST], "continue_final_message": True}, lambda seen: seen.prompt.endswith("It is "),
        without={"messages": [LAST]},
    ),
    "add_generation_prompt": Case({"add_generation_prompt": False}, lambda seen: "assistant" not in seen.prompt),
    "chat_template_kwargs": Case({"chat_template_kwargs": {"style": "ode"}}, lambda seen: "ode<" in seen.prompt),
    "reasoning_effort": Case({"reasoning_effort": "low"}, lambda seen: seen.prompt.startswith("low")),
    "tools": Case({"tools": TOOLS.ALL}, lambda seen: len(seen.message["tool_calls"]) == 2),
    "tool_choice": Case(
        {"tools": TOOLS.ALL, "tool_choice": "none"},
        lambda seen: CALL in seen.message["content"],
        without={"tools": TOOLS.ALL},
    ),
    "parallel_tool_calls": Case(
        {"tools": TOOLS.ALL, "parallel_tool_calls": False}, lambda seen: len(seen.message["tool_calls"]) == 1,
        without={"tools": TOOLS.ALL},
    ),
}  # fmt: skip


def table() -> list[str]:
    """The fields in README's table."""
    section = (ROOT / "README.md").read_text().partition("\n## The API\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    return [name for row in rows for name in re.findall(r"`([a-z_]+)`", row.split("|")[1])]


def test_the_table_and_the_cases_are_the_same_fields() -> None:
    assert sorted(table()) == sorted(CASES)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_chat_model(tmp_path_factory.mktemp("table"), TEMPLATE)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|im_end|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_end|>": {"id": "<|im_end|>", "ids": [END], "tokens": ["<|im_end|>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.fixture
async def client(model: Path) -> AsyncIterator[tuple[httpx.AsyncClient, FakeEngine]]:
    fake = FakeEngine(lambda _: ids(ANSWER), END)
    async with serving(fake, model=model) as url, async_http(base_url=url) as opened:
        yield opened, fake


async def ask(opened: httpx.AsyncClient, fake: FakeEngine, path: str, fields: dict[str, Any]) -> Seen:
    fake.requests.clear()
    prompt = {"messages": [{"role": "user", "content": "Hi"}]} if path == CHAT else {"prompt": "Hi"}
    response = await opened.post(path, json={"model": SERVED, **prompt, **fields})
    return Seen(response.text, list(fake.requests))


@pytest.mark.parametrize("field", CASES)
async def test_a_field_of_the_table(client: tuple[httpx.AsyncClient, FakeEngine], field: str) -> None:
    case = CASES[field]
    assert case.shows(await ask(*client, case.path, case.fields))
    without = {name: value for name, value in case.fields.items() if name != field}
    plain = await ask(*client, case.path, without if case.without is None else case.without)
    try:
        assert not case.shows(plain)
    except (KeyError, IndexError, TypeError, json.JSONDecodeError):
        assert plain.text  # another form of answer altogether
