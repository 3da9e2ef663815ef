"""From token ids back to text, one token at a time; the pieces join to what the library decodes of all ids at once.

The library decodes a short window: the tokens that were let out last, without which a decoder would take the next one
for the first of a text, and those that are held back because they may be parts of a character. Its own `DecodeStream`
does the same, but raises where a run of byte tokens turns out malformed ("Invalid prefix encountered"), holds back
malformed bytes for ever while its work grows with their square, and can't be asked for what it holds at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from lockstep_runtime.api.tokenizer import TextTokenizer
from lockstep_runtime.sources.token_bytes import REPLACEMENT

CONTEXT_TOKENS: Final = 8  # of a prompt; also more than a character has bytes
# A run of byte tokens (`<0xE4>`) is one string to the library: a malformed byte at its end spoils what was well-formed
# before. So it is held until it ends, or is so long.
MOST_HELD: Final = 64


class Detokenizer:
    """
    Args:
        after: the tokens that come before the first one, if it continues their text.
        shown: special tokens that are text.
    """

    __slots__ = ("_bytes", "_held", "_hidden", "_out", "_tokenizer", "_window")

    def __init__(
        self, tokenizer: TextTokenizer, after: Sequence[int] = (), shown: frozenset[int] = frozenset()
    ) -> None:
        self._tokenizer, self._bytes = tokenizer, tokenizer.bytes
        self._hidden = tokenizer.special_ids - shown if shown else tokenizer.special_ids
        self._window = list(after[-CONTEXT_TOKENS:])
        self._held = 0  # the last tokens of the window that are not let out yet
        text = self._decode() if self._window else ""
        self._out = len(text) - text.endswith(REPLACEMENT)  # characters of the window's text that are

    def feed(self, id: int) -> str:
        """What is certain now. Special tokens that aren't shown, and ids of a padded vocabulary, are no text."""
        if id in self._hidden or self._tokenizer.token_of(id) is None:
            return ""
        self._window.append(id)
        self._held += 1
        if id in self._bytes.fallback and self._held < MOST_HELD:
            return ""
        text = self._decode()
        if not text.endswith(REPLACEMENT):
            return self._release(text, len(text), self._held)
        if self._bytes.byte_level and self._held >= MOST_HELD:  # malformed, but for the last character perhaps
            return self._release(text, len(text) - 1, CONTEXT_TOKENS)
        if self._held >= 2 * MOST_HELD:
            return self._release(text, len(text), self._held)
        return ""

    def finish(self) -> str:
        """What was held back. The next token is the first of another text."""
        text = self._decode()[self._out :] if self._held else ""
        self._window, self._held, self._out = [], 0, 0
        return text

    def _release(self, text: str, end: int, kept: int) -> str:
        new = text[self._out : end]
        if self._window[-1] in self._bytes.fallback:  # the rest of a long run is decoded apart from this
            self._window = [] if self._bytes.anchor is None else [self._bytes.anchor]
        else:
            self._window = self._window[-kept:]
        self._held = len(text) - end  # 1: the last token may yet become a character
        self._out = len(self._decode()) - (len(text) - end)
        return new

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window)
