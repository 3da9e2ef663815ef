"""How a model writes calls: its own chat template knows, and is asked by rendering one.

The template is also asked whether it shows tools to the model, and whether it wants a call's arguments as an object,
as most do, or as the JSON text that OpenAI's messages have.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Final

from lockstep_runtime.api.chat_template import Chat, ChatTemplate
from lockstep_runtime.api.errors import ApiError
from lockstep_runtime.api.tools.formats import ToolFormat

_NAME: Final = "probe_of_calls"
_VALUE: Final = "probed value"
_ARGUMENTS: Final = {"probed": _VALUE}
_TOOL: Final = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "A probe",
        "parameters": {"type": "object", "properties": {"probed": {"type": "string", "description": "What"}}},
    },
}
_QUESTION: Final = {"role": "user", "content": "Hi"}
_FORMATS: Final[dict[ToolFormat, re.Pattern[str]]] = {
    "qwen3_coder": re.compile(rf"<tool_call>\s*<function={_NAME}>\s*<parameter=probed>\s*{_VALUE}"),
    "hermes": re.compile(rf'<tool_call>\s*\{{\s*"name":\s*"{_NAME}",\s*"arguments":\s*\{{\s*"probed":\s*"{_VALUE}"'),
    "llama3_json": re.compile(rf'\{{\s*"name":\s*"{_NAME}",\s*"parameters":\s*\{{\s*"probed":\s*"{_VALUE}"'),
}
_SECONDS: Final = 1.0
_CHARACTERS: Final = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolSupport:
    """What a template does with tools."""

    format: ToolFormat | None = None  # None: none that is known
    shown: bool = False  # the model is told of a request's tools
    objects: bool = True  # a call's arguments are objects; otherwise JSON in a string


NO_TOOLS: Final = ToolSupport()


def probe(template: ChatTemplate) -> ToolSupport:
    """Blocks, for seconds at worst: run it in a thread."""
    for arguments in (_ARGUMENTS, json.dumps(_ARGUMENTS)):
        called = _render(template, [_QUESTION, _call(arguments)])
        if called is not None and _VALUE in called:
            found = next((name for name, pattern in _FORMATS.items() if pattern.search(called)), None)
            return ToolSupport(format=found, shown=_shows(template), objects=isinstance(arguments, dict))
    return ToolSupport(shown=_shows(template))


def _shows(template: ChatTemplate) -> bool:
    return _NAME in (_render(template, [_QUESTION]) or "")


def _call(arguments: object) -> dict[str, Any]:
    function = {"name": _NAME, "arguments": arguments}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "probed123", "type": "function", "function": function}],
    }


def _render(template: ChatTemplate, messages: list[dict[str, Any]]) -> str | None:
    """None: the template refuses."""
    chat = Chat(messages=messages, tools=[_TOOL], add_generation_prompt=False)
    try:
        return template.render(chat, seconds=_SECONDS, limit=_CHARACTERS)
    except ApiError:
        return None
