"""Calls of tools by the `openai` client: whole and streamed, in every format that models write them in."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import pytest
from tests.support.api_server import SERVED, TINY_CHAT, serving
from tests.support.chat_model import CODER, HERMES, LLAMA, TEXT_ARGUMENTS, THINKING, chat_tokenizer, write_chat_model
from tests.support.engine import FakeEngine, Part
from tests.support.tool_texts import BARE, TOOLS, WEATHER

from lockstep_runtime.config import ToolCallParser
from lockstep_runtime.protocol.step import Grammar, Thoughts

TOKENIZER = chat_tokenizer()
END = TOKENIZER.token_to_id("<|im_end|>") or 0
ARGUMENTS = '{"city": "Zürich \\"🎉\\"", "days": 3}'
HERMES_CALL = f'<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
CODER_CALL = (
    '<tool_call>\n<function=weather>\n<parameter=city>\nZürich "🎉"\n</parameter>\n<parameter=days>\n3\n</parameter>\n'
    "</function>\n</tool_call>"
)
LLAMA_CALL = f'{{"name": "weather", "parameters": {ARGUMENTS}}}'
FORMATS = [(HERMES, HERMES_CALL, "\n"), (CODER, CODER_CALL, "\n"), (LLAMA, LLAMA_CALL, "; ")]
formats = pytest.mark.parametrize(("template", "written", "between"), FORMATS, ids=["hermes", "qwen3_coder", "llama3"])
MALFORMED = {"type": "function", "function": {"name": "f", "parameters": {"type": "oops"}}}
HI = [{"role": "user", "content": "Hi"}]


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False).ids


@dataclass
class Answer:
    """`calls`: id, name and arguments, by their index."""

    content: str = ""
    reasoning: str = ""
    calls: dict[int, list[str]] = field(default_factory=dict)
    reason: str | None = None
    pieces: int = 0  # of arguments

    @property
    def named(self) -> list[tuple[str, str]]:
        return [(name, arguments) for _, name, arguments in self.calls.values()]


@dataclass
class Served:
    engine: FakeEngine
    client: openai.AsyncOpenAI

    async def whole(self, **extra: Any) -> Answer:
        create: Any = self.client.chat.completions.create  # its overloads take no dict
        [choice] = (await create(**{"model": SERVED, "messages": HI, "tools": TOOLS.ALL, **extra})).choices
        calls = [[call.id, call.function.name, call.function.arguments] for call in choice.message.tool_calls or []]
        assert (choice.message.content is None) <= bool(calls)
        thought = choice.message.model_dump().get("reasoning") or ""
        return Answer(choice.message.content or "", thought, dict(enumerate(calls)), choice.finish_reason)

    async def streamed(self, **extra: Any) -> Answer:
        create: Any = self.client.chat.completions.create
        answer = Answer()
        async for chunk in await create(
            **{"model": SERVED, "messages": HI, "tools": TOOLS.ALL, "stream": True, **extra}
        ):
            [choice] = chunk.choices
            answer.content += choice.delta.content or ""
            answer.reasoning += choice.delta.model_dump().get("reasoning") or ""
            answer.reason = choice.finish_reason or answer.reason
            for call in choice.delta.tool_calls or []:
                if call.id is not None:
                    assert (call.type, call.index) == ("function", len(answer.calls))
                    answer.calls[call.index] = [call.id, call.function.name, ""]
                answer.calls[call.index][2] += call.function.arguments
                answer.pieces += bool(call.function.arguments)
        return answer

    async def both(self, **extra: Any) -> Answer:
        """A streamed answer is the whole one, but for the calls' ids."""
        whole, streamed = await self.whole(**extra), await self.streamed(**extra)
        assert (streamed.content, streamed.reasoning, streamed.reason) == (whole.content, whole.reasoning, whole.reason)
        assert streamed.named == whole.named
        return whole

    @property
    def prompt(self) -> str:
        return str(TOKENIZER.decode(self.engine.requests[-1].prompt, skip_special_tokens=False))


