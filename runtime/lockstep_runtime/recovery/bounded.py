"""Bounds the messages of others that the group keeps and reports. Pure."""

from __future__ import annotations

from typing import Final

MESSAGE_CHARACTERS: Final = 1024


def bounded(text: str, most: int = MESSAGE_CHARACTERS) -> str:
    """The text, or its beginning and its end with what was left out counted in between."""
    if len(text) <= most:
        return text
    head = most * 3 // 4
    tail = most - head - 40
    return f"{text[:head]} … ({len(text) - head - tail} characters left out) … {text[-tail:]}"
