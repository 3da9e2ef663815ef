"""Grammars of calls: what they let a model write is what the parsers read as calls of the tools that were asked for."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.support.tool_texts import BARE, TOOLS, WEATHER, read

from lockstep_runtime.api.tools.formats import ToolFormat
from lockstep_runtime.api.tools.grammar import MARKED, calls_grammar
from lockstep_runtime.grammar.compiler import BYTES, byte_tokenizer, compile_grammar
from lockstep_runtime.protocol.step import Grammar

TOKENIZER = byte_tokenizer()
FORMATS: list[ToolFormat] = ["hermes", "qwen3_coder", "llama3_json"]


def accepts(grammar: str, text: str) -> bool:
    """Whether the text is whole for the grammar, byte by byte."""
    matcher = compile_grammar(Grammar(kind="lark", text=grammar, end_ids=(BYTES,)), TOKENIZER)
    data = list(text.encode())
    return bool(matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting())


def written(format: ToolFormat, name: str, arguments: dict[str, Any]) -> str:
    """As the model's template would write it."""
    if format == "llama3_json":
        return json.dumps({"name": name, "parameters": arguments}, ensure_ascii=False)
    if format == "hermes":
        return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>"
    values = {key: one if isinstance(one, str) else json.dumps(one) for key, one in arguments.items()}
    inner = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>"


BETWEEN = {"hermes": "\n", "qwen3_coder": "\n", "llama3_json": "; "}
ARGUMENTS: list[dict[str, Any]] = [
    {"city": "Zürich 🎉"},
    {"city": "", "days": 3},
    {"city": 'a\nb "c" </parameter> {}', "days": None, "share": -1.5, "wet": True},
    {"city": "a", "where": {"x": [1]}, "many": [1, "b"], "note": "null?", "kind": "snow", "point": {"x": 1}},
]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_what_the_grammar_lets_through_is_read_as_a_call(format: ToolFormat, arguments: dict[str, Any]) -> None:
    text = written(format, "weather", arguments)
    assert accepts(calls_grammar(format, [WEATHER], parallel=False), text)
    assert accepts(calls_grammar(format, TOOLS.ALL, parallel=False), f"\n\n{text}")
    [(name, found)] = read(format, text).calls
    assert (name, json.loads(found)) == ("weather", arguments)


@pytest.mark.parametrize("format", FORMATS)
def test_several_calls_only_where_they_are_parallel(format: ToolFormat) -> None:
    text = BETWEEN[format].join([written(format, "weather", {"city": "a"}), written(format, "bare", {})])
    assert accepts(calls_grammar(format, TOOLS.ALL, parallel=True), text)
    assert not accepts(calls_grammar(format, TOOLS.ALL, parallel=False), text)
    assert [name for name, _ in read(format, text).calls] == ["weather", "bare"]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "arguments",
    [{}, {"days": 3}, {"city": "a", "days": "three"}, {"city": "a", "kind": "hail"}, {"city": "a", "wet": 1}],
)
def test_what_the_schema_forbids_can_not_be_drawn(format: ToolFormat, arguments: dict[str, Any]) -> None:
    assert not accepts(calls_grammar(format, [WEATHER], parallel=True), written(format, "weather", arguments))


@pytest.mark.parametrize("format", FORMATS)
def test_neither_prose_nor_another_tool(format: ToolFormat) -> None:
    grammar = calls_grammar(format, [BARE], parallel=True)
    for text in ("", "No.", "\n\n\n" + written(format, "bare", {}), written(format, "weather", {"city": "a"})):
        assert not accepts(grammar, text)
    assert accepts(grammar, written(format, "bare", {}))
    assert accepts(grammar, written(format, "bare", {"any": "thing", "at": "all"}))


@pytest.mark.parametrize("format", MARKED)
def test_either_a_call_or_an_answer_of_a_form(format: ToolFormat) -> None:
    schema = {"type": "object", "properties": {"mood": {"enum": ["good", "bad"]}}, "required": ["mood"]}
    grammar = calls_grammar(format, [WEATHER], parallel=True, otherwise=json.dumps(schema))
    for text in ('{"mood": "good"}', written(format, "weather", {"city": "a"})):
        assert accepts(grammar, text)
    for text in ('{"mood": "odd"}', '{"mood": "good"}' + written(format, "weather", {"city": "a"}), "Good."):
        assert not accepts(grammar, text)


@pytest.mark.parametrize("format", FORMATS)
def test_no_model_writes_spaces_for_ever(format: ToolFormat) -> None:
    text = written(format, "weather", {"city": "a", "many": [1, 2]})
    assert accepts(calls_grammar(format, [WEATHER], parallel=False), text)
    assert not accepts(calls_grammar(format, [WEATHER], parallel=False), text.replace("1, 2", "1,  2"))


@pytest.mark.parametrize("format", FORMATS)
def test_names_and_keys_of_any_kind(format: ToolFormat) -> None:
    name = "日本.tool/v1:x-y\\z"
    schema = {"type": "object", "properties": {"ключ.x": {"type": "string"}}, "required": ["ключ.x"]}
    tool = {"type": "function", "function": {"name": name, "parameters": schema}}
    text = written(format, name, {"ключ.x": "a"})
    assert accepts(calls_grammar(format, [tool], parallel=False), text)
