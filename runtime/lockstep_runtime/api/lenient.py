"""Values as OpenAI's and vLLM's servers take them, beside those that the schemas name."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema


def at_most(most: int) -> BeforeValidator:
    """Looks at a list's length before it looks at what is in it."""

    def bounded(value: object) -> object:
        if isinstance(value, list) and len(value) > most:
            raise ValueError(f"List should have at most {most} items, not {len(value)}")
        return value

    return BeforeValidator(bounded)


def stops(value: object) -> object:
    """An empty string stops nothing."""
    strings = [value] if isinstance(value, str) else value
    return [one for one in strings if one != ""] if isinstance(strings, list) else strings


def flag(value: object) -> object:
    """0 and 1 are booleans in vLLM's server."""
    return bool(value) if type(value) is int and value in (0, 1) else value


def false_is_none(value: object) -> object:
    return None if value is False else value


def whole(value: Any) -> Any:
    """To JSON Schema 5.0 is an integer, too."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def wholes(value: Any) -> Any:
    """The same of a list's items."""
    return list(map(whole, value)) if isinstance(value, list) else value


Flag = Annotated[  # null: the default
    bool | None, BeforeValidator(flag), WithJsonSchema({"enum": [None, False, True, 0, 1]})
]
