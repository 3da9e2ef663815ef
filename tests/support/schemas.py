"""Random JSON Schemas, and whether a value is what one describes: of the keywords that they are made of."""

from __future__ import annotations

import random
import re
from typing import Any

WORDS = ("name", "total", "größe", "is_open", "tags", "a b", 'quo"te')


def random_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    kinds = ["integer", "boolean", "null", "enum", "const", "string", "pattern", "number"]
    kind = rng.choice(kinds if depth > 2 else [*kinds, *["object", "array", "anyOf"] * 2])
    made: dict[str, Any] = _MAKERS[kind](rng, depth)
    return made


def random_object(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    names = rng.sample(WORDS, rng.randint(1, 4))
    return {
        "type": "object",
        "properties": {name: random_schema(rng, depth + 1) for name in names},
        "required": rng.sample(names, rng.randint(0, len(names))),
        "additionalProperties": False,
    }


_MAKERS: dict[str, Any] = {
    "object": random_object,
    "array": lambda rng, depth: {
        "type": "array", "items": random_schema(rng, depth + 1), "minItems": rng.randint(0, 2), "maxItems": 3,
    },
    "anyOf": lambda rng, depth: {"anyOf": [random_schema(rng, depth + 1) for _ in range(2)]},
    "integer": lambda rng, _: {"type": "integer", "minimum": rng.randint(-50, 0), "maximum": rng.randint(1, 5000)},
    "number": lambda rng, _: {"type": "number", "minimum": 0, "maximum": 9},
    "boolean": lambda rng, _: {"type": "boolean"},
    "null": lambda rng, _: {"type": "null"},
    "enum": lambda rng, _: {"enum": rng.sample([*WORDS, 1, None, True, "1"], 3)},
    "const": lambda rng, _: {"const": rng.choice([*WORDS, 0, False])},
    "string": lambda rng, _: {"type": "string", "maxLength": rng.randint(0, 12)},
    "pattern": lambda rng, _: {"type": "string", "pattern": rng.choice(["^[a-f]{2,5}$", "^\\d{3}-\\d{2}$"])},
}  # fmt: skip


def fits(value: Any, schema: dict[str, Any]) -> bool:
    if "anyOf" in schema:
        return any(fits(value, one) for one in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        options = schema.get("enum", [schema.get("const")])
        return any(type(value) is type(one) and value == one for one in options)
    match schema["type"]:
        case "object":
            return (
                isinstance(value, dict)
                and set(schema["required"]) <= set(value) <= set(schema["properties"])
                and all(fits(one, schema["properties"][name]) for name, one in value.items())
            )
        case "array":
            return (
                isinstance(value, list)
                and schema["minItems"] <= len(value) <= schema["maxItems"]
                and all(fits(one, schema["items"]) for one in value)
            )
        case "integer":
            return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
        case "number":
            return type(value) in (int, float) and schema["minimum"] <= value <= schema["maximum"]
        case "boolean":
            return isinstance(value, bool)
        case "null":
            return value is None
    if "pattern" in schema:
        return isinstance(value, str) and re.search(schema["pattern"], value) is not None
    return isinstance(value, str) and len(value) <= schema["maxLength"]