@contextlib.asynccontextmanager
async def served(
    folder: Path, template: str, answer: str | Iterable[Part], parser: ToolCallParser = "auto"
) -> AsyncIterator[Served]:
    parts = ids(answer) if isinstance(answer, str) else list(answer)
    engine = FakeEngine(lambda _: parts, END)
    async with (
        serving(engine, model=write_chat_model(folder, template), tool_call_parser=parser) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield Served(engine, client)


@formats
async def test_a_call(tmp_path: Path, template: str, written: str, between: str) -> None:
    async with served(tmp_path, template, written) as asked:
        answer = await asked.both()
        streamed = await asked.streamed()
    assert (answer.content, answer.reason, answer.named) == ("", "tool_calls", [("weather", ARGUMENTS)])
    assert json.loads(ARGUMENTS) == {"city": 'Zürich "🎉"', "days": 3}
    assert streamed.pieces > 5
    assert answer.calls[0][0].startswith("call_")


@formats
async def test_several_calls_have_ids_of_their_own(tmp_path: Path, template: str, written: str, between: str) -> None:
    async with served(tmp_path, template, between.join([written] * 3)) as asked:
        answer = await asked.both()
    assert answer.named == [("weather", ARGUMENTS)] * 3
    assert len({call[0] for call in answer.calls.values()}) == 3


@formats
async def test_one_call_is_enough_where_calls_are_not_parallel(
    tmp_path: Path, template: str, written: str, between: str
) -> None:
    async with served(tmp_path, template, between.join([written] * 3)) as asked:
        answer = await asked.both(parallel_tool_calls=False)
        assert len(asked.engine.cancelled) == 2, "no token is drawn in vain"
    assert (answer.named, answer.reason) == ([("weather", ARGUMENTS)], "tool_calls")


@pytest.mark.parametrize(("template", "written"), [form[:2] for form in FORMATS[:2]])
async def test_prose_before_a_call_is_content(tmp_path: Path, template: str, written: str) -> None:
    async with served(tmp_path, template, f"Let me look. 🎉\n\n{written}") as asked:
        answer = await asked.both()
    assert (answer.content, answer.named) == ("Let me look. 🎉", [("weather", ARGUMENTS)])


@formats
async def test_an_answer_without_a_call(tmp_path: Path, template: str, written: str, between: str) -> None:
    async with served(tmp_path, template, 'It is "sunny": 1 < 2 {really}.\n') as asked:
        answer = await asked.both()
    assert (answer.content, answer.calls, answer.reason) == ('It is "sunny": 1 < 2 {really}.\n', {}, "stop")


@formats
async def test_what_was_cut_says_so(tmp_path: Path, template: str, written: str, between: str) -> None:
    tokens = len(ids(written[: written.index("🎉")]))
    async with served(tmp_path, template, written) as asked:
        answer = await asked.both(max_tokens=tokens)
    [(name, arguments)] = answer.named
    assert (name, answer.reason, answer.content) == ("weather", "length", "")
    assert ARGUMENTS.startswith(arguments)
    assert arguments.startswith('{"city": "Z')


@pytest.mark.parametrize(
    ("template", "written"),
    [
        (HERMES, '<tool_call>\n{"name": "weather", "arguments": {"city" oops}}\n</tool_call>'),
        (HERMES, "<tool_call>\nweather(Paris)\n</tool_call>"),
        (CODER, "<tool_call>\n<function=weather>\nParis\n</function>\n</tool_call>"),
        (LLAMA, '{"name": "weather", "parameters": ["Paris"]}'),
    ],
)
async def test_a_malformed_call_is_content(tmp_path: Path, template: str, written: str) -> None:
    async with served(tmp_path, template, written) as asked:
        whole, streamed = await asked.whole(), await asked.streamed()
    assert (whole.content, whole.calls, whole.reason) == (written, {}, "stop")
    assert (streamed.content, streamed.reason) == (written, "stop")


@formats
async def test_without_tools_nothing_is_a_call(tmp_path: Path, template: str, written: str, between: str) -> None:
    ways: list[dict[str, Any]] = [{"tools": []}, {"tools": None}, {"tool_choice": "none"}]
    for off in ways:
        async with served(tmp_path, template, written) as asked:
            answer = await asked.both(**off)
            assert "A description" not in asked.prompt
            assert "weather" not in asked.prompt
        assert (answer.content, answer.calls, answer.reason) == (written, {}, "stop")


async def test_a_special_marker_is_seen_and_not_shown(tmp_path: Path) -> None:
    async with served(tmp_path, LLAMA, f"<|python_tag|>{LLAMA_CALL}<|eom_id|>") as asked:
        assert (await asked.both()).named == [("weather", ARGUMENTS)]
    async with served(tmp_path, LLAMA, "<|python_tag|>print(1)") as asked:
        answer = await asked.both()
    assert (answer.content, answer.calls) == ("print(1)", {})


async def test_an_unknown_tools_name_is_for_the_client_to_judge(tmp_path: Path) -> None:
    async with served(tmp_path, HERMES, HERMES_CALL.replace("weather", "whether")) as asked:
        assert (await asked.both()).named == [("whether", ARGUMENTS)]


async def test_calls_after_thinking_and_within(tmp_path: Path) -> None:
    async with served(tmp_path, HERMES, f"<think>\nHm, {HERMES_CALL}?\n</think>\n\n{HERMES_CALL}") as asked:
        answer = await asked.both()
    assert (answer.reasoning, answer.content) == (f"Hm, {HERMES_CALL}?", "")
    assert answer.named == [("weather", ARGUMENTS)]
    thinking = CODER.replace("'<|im_start|>assistant\\n' }}{% endif", "'<|im_start|>assistant\\n<think>\\n' }}{% endif")
    async with served(tmp_path, thinking, f"Hm, <function=weather> or\n{CODER_CALL}") as asked:
        answer = await asked.both()
    assert (answer.reasoning, answer.content) == ("Hm, <function=weather> or", "")
    assert (answer.named, answer.reason) == ([("weather", ARGUMENTS)], "tool_calls")


async def test_every_token_has_its_log_probability(tmp_path: Path) -> None:
    async with served(tmp_path, HERMES, HERMES_CALL) as asked:
        create: Any = asked.client.chat.completions.create
        [choice] = (await create(model=SERVED, messages=HI, tools=TOOLS.ALL, logprobs=True)).choices
        assert len(choice.logprobs.content) == len(ids(HERMES_CALL))
        chunks = [
            chunk.choices[0].logprobs.content
            async for chunk in await create(model=SERVED, messages=HI, tools=TOOLS.ALL, logprobs=True, stream=True)
            if chunk.choices[0].logprobs
        ]
    assert sum(map(len, chunks)) == len(ids(HERMES_CALL))


async def test_the_prompt_has_tools_calls_and_results(tmp_path: Path) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
    history = [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [call, call]},  # two of one id: odd, and taken
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "sunny"}]},
        {"role": "tool", "content": "no id"},
    ]
    expected = json.dumps(WEATHER, ensure_ascii=False)
    async with served(tmp_path, HERMES, "Sunny.") as asked:
        await asked.both(messages=history, tools=[WEATHER])
        assert f"<|im_start|>system\n# Tools\n{expected}\n<|im_end|>\n" in asked.prompt
        assert f"<|im_start|>assistant\n\n{HERMES_CALL}\n{HERMES_CALL}<|im_end|>" in asked.prompt
        assert "<|im_start|>tool\nsunny<|im_end|>\n<|im_start|>tool\nno id<|im_end|>" in asked.prompt


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (ARGUMENTS, ARGUMENTS),
        ('{"a":1.50}', '{"a": 1.5}'),
        ("", "{}"),
        ("{broken", '"{broken"'),
        ({"a": 1}, '{"a": 1}'),
    ],
)
async def test_a_template_that_wants_objects_gets_them(tmp_path: Path, arguments: Any, shown: str) -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    async with served(tmp_path, HERMES, "Sunny.") as asked:
        await asked.whole(messages=[*HI, {"role": "assistant", "tool_calls": [call]}])
        assert f'"arguments": {shown}}}\n' in asked.prompt


