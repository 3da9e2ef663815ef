"""Calls in the formats of Hermes, Qwen3-Coder and Llama 3, and what looks like calls and is none."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.support.tool_texts import TOOLS, Answer, read

from lockstep_runtime.api.tools.formats import ToolFormat

WEATHER = '{"city": "Zürich 🎉", "days": 3}'
CALL = f'<tool_call>\n{{"name": "weather", "arguments": {WEATHER}}}\n</tool_call>'
XML = """<tool_call>
<function=weather>
<parameter=city>
Zürich 🎉
</parameter>
<parameter=days>
3
</parameter>
</function>
</tool_call>"""
LLAMA = f'{{"name": "weather", "parameters": {WEATHER}}}'


def call(arguments: str = WEATHER, name: str = "weather") -> tuple[str, str]:
    return name, arguments


@pytest.mark.parametrize(
    ("format", "text", "expected"),
    [
        ("hermes", CALL, Answer("", [call()])),
        ("hermes", f"Let me look.\n\n{CALL}\n{CALL}\n", Answer("Let me look.", [call(), call()])),
        ("hermes", f"{CALL}\n\nDone.\n", Answer("Done.\n", [call()])),
        ("hermes", f"a\n{CALL} b\n{CALL}\nc", Answer("a b" + "c", [call(), call()])),
        ("hermes", '<tool_call>{"name": "weather"}</tool_call>', Answer("", [call("{}")])),
        ("hermes", '<tool_call>{"arguments": {"a": [1]}, "name": "weather"}</tool_call>',
         Answer("", [call('{"a": [1]}')])),
        ("hermes", '<tool_call>{"name": "weather", "arguments": "{\\"a\\": 1}"}</tool_call>',
         Answer("", [call('{"a": 1}')])),
        ("hermes", '<tool_call>{"name": "weather", "arguments": null}</tool_call>', Answer("", [call("{}")])),
        ("hermes", '<tool_call>{"id": "x", "name": "unheard-of.tool", "arguments": {}, "more": [{}]}</tool_call>',
         Answer("", [call("{}", "unheard-of.tool")])),
        ("hermes", '<tool_call>{"name": "weather", "arguments": {"city": "a\nb\t"}}</tool_call>',
         Answer("", [call('{"city": "a\\nb\\t"}')])),
        ("hermes", '<tool_call>{"name": "weather", "arguments": {"city": "</tool_call> \\" {"}}</tool_call>',
         Answer("", [call('{"city": "</tool_call> \\" {"}')])),
        ("hermes", f'<tool_call>{LLAMA}\n{LLAMA}</tool_call>', Answer("", [call(), call()])),
        ("hermes", f'<tool_call>{LLAMA}', Answer("", [call()])),  # the end of turn came early
        ("hermes", f'<tool_call>{LLAMA[:-1]}', Answer("", [call()])),
        ("qwen3_coder", XML, Answer("", [call()])),
        ("qwen3_coder", f"Let me look.\n\n{XML}\n{XML}\n", Answer("Let me look.", [call(), call()])),
        ("qwen3_coder", "<tool_call>\n<function=weather>\n</function>\n</tool_call>", Answer("", [call("{}")])),
        ("qwen3_coder", XML.removeprefix("<tool_call>\n"), Answer("", [call()])),
        ("qwen3_coder", XML.removesuffix("\n</tool_call>"), Answer("", [call()])),
        ("qwen3_coder", XML.removesuffix("\n</function>\n</tool_call>"), Answer("", [call()])),
        ("qwen3_coder", XML.replace("</function>\n", ""), Answer("", [call()])),
        ("qwen3_coder", XML.replace("3\n</parameter>", "3"), Answer("", [call()])),
        ("llama3_json", LLAMA, Answer("", [call()])),
        ("llama3_json", f"  <|python_tag|>{LLAMA}", Answer("", [call()])),
        ("llama3_json", f"{LLAMA}; {LLAMA}\n{LLAMA}", Answer("", [call(), call(), call()])),
        ("llama3_json", f'I look.\n<|python_tag|>{{"type": "function", "name": "weather", "arguments": {WEATHER}}}',
         Answer("I look.", [call()])),
    ],
)  # fmt: skip
def test_calls(format: ToolFormat, text: str, expected: Answer) -> None:
    assert read(format, text) == expected


@pytest.mark.parametrize(
    ("format", "text"),
    [
        ("hermes", "No call, 1 < 2 <tool"),
        ("hermes", "It writes <tool_call> and </tool_call> around calls.\n"),
        ("hermes", "<tool_call>\nnone\n</tool_call>"),
        ("hermes", '<tool_call>{"name": 5, "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "", "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "{{ name }}", "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name"'),
        ("hermes", "<tool_call>[" + LLAMA + "]</tool_call>"),
        ("qwen3_coder", "It writes <tool_call> and <function=name> around calls.\n"),
        ("qwen3_coder", "<tool_call>\n<function={{ name }}>\n</function>\n</tool_call>"),
        ("qwen3_coder", "<tool_call><function=" + "x" * 300),
        ("qwen3_coder", CALL),
        ("llama3_json", '{"city": "Paris", "name": "weather"}'),
        ("llama3_json", '{"name": "Alice", "parameters": {}}'),
        ("llama3_json", f"The call is {LLAMA}"),
        ("llama3_json", " {a set}"),
        ("llama3_json", '\n{"name": "wea'),
    ],
)
def test_what_is_no_call_stays_the_text_that_it_is(format: ToolFormat, text: str) -> None:
    assert read(format, text) == Answer(text, [])


@pytest.mark.parametrize(
    ("format", "text", "calls"),
    [
        ("hermes", 'a\n\n<tool_call>{"name": "weather", "arguments": {"city" "Paris"}}</tool_call>\n', 1),
        ("hermes", 'a <tool_call>{"name": "weather", "arguments": {"city": oh no, <b>}}</tool_call>', 1),
        ("hermes", '<tool_call>{"name": "weather", "arguments": [1]}</tool_call>', 1),
        ("hermes", '<tool_call>{"name": "weather", "arguments": {"city": "Par', 1),
        ("hermes", '<tool_call>{"name": "weather", "arguments": {}', 0),  # whole but for its end
        ("qwen3_coder", "<tool_call>\n<function=weather>\nJust text\n</function>\n</tool_call>", 1),
        ("qwen3_coder", "<tool_call>\n<function=weather>\n<parameter=city>\nPar", 1),
        ("llama3_json", '{"name": "weather", "parameters": {]}', 1),
    ],
)
def test_a_call_that_breaks_is_text_again(format: ToolFormat, text: str, calls: int) -> None:
    """Nothing is lost: what was taken for a call is given back."""
    answer = read(format, text)
    assert (answer.broken, answer.text) == (calls, text if calls else "")


@pytest.mark.parametrize("format", ["hermes", "qwen3_coder", "llama3_json"])
def test_a_call_that_was_cut_stays_as_far_as_it_came(format: ToolFormat) -> None:
    text = {"hermes": CALL, "qwen3_coder": XML, "llama3_json": LLAMA}[format]
    end = text.index("rich")
    answer = read(format, text[:end], cut=True)
    assert answer == Answer("", [call('{"city": "Zü')])


@pytest.mark.parametrize(
    ("key", "written", "value"),
    [
        ("city", "Paris\n\n", "Paris\n\n"),
        ("city", "", ""),
        ("city", "null", "null"),
        ("city", "\n</parameter> in the middle\n</function> too", "</parameter> in the middle\n</function> too"),
        ("days", "3", 3),
        ("days", "3.5", 3.5),
        ("days", "three", "three"),
        ("days", "None", None),
        ("share", "1e3", 1000.0),
        ("share", "NaN", "NaN"),
        ("share", "1e999", "1e999"),
        ("wet", "True", True),
        ("wet", "maybe", "maybe"),
        ("where", '{"x": [1, null]}', {"x": [1, None]}),
        ("where", "{'x': (True, None)}", {"x": [True, None]}),
        ("where", "[1]", "[1]"),
        ("many", "[1, 2]", [1, 2]),
        ("many", "__import__('os')", "__import__('os')"),
        ("note", "null", None),
        ("note", "None", None),
        ("note", "nulls", "nulls"),
        ("note", "a", "a"),
        ("either", "5", 5),
        ("either", "five", "five"),
        ("kind", "rain", "rain"),
        ("point", '{"x": 1}', {"x": 1}),
        ("unknown", "5", "5"),
    ],
)
def test_a_value_has_the_type_that_the_tool_asks_for(key: str, written: str, value: Any) -> None:
    text = f"<tool_call>\n<function=weather>\n<parameter={key}>\n{written}\n</parameter>\n</function>\n</tool_call>"
    if written.startswith("\n"):
        text = text.replace(">\n\n", ">\n")
    [(_, arguments)] = read("qwen3_coder", text).calls
    assert json.loads(arguments) == {key: value}


def test_a_tool_without_a_schema_takes_strings() -> None:
    text = XML.replace("weather", "bare")
    assert read("qwen3_coder", text).calls == [("bare", '{"city": "Zürich 🎉", "days": "3"}')]


def test_arguments_come_as_they_are_written() -> None:
    """A long one isn't held back."""
    long = "x" * 500
    for format, text in (
        ("hermes", f'<tool_call>{{"name": "weather", "arguments": {{"city": "{long}'),
        ("qwen3_coder", f"<tool_call><function=weather><parameter=city>{long}"),
        ("llama3_json", f'{{"name": "weather", "parameters": {{"city": "{long}'),
    ):
        assert read(format, text, finish=False).calls == [("weather", f'{{"city": "{long}')]  # type: ignore[arg-type]


