"""Calls in the model's own format as a grammar, in llguidance's Lark: for answers that must be calls.

Source: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, Final

from lockstep_runtime.api.tools.formats import ToolFormat
from lockstep_runtime.api.tools.json_calls import CALL, CALL_END
from lockstep_runtime.api.tools.values import STRING, types_of
from lockstep_runtime.api.tools.xml_calls import FUNCTION, FUNCTION_END, PARAMETER, PARAMETER_END

_BEFORE: Final = r"/\n{0,2}/"  # behind the reasoning's end
_BETWEEN: Final[dict[ToolFormat, str]] = {"hermes": "\n", "qwen3_coder": "\n", "llama3_json": "; "}
# Formats whose calls begin otherwise than JSON does: an answer may be either, and its first characters tell which.
MARKED: Final[tuple[ToolFormat, ...]] = ("hermes", "qwen3_coder")
_ANY_OBJECT: Final = {"type": "object"}
_SPACES: Final = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_FREE: Final = "free"  # text up to a parameter's end
_MORE: Final = "more"  # a parameter that no schema names


def calls_grammar(
    format: ToolFormat, tools: Sequence[dict[str, Any]], *, parallel: bool, otherwise: str | None = None
) -> str:
    """A grammar of one call of one of these tools.

    Args:
        parallel: or of several calls.
        otherwise: or of an answer that matches this JSON Schema; for formats that are `MARKED`.
    """
    names = [f"call{index}" for index in range(len(tools))]
    more = f" ({_literal(_BETWEEN[format])} call)*" if parallel else ""
    answer = "" if otherwise is None else " | answer"
    rules = [f"start: {_BEFORE} (call{more}{answer})", f"call: {' | '.join(names)}"]
    rules += [] if otherwise is None else [f"answer: %json {otherwise}"]
    for name, tool in zip(names, tools, strict=True):
        function = tool["function"]
        write = _xml if format == "qwen3_coder" else _json
        rules += write(format, name, function["name"], function.get("parameters"))
    if format == "qwen3_coder":
        rules += [
            rf"{_FREE}[suffix={_literal(_end_of_parameter())}]: /(.|\n)*/",
            f'{_MORE}: {_literal(PARAMETER)} /[^\\s<>]+/ ">\\n" {_FREE}',
        ]
    return "\n".join(rules) + "\n"


def _json(format: ToolFormat, rule: str, name: str, schema: Any) -> Iterator[str]:
    key = "parameters" if format == "llama3_json" else "arguments"
    head, tail = f'{{"name": {_text(name)}, "{key}": ', "}"
    if format == "hermes":
        head, tail = f"{CALL}\n{head}", f"{tail}\n{CALL_END}"
    yield f"{rule}: {_literal(head)} {rule}_arguments {_literal(tail)}"
    yield f"{rule}_arguments: {_json_of(schema or _ANY_OBJECT)}"


def _xml(format: ToolFormat, rule: str, name: str, schema: Any) -> Iterator[str]:
    """Parameters in the schema's order, those that are required and any of the others."""
    properties = schema.get("properties") if isinstance(schema, dict) else None
    properties = properties if isinstance(properties, dict) else {}
    required = schema.get("required") if isinstance(schema, dict) else None
    parts: list[str] = []
    for index, (key, of_key) in enumerate(properties.items()):
        parameter = f"{rule}_parameter{index}"
        parts.append(parameter if isinstance(required, list) and key in required else f"{parameter}?")
        value, rules = _value(parameter, of_key, schema)
        yield f"{parameter}: {_literal(f'{PARAMETER}{key}>{chr(10)}')} {value}"
        yield from rules
    parts = parts or [f"{_MORE}*"]
    head, tail = _literal(f"{CALL}\n{FUNCTION}{name}>\n"), _literal(f"{FUNCTION_END}\n{CALL_END}")
    yield f"{rule}: {head} {' '.join(parts)} {tail}"


def _value(parameter: str, schema: Any, root: Any) -> tuple[str, list[str]]:
    """What stands between a parameter's beginning and what follows it, and the rules of that."""
    end = _literal(_end_of_parameter())
    if STRING not in types_of(schema, root):
        definitions = {name: root[name] for name in ("$defs", "definitions") if name in root}
        return f"{parameter}_value {end}", [f"{parameter}_value: {_json_of({**definitions, **schema})}"]
    choices = schema.get("enum") if isinstance(schema, dict) else None
    if isinstance(choices, list) and choices and all(isinstance(one, str) for one in choices):
        return f"({' | '.join(map(_literal, choices))}) {end}", []
    return _FREE, []


def _end_of_parameter() -> str:
    return f"\n{PARAMETER_END}\n"


def _json_of(schema: dict[str, Any]) -> str:
    """Spaced as templates write it: where any space is allowed, a model may write spaces for ever."""
    return f"%json {_text({**schema, 'x-guidance': _SPACES})}"


def _literal(text: str) -> str:
    """Lark's strings are JSON's."""
    return _text(text)


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
