"""The bytes of one token, for log probabilities: a token may be a part of a character.

The library decodes whole texts; of a single token it gives text only, in which parts of characters are lost.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any, Final

from tokenizers import Tokenizer

REPLACEMENT: Final = "\ufffd"


class TokenBytes:
    """
    Args:
        added: ids of the added tokens, which stand for their own text.
    """

    def __init__(self, tokenizer: Tokenizer, added: Collection[int]) -> None:
        kinds = set(_kinds(json.loads(tokenizer.decoder.__getstate__()))) if tokenizer.decoder else set()
        self._tokenizer, self._added = tokenizer, added
        self.byte_level: Final = "ByteLevel" in kinds
        self.fallback: Final = _fallback_bytes(tokenizer) if "ByteFallback" in kinds else {}
        self.anchor: Final = _anchor(tokenizer, added)
        self._known: dict[int, bytes] = {}

    def of(self, id: int) -> bytes:
        """Within a text: with the space that goes before a word. Nothing for ids of a padded vocabulary."""
        known = self._known.get(id)
        if known is None:
            known = self._known[id] = self._find(id)
        return known

    def _find(self, id: int) -> bytes:
        token = self._tokenizer.id_to_token(id)
        if token is None:
            return b""
        if self.byte_level:
            return _from_alphabet(token)
        if id in self.fallback:
            return bytes((self.fallback[id],))
        if id in self._added:
            return str(token).encode()
        return self._in_a_text(id).encode()

    def _in_a_text(self, id: int) -> str:
        if self.anchor is None:
            return str(self._tokenizer.decode([id], skip_special_tokens=False))
        before = self._tokenizer.decode([self.anchor], skip_special_tokens=False)
        return str(self._tokenizer.decode([self.anchor, id], skip_special_tokens=False))[len(before) :]


def _kinds(decoder: dict[str, Any]) -> list[str]:
    inner = [kind for part in decoder.get("decoders", ()) for kind in _kinds(part)]
    return [str(decoder.get("type")), *inner]


def _fallback_bytes(tokenizer: Tokenizer) -> dict[int, int]:
    ids = {byte: tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256)}
    return {id: byte for byte, id in ids.items() if id is not None}


def _anchor(tokenizer: Tokenizer, added: Collection[int]) -> int | None:
    """An ordinary token, for what comes first in a text is decoded otherwise than what follows."""
    for text in ("a", "A", "the", "0"):
        for id in reversed(tokenizer.encode(text, add_special_tokens=False).ids):
            decoded = tokenizer.decode([id], skip_special_tokens=False)
            if id not in added and decoded and REPLACEMENT not in decoded:
                return int(id)
    return None


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for characters from U+0100 on.

    Source: https://github.com/openai/gpt-2/blob/master/src/encoder.py (`bytes_to_unicode`).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTE_OF: Final = _byte_of_character()


def _from_alphabet(token: str) -> bytes:
    # A token with a character outside the alphabet (an added one, such as one with a space) is plain text, as in the
    # `tokenizers` library's ByteLevel decoder.
    if all(character in _BYTE_OF for character in token):
        return bytes(_BYTE_OF[character] for character in token)
    return token.encode()
