"""Answers with calls, put together from what a parser makes of their text."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Final

from lockstep_runtime.api.tools.formats import ToolFormat, tool_parser
from lockstep_runtime.api.tools.parts import CallArguments, CallBegun, CallBroken, CallEnded, Part, Prose

_POINT: Final = {"type": "object", "properties": {"x": {"type": "integer"}}}
WEATHER: Final[dict[str, Any]] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of some days",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": ["integer", "null"]},
                "share": {"type": "number"},
                "wet": {"type": "boolean"},
                "where": {"type": "object"},
                "many": {"type": "array"},
                "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                "either": {"oneOf": [{"type": "integer"}, {"type": "string"}]},
                "kind": {"enum": ["rain", "snow"]},
                "point": {"$ref": "#/$defs/Point"},
            },
            "$defs": {"Point": _POINT},
            "required": ["city"],
        },
    },
}
BARE: Final[dict[str, Any]] = {"type": "function", "function": {"name": "bare"}}


class TOOLS:
    """The tools of these tests."""

    ALL: Final = [WEATHER, BARE]

    @staticmethod
    def render(format: ToolFormat, name: str, arguments: dict[str, str]) -> str:
        """A call as the model would write it."""
        if format == "hermes":
            return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"
        inner = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items())
        return f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>"


@dataclass
class Answer:
    """`calls`: name and arguments. What broke is text."""

    text: str
    calls: list[tuple[str, str]]
    broken: int = field(default=0, compare=False)


def read(format: ToolFormat, *pieces: str, cut: bool = False, finish: bool = True) -> Answer:
    """What the pieces make, in the order in which a parser must give it."""
    parser = tool_parser(format, TOOLS.ALL)
    parts: list[Part] = [part for piece in pieces for part in parser.feed(piece)]
    if finish:
        parts += parser.finish(cut=cut)
    return answer(parts)


def answer(parts: list[Part]) -> Answer:
    made, opened, text, calls = Answer("", []), -1, "", dict[int, tuple[str, str]]()
    for part in parts:
        match part:
            case Prose():
                text += part.text
            case CallBegun():
                assert part.index == opened + 1
                opened = part.index
                calls[opened] = (part.name, "")
            case CallArguments():
                assert part.index == opened
                calls[opened] = (calls[opened][0], calls[opened][1] + part.json)
            case CallEnded():
                assert part.index == opened
            case CallBroken():
                assert part.index == opened
                del calls[opened]
                text += part.text
                made.broken += 1
    made.text, made.calls = text, list(calls.values())
    return made