@pytest.mark.parametrize(("arguments", "shown"), [('{"a":1}', '{"a":1}'), ({"a": 1}, '{"a": 1}')])
async def test_a_template_that_wants_text_gets_it(tmp_path: Path, arguments: Any, shown: str) -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    async with served(tmp_path, TEXT_ARGUMENTS, HERMES_CALL) as asked:
        answer = await asked.both(messages=[*HI, {"role": "assistant", "tool_calls": [call]}])
        assert f'"arguments": {shown}}}\n' in asked.prompt
    assert answer.named == [("weather", ARGUMENTS)]


async def test_users_tools_make_no_special_tokens(tmp_path: Path) -> None:
    evil = "<|im_end|>"
    tool = {
        "type": "function",
        "function": {"name": "f", "description": evil, "parameters": {"properties": {evil: {}}}},
    }
    call = {"type": "function", "function": {"name": "f", "arguments": json.dumps({evil: evil})}}
    async with served(tmp_path, HERMES, "No.") as asked:
        await asked.whole(tools=[tool], messages=[*HI, {"role": "assistant", "tool_calls": [call]}])
        ends = asked.engine.requests[-1].prompt.count(END)
        assert asked.prompt.count(evil) == ends + 4
    assert ends == 3


async def test_the_parser_may_be_chosen(tmp_path: Path) -> None:
    async with served(tmp_path, HERMES, CODER_CALL, "qwen3_coder") as asked:
        assert (await asked.both()).named == [("weather", ARGUMENTS)]
    async with served(tmp_path, HERMES, HERMES_CALL, "none") as asked:
        with pytest.raises(openai.BadRequestError, match="--tool-call-parser") as error:
            await asked.whole()
        assert error.value.code == "unsupported_parameter"
        assert (await asked.whole(tool_choice="none")).content == HERMES_CALL


async def test_a_template_without_tools_is_told(tmp_path: Path) -> None:
    async with served(tmp_path, THINKING, "Hi") as asked:
        with pytest.raises(openai.BadRequestError, match="tells the model of none") as error:
            await asked.whole()
        assert (error.value.param, error.value.code) == ("tools", "unsupported_parameter")


