"""What a single token is called in log probabilities.

A token that is a part of a character has no text of its own. It is named by its bytes, as OpenAI does, so that two of
them are two: as `backslash x e2 …` in a chat, with `bytes:` before that in a completion.
"""

from __future__ import annotations

from collections.abc import Callable


class TokenNames:
    """Each is computed once. `bytes_of` gives a token's bytes."""

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        self._bytes_of = bytes_of
        self._chat: dict[int, tuple[str, list[int]]] = {}
        self._text: dict[int, str] = {}

    def chat(self, id: int) -> tuple[str, list[int]]:
        """The name, and the bytes."""
        known = self._chat.get(id)
        if known is None:
            data = self._bytes_of(id)
            text = _text(data)
            known = self._chat[id] = (_escaped(data) if text is None else text, list(data))
        return known

    def text(self, id: int) -> str:
        known = self._text.get(id)
        if known is None:
            data = self._bytes_of(id)
            text = _text(data)
            known = self._text[id] = f"bytes:{_escaped(data)}" if text is None else text
        return known


def _text(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def _escaped(data: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in data)
