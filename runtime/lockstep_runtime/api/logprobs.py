"""Log probabilities in OpenAI's two forms, encoded token by token: an answer's end costs no more than its middle.

Source: https://platform.openai.com/docs/api-reference/chat/object and .../completions/object
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from lockstep_runtime.api.tokenizer import TextTokenizer
from lockstep_runtime.protocol.step import SampledToken

LEAST: Final = -9999.0  # JSON has no -inf: OpenAI's stand-in for "very unlikely"


def finite(logprob: float | None) -> float:
    return LEAST if logprob is None else max(logprob, LEAST)


class _Top(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]


class _Entry(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[_Top]


class ChatLogprobs:
    """Of one choice: `content`'s entries."""

    __slots__ = ("_entries", "_names")

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._names = tokenizer.names
        self._entries: list[bytes] = []

    def add(self, tokens: Sequence[SampledToken]) -> None:
        self._entries += [msgspec.json.encode(self._entry(token)) for token in tokens]

    def take(self) -> dict[str, Any]:
        """What was added."""
        entries, self._entries = self._entries, []
        return {"content": _array(entries), "refusal": None}

    def of(self, tokens: Sequence[SampledToken]) -> dict[str, Any]:
        """Those of a few tokens, for a chunk."""
        return {"content": [self._entry(token) for token in tokens], "refusal": None}

    def _entry(self, token: SampledToken) -> _Entry:
        name, data = self._names.chat(token.token)
        return _Entry(name, finite(token.logprob), data, [self._top(id, logprob) for id, logprob in token.top])

    def _top(self, id: int, logprob: float) -> _Top:
        name, data = self._names.chat(id)
        return _Top(name, finite(logprob), data)


class TextLogprobs:
    """Of one choice: four arrays side by side. Offsets count the characters of the choice's text before a token, the
    echoed prompt included; a token that is no part of the text has no width.

    Args:
        described: the echoed prompt's tokens will be added, too.
        hidden: tokens that are no part of the text.
    """

    __slots__ = ("_arrays", "_decoder", "_hidden", "_offset", "_tokenizer")

    def __init__(self, tokenizer: TextTokenizer, echo: str, *, described: bool, hidden: frozenset[int]) -> None:
        self._tokenizer, self._hidden = tokenizer, hidden
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0 if described else len(echo)
        self._arrays: tuple[list[bytes], ...] = ([], [], [], [])

    def add(self, tokens: Sequence[SampledToken]) -> None:
        for token in tokens:
            self._append(token, shown=token.token not in self._hidden)

    def add_prompt(self, prompt: Sequence[int], scored: Sequence[SampledToken], echo: str) -> None:
        """`scored`: of all tokens but the first, which follows nothing and so has no probability."""
        for index, id in enumerate(prompt):
            shown = id not in self._tokenizer.special_ids or echo.startswith(self._text(id), self._offset)
            self._append(scored[index - 1] if index else SampledToken(sequence_id=0, token=id), shown, first=not index)
        self._offset = len(echo)
        self._decoder.reset()

    def take(self) -> dict[str, Any]:
        """What was added since the last time."""
        arrays, self._arrays = self._arrays, ([], [], [], [])
        names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        return {name: _array(array) for name, array in zip(names, arrays, strict=True)}

    def _append(self, token: SampledToken, shown: bool, *, first: bool = False) -> None:
        top: dict[str, float] = {}
        for id, logprob in token.top:  # the likeliest first: of two tokens with one text it stays
            top.setdefault(self._text(id), finite(logprob))
        values = (
            self._text(token.token),
            None if first else finite(token.logprob),
            None if first else top,
            self._offset,
        )
        for array, value in zip(self._arrays, values, strict=True):
            array.append(msgspec.json.encode(value))
        if shown:
            self._offset += len(self._decoder.decode(self._tokenizer.token_bytes(token.token)))

    def _text(self, id: int) -> str:
        return self._tokenizer.names.text(id)


def _array(items: list[bytes]) -> msgspec.Raw:
    return msgspec.Raw(b"[" + b",".join(items) + b"]")
