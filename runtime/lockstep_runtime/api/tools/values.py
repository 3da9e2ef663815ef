"""An argument that a model wrote as plain text, as the value that the tool's JSON Schema asks for."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

import msgspec

_DEPTH: Final = 8  # of references and alternatives that are followed
_LITERAL: Final = 10_000  # characters of a Python literal that is tried: `ast` is slow
_WORDS: Final[Mapping[str, Any]] = {"true": True, "false": False, "null": None, "none": None}
_OF_VALUE: Final[Mapping[type, str]] = {
    str: "string", bool: "boolean", int: "integer", float: "number", dict: "object", list: "array", type(None): "null",
}  # fmt: skip
STRING: Final = "string"
NULL: Final = "null"


def types_of(schema: object, root: object = None) -> tuple[str, ...]:
    """The types that a schema allows, in its order; a string where it says nothing.

    Args:
        root: where the schema's references (`#/$defs/…`) lead; default: the schema itself.
    """
    found = dict.fromkeys(_types(schema, schema if root is None else root, _DEPTH))
    return tuple(found) or (STRING,)


def _types(schema: object, root: object, depth: int) -> Iterator[str]:
    if not isinstance(schema, dict) or not depth:
        return
    named = schema.get("type")
    yield from (one for one in (named if isinstance(named, list) else [named]) if isinstance(one, str))
    values = schema.get("enum") if named is None else None
    for value in values if isinstance(values, list) else ([schema["const"]] if "const" in schema else []):
        yield _OF_VALUE[type(value)]
    for alternatives in (schema.get("anyOf"), schema.get("oneOf"), schema.get("allOf")):
        for one in alternatives if isinstance(alternatives, list) else ():
            yield from _types(one, root, depth - 1)
    if isinstance(schema.get("$ref"), str):
        yield from _types(_referenced(schema["$ref"], root), root, depth - 1)


def _referenced(reference: str, root: object) -> object:
    if not reference.startswith("#/"):
        return None
    for name in reference[2:].split("/"):
        root = root.get(name.replace("~1", "/").replace("~0", "~")) if isinstance(root, dict) else None
    return root


def as_json(text: str, types: tuple[str, ...]) -> str:
    """The text as JSON of the first type that it fits; as a string where it fits none, so that nothing is lost.

    Templates write what is no string as JSON or as Python does (`True`, `None`, `{'a': 1}`), so both are read.
    """
    if types[0] == STRING and not (NULL in types and text.strip().lower() in ("null", "none")):
        return quoted(text)
    value = _value(text.strip())
    for kind in types:
        if kind == STRING and value is not None:
            break
        if _fits(value, kind):
            return _written(value) or quoted(text)
    return quoted(text)


def quoted(text: str) -> str:
    return msgspec.json.encode(text).decode()


class _Nothing:
    """The text is no value."""


def _value(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    if len(text) > _LITERAL or text[:1] not in tuple("{[("):
        return _Nothing
    try:
        return json.loads(json.dumps(ast.literal_eval(text)))  # tuples are arrays
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return _Nothing


def _written(value: Any) -> str | None:
    """None: it holds a number that JSON hasn't."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return None


def _fits(value: Any, kind: str) -> bool:
    found = _OF_VALUE.get(type(value))
    return found == kind or (found == "integer" and kind == "number") or (found == "number" and kind == "integer")
