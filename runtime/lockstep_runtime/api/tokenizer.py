"""The model's own tokenizer: text to ids, ids to bytes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders

from lockstep_runtime.api.errors import invalid


class UnsupportedTokenizerError(ValueError):
    """The tokenizer is of a kind that can't be served. The message names it."""


@dataclass(frozen=True, slots=True)
class ReasoningMarkers:
    """The two tokens between which a model thinks aloud."""

    opening: int
    closing: int


class TextTokenizer:
    """A `tokenizer.json` of the byte-level kind (GPT-2, Qwen, Llama 3): every token stands for a byte string."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        if not isinstance(tokenizer.decoder, decoders.ByteLevel):
            kind = type(tokenizer.decoder).__name__
            raise UnsupportedTokenizerError(f"its decoder is {kind}; only ByteLevel is supported")
        self._tokenizer = tokenizer
        self.size = tokenizer.get_vocab_size(with_added_tokens=True)
        special = {id: token.content for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self.special_ids = frozenset(special)
        self._special = _any_of(special.values())
        self.markers = _markers(tokenizer)
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def from_file(cls, path: Path) -> TextTokenizer:
        """
        Raises:
            UnsupportedTokenizerError: not a tokenizer file, or of another kind.
        """
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the binding raises bare Exception for whatever is wrong with the file
            raise UnsupportedTokenizerError(str(error)) from error
        return cls(tokenizer)

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Special tokens written in `text` become those tokens."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def id_of(self, token: str) -> int | None:
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def break_points(self, text: str) -> Iterator[int]:
        """Where `text` must be cut so that no part of it encodes to a special token.

        Raises:
            ApiError: 400, a special token of one character can't be cut.
        """
        position = 0
        while self._special and (match := self._special.search(text, position)):
            if len(match[0]) == 1:
                raise invalid(f"The text contains {match[0]!r}, which this model reserves", code="reserved_token")
            position = match.start() + 1
            yield position

    def token_bytes(self, id: int) -> bytes:
        """What a token stands for; nothing for ids of the padded vocabulary."""
        known = self._bytes.get(id)
        if known is None:
            known = self._bytes[id] = _to_bytes(self._tokenizer.id_to_token(id) or "")
        return known

    def decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text


def _any_of(strings: Iterable[str]) -> re.Pattern[str] | None:
    alternatives = sorted(filter(None, strings), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, alternatives))) if alternatives else None


def _markers(tokenizer: Tokenizer) -> ReasoningMarkers | None:
    added = {token.content: id for id, token in tokenizer.get_added_tokens_decoder().items()}
    opening, closing = added.get("<think>"), added.get("</think>")
    return ReasoningMarkers(opening, closing) if opening is not None and closing is not None else None


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for characters from U+0100 on.

    Source: https://github.com/openai/gpt-2/blob/master/src/encoder.py (`bytes_to_unicode`).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _byte_of_character()


def _to_bytes(token: str) -> bytes:
    # A token with a character outside the alphabet (an added one, such as one with a space) is plain text, as in the
    # `tokenizers` library's ByteLevel decoder.
    if all(character in _BYTE_OF for character in token):
        return bytes(_BYTE_OF[character] for character in token)
    return token.encode()