MARKUP = [
    "<tool_call>",
    "</tool_call>",
    "<function=",
    "weather>",
    "</function>",
    "<parameter=",
    "city>",
    "days>",
    "</parameter>",
    '{"name": "weather", ',
    '"arguments": ',
    '"parameters": ',
    '{"city": "',
    "<|python_tag|>",
]
LETTERS = ['"', "}", "{", "\n", " ", "\\", ",", ":", "[", "]", "3", "null", "prose", "<", ";", "Zürich 🎉"]  # fmt: skip
WORDS = [*MARKUP, *LETTERS, CALL, XML, LLAMA]
FORMATS = st.sampled_from(["hermes", "qwen3_coder", "llama3_json"])
TEXTS = st.lists(st.sampled_from(WORDS) | st.text(max_size=3), max_size=14).map("".join)


@given(FORMATS, TEXTS, st.lists(st.integers(0, 300), max_size=12), st.booleans())
@example("qwen3_coder", "<tool_call><function=weather></tool_call>", list(range(60)), False)
@settings(deadline=None, max_examples=600)
def test_wherever_a_text_is_cut_its_answer_is_the_same(
    format: ToolFormat, text: str, cuts: list[int], ended_early: bool
) -> None:
    pieces = [text[start:end] for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(text)], strict=True)]
    whole = read(format, text, cut=ended_early)
    assert read(format, *pieces, cut=ended_early) == whole
    assert read(format, *text, cut=ended_early) == whole
    for _, arguments in whole.calls if not ended_early else ():
        assert isinstance(json.loads(arguments), dict)
    if not whole.calls:
        kept = text.replace("<|python_tag|>", "") if format == "llama3_json" else text
        assert whole.text.replace("<|python_tag|>", "") == kept.replace("<|python_tag|>", "")


@given(FORMATS, st.lists(st.text(max_size=20), max_size=4), st.dictionaries(st.text(max_size=8), st.text(max_size=12)))
@settings(deadline=None, max_examples=200)
def test_no_text_between_calls_is_lost(format: ToolFormat, prose: list[str], arguments: dict[str, str]) -> None:
    if format == "llama3_json" or any(character in "".join([*prose, *arguments]) for character in "<>"):
        return
    made = TOOLS.render(format, "weather", arguments)
    answer = read(format, made.join(prose)) if prose else read(format, made)
    assert len(answer.calls) == max(1, len(prose) - 1) if len(prose) != 1 else not answer.calls
    assert answer.text.replace("\n", "") == "".join(prose).replace("\n", "")