async def test_a_template_for_tools_is_used_with_them(tmp_path: Path) -> None:
    write_chat_model(tmp_path, (TINY_CHAT / "chat_template.jinja").read_text())
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text(HERMES)
    engine = FakeEngine(lambda _: ids(HERMES_CALL), END)
    async with (
        serving(engine, model=tmp_path) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        asked = Served(engine, client)
        assert (await asked.both()).named == [("weather", ARGUMENTS)]
        assert "# Tools" in asked.prompt
        await asked.whole(tools=None)
        assert "# Tools" not in asked.prompt


def grammar(asked: Served) -> Grammar | None:
    rules = asked.engine.requests[-1].rules
    return None if rules is None else rules.grammar


@formats
async def test_a_call_is_demanded(tmp_path: Path, template: str, written: str, between: str) -> None:
    """The engine is asked for answers that a grammar allows; the unit tests say what it allows."""
    named = {"type": "function", "function": {"name": "weather"}}
    several = between.join([written] * 2)
    async with served(tmp_path, template, several) as asked:
        assert len((await asked.both(tool_choice="required")).calls) == 2
        found = grammar(asked)
        assert found is not None
        assert (found.kind, found.end_ids, "weather" in found.text, "bare" in found.text) == (
            "lark",
            (2045, END),
            True,
            True,
        )
        answer = await asked.both(tool_choice=named)
        assert (answer.named[0], answer.reason) == (("weather", ARGUMENTS), "tool_calls")
        found = grammar(asked)
        assert found is not None
        assert "bare" not in found.text
        await asked.whole(tool_choice="auto")
        assert grammar(asked) is None


async def test_a_demanded_call_comes_after_the_thoughts(tmp_path: Path) -> None:
    async with served(tmp_path, HERMES, f"<think>\nhm\n</think>\n\n{HERMES_CALL}") as asked:
        answer = await asked.both(tool_choice="required")
        found = grammar(asked)
    assert (answer.reasoning, answer.named) == ("hm", [("weather", ARGUMENTS)])
    opening, closing = (TOKENIZER.token_to_id(marker) for marker in ("<think>", "</think>"))
    assert found is not None
    assert found.thoughts == Thoughts(opening=opening or 0, closing=closing or 0)


async def test_an_answers_form_leaves_room_for_calls(tmp_path: Path) -> None:
    form = {"response_format": {"type": "json_object"}}
    async with served(tmp_path, HERMES, HERMES_CALL) as asked:
        assert (await asked.both(**form)).named == [("weather", ARGUMENTS)]
        found = grammar(asked)
        assert found is not None
        assert (found.kind, "weather" in found.text) == ("lark", True)
        await asked.whole(tool_choice="none", **form)
        found = grammar(asked)
        assert found is not None
        assert found.kind == "json_schema"


@pytest.mark.parametrize(
    ("wrong", "param", "words"),
    [
        ({"tools": 5}, "tools", "a list of tools"),
        ({"tools": [5]}, "tools", "tools[0]"),
        ({"tools": [BARE, {"type": "web_search"}]}, "tools[1].type", "only tools of type function"),
        ({"tools": [{"type": "function"}]}, "tools", "tools[0].function"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools", "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]}, "tools", "JSON Schema"),
        ({"tools": [{"function": {"name": "f", "description": 5}}]}, "tools", "description should be a string"),
        ({"tools": [{"function": {"name": "f", "strict": "no"}}]}, "tools", "strict should be true or false"),
        ({"tools": [BARE] * 1025}, "tools", "at most 1024"),
        ({"tool_choice": "perhaps"}, "tool_choice", "none, auto, required"),
        ({"tool_choice": {"type": "function"}}, "tool_choice", "none, auto, required"),
        ({"tool_choice": {"type": "function", "function": {"name": "snow"}}}, "tool_choice", "no tool 'snow'"),
        ({"tool_choice": "required", "tools": None}, "tool_choice", "needs `tools`"),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "response_format", "two forms"),
        ({"tool_choice": "required", "tools": [MALFORMED]}, "tool_choice", "oops"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls", "boolean"),
        ({"messages": [{"role": "function", "name": "f", "content": "5"}]}, "role", "the role tool"),
        ({"messages": [{"role": "assistant", "function_call": {"name": "f"}}]}, "function_call", "use tool_calls"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]},
         "messages[0].tool_calls[0].function", "required"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 5}}]}]},
         "messages[0].tool_calls[0].function.arguments", "holds a JSON object"),
    ],
)  # fmt: skip
async def test_what_is_wrong_is_named(tmp_path: Path, wrong: dict[str, Any], param: str, words: str) -> None:
    async with served(tmp_path, HERMES, "Hi") as asked:
        with pytest.raises(openai.BadRequestError) as error:
            await asked.whole(**wrong)
    assert error.value.param == param
    assert words in error.value.message
