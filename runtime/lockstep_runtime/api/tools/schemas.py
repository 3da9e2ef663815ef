"""Tools, the choice among them, and calls in a conversation's history, as requests have them.

Tools reach the template as they were written, order and further fields included.

Source: https://platform.openai.com/docs/api-reference/chat/create and vLLM's `ChatCompletionRequest`.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, PlainValidator, WithJsonSchema

from lockstep_runtime.api.errors import ApiError, unsupported
from lockstep_runtime.api.limits import Limits, parse
from lockstep_runtime.api.tools.parser import MAX_NAME, is_name

MAX_TOOLS: Final = 1024
_NAME: Final = r"""^[^\s\x1c-\x1f\x85{}<>"']+$"""  # as `is_name` has it
_NAMED: Final = '{"type": "function", "function": {"name": "…"}}'
_FUNCTION: Final = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": MAX_NAME, "pattern": _NAME},
        "description": {"type": ["string", "null"]},
        "parameters": {"type": ["object", "null"], "description": "JSON Schema of an object"},
        "strict": {"type": ["boolean", "null"]},
    },
    "required": ["name"],
}
_TOOLS_SCHEMA: Final = {
    "anyOf": [
        {
            "type": "array",
            "maxItems": MAX_TOOLS,
            "items": {
                "type": "object",
                "properties": {"type": {"const": "function"}, "function": _FUNCTION},
                "required": ["function"],
            },
        },
        {"type": "null"},
    ]
}
_CHOICE_SCHEMA: Final = {
    "anyOf": [
        {"enum": ["none", "auto", "required", None]},
        {
            "type": "object",
            "properties": {
                "type": {"const": "function"},
                "function": {
                    "type": "object",
                    "properties": {"name": _FUNCTION["properties"]["name"]},  # type: ignore[index]
                    "required": ["name"],
                },
            },
            "required": ["function"],
        },
    ]
}


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


def _arguments(value: object) -> object:
    if value is None or isinstance(value, str | dict):
        return value
    raise ValueError("Input should be a string that holds a JSON object")


class CalledFunction(_Strict):
    """`arguments`: JSON, or, as some clients send it, the object itself."""

    name: str
    arguments: Annotated[
        str | dict[str, Any] | None,
        PlainValidator(_arguments),
        WithJsonSchema({"type": ["string", "object", "null"]}),
    ] = None

    def for_template(self, *, objects: bool) -> dict[str, Any]:
        """What is no JSON object stays the text that it is: a model may have written it."""
        arguments: Any = "" if self.arguments is None else self.arguments
        if isinstance(arguments, str):
            arguments = _parsed(arguments) if objects else arguments
        elif not objects:
            arguments = _written(arguments)
        return {"name": self.name, "arguments": arguments}


class ToolCall(_Strict):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction

    def for_template(self, *, objects: bool) -> dict[str, Any]:
        call = {"type": self.type, "function": self.function.for_template(objects=objects)}
        return call if self.id is None else {"id": self.id, **call}


def _parsed(arguments: str) -> Any:
    if not arguments.strip():
        return {}
    try:
        return parse(arguments.encode(), Limits())
    except ApiError:
        return arguments


def _written(arguments: dict[str, Any]) -> str:
    return json.dumps(arguments, ensure_ascii=False)


def _tools(tools: object) -> object:
    if tools is None:
        return None
    if not isinstance(tools, list):
        raise ValueError("Input should be a list of tools")
    if len(tools) > MAX_TOOLS:
        raise ValueError(f"List should have at most {MAX_TOOLS} tools, not {len(tools)}")
    for index, tool in enumerate(tools):
        _check_tool(tool, f"tools[{index}]")
    return tools


def _check_tool(tool: object, place: str) -> None:
    kind = tool.get("type", "function") if isinstance(tool, dict) else None
    if not isinstance(tool, dict) or not isinstance(kind, str):
        raise ValueError(f"{place} should be an object with `type` and `function`")
    if kind != "function":
        raise unsupported(f"{place}.type", "only tools of type function are taken")
    function = tool.get("function")
    if not isinstance(function, dict):
        raise ValueError(f"{place}.function should be an object with a `name`")
    name, parameters = function.get("name"), function.get("parameters")
    described, strict = function.get("description"), function.get("strict")
    if not isinstance(name, str) or not is_name(name):
        words = f"a string of 1 to {MAX_NAME} characters, without spaces, quotation marks and brackets"
        raise ValueError(f"{place}.function.name should be {words}")
    if described is not None and not isinstance(described, str):
        raise ValueError(f"{place}.function.description should be a string")
    if strict is not None and not isinstance(strict, bool):
        raise ValueError(f"{place}.function.strict should be true or false")
    if parameters is not None and not isinstance(parameters, dict):
        raise ValueError(f"{place}.function.parameters should be a JSON Schema, an object")


def _choice(choice: object) -> object:
    """`none`, `auto`, `required`, or the name of a function, in a tuple."""
    if choice is None or choice in ("none", "auto", "required"):
        return choice
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or choice.get("type", "function") != "function":  # type: ignore[attr-defined]
        raise ValueError(f"Input should be none, auto, required or {_NAMED}")
    return (name,)


Tools = Annotated[list[dict[str, Any]] | None, PlainValidator(_tools), WithJsonSchema(_TOOLS_SCHEMA)]
ToolChoice = Annotated[
    Literal["none", "auto", "required"] | tuple[str] | None, PlainValidator(_choice), WithJsonSchema(_CHOICE_SCHEMA)
]
