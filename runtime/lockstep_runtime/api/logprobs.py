"""Log probabilities in OpenAI's two forms, encoded token by token: an answer's end costs no more than its middle.

A token that is a part of a character has no text of its own. It is named by its bytes, as OpenAI does, so that two of
them are two: as `backslash x e2 …` in a chat, with `bytes:` before that in a completion.

Source: https://platform.openai.com/docs/api-reference/chat/object and .../completions/object
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from lockstep_runtime.api.tokenizer import TextTokenizer
from lockstep_runtime.wire import SampledToken

LEAST: Final = -9999.0  # JSON has no -inf: OpenAI's stand-in for "very unlikely"


def finite(logprob: float | None) -> float:
    return LEAST if logprob is None else max(logprob, LEAST)


def escaped(data: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in data)


def text_or_none(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


class ChatLogprobs:
    """Of one choice, or of one chunk: `content`'s entries."""

    __slots__ = ("_entries", "_tokenizer")

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._entries: list[bytes] = []

    def add(self, tokens: Sequence[SampledToken]) -> None:
        self._entries += map(self._encoded, tokens)

    def take(self) -> dict[str, Any]:
        """What was added since the last time."""
        entries, self._entries = self._entries, []
        return {"content": _array(entries), "refusal": None}

    def _encoded(self, token: SampledToken) -> bytes:
        top = [self._entry(id, logprob) for id, logprob in token.top]
        return msgspec.json.encode(self._entry(token.token, token.logprob) | {"top_logprobs": top})

    def _entry(self, id: int, logprob: float | None) -> dict[str, Any]:
        data = self._tokenizer.token_bytes(id)
        text = text_or_none(data)
        return {"token": escaped(data) if text is None else text, "logprob": finite(logprob), "bytes": list(data)}


class TextLogprobs:
    """Of one choice: four arrays side by side. Offsets count the characters of the choice's text before a token, the
    echoed prompt included; a token that is no part of the text has no width."""

    __slots__ = ("_arrays", "_decoder", "_offset", "_tokenizer")

    def __init__(self, tokenizer: TextTokenizer, echo: str, *, described: bool) -> None:
        """`described`: the echoed prompt's tokens will be added, too."""
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0 if described else len(echo)
        self._arrays: tuple[list[bytes], ...] = ([], [], [], [])

    def add(self, tokens: Sequence[SampledToken]) -> None:
        for token in tokens:
            self._append(token, shown=token.token not in self._tokenizer.special_ids)

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
        data = self._tokenizer.token_bytes(id)
        text = text_or_none(data)
        return f"bytes:{escaped(data)}" if text is None else text


def _array(items: list[bytes]) -> msgspec.Raw:
    return msgspec.Raw(b"[" + b",".join(items) + b"]")
