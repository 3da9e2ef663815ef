"""The two forms of an answer: chat completions and text completions, whole or in chunks.

Source: https://platform.openai.com/docs/api-reference/chat/object, .../chat-streaming, .../completions/object
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from lockstep_runtime.api.generation import Piece
from lockstep_runtime.api.tokenizer import TextTokenizer
from lockstep_runtime.wire import SampledToken

Json = dict[str, Any]


class Form(Protocol):
    """Entries of `choices`."""

    whole: str  # `object` of a whole answer
    chunk: str  # `object` of a stream's chunks

    def opening(self, index: int) -> Json | None:
        """The first chunk of a choice, before any token."""

    def delta(self, index: int, piece: Piece) -> Json: ...

    def closing(self, index: int, reason: str) -> Json: ...

    def choice(self, index: int, pieces: Sequence[Piece], reason: str) -> Json: ...


class ChatForm:
    whole = "chat.completion"
    chunk = "chat.completion.chunk"

    def __init__(self, tokenizer: TextTokenizer, *, logprobs: bool) -> None:
        self._tokenizer = tokenizer
        self._with_logprobs = logprobs

    def opening(self, index: int) -> Json | None:
        return self._part(index, {"role": "assistant", "content": ""}, None, None)

    def delta(self, index: int, piece: Piece) -> Json:
        name = "reasoning_content" if piece.reasoning else "content"
        return self._part(index, {name: piece.text}, self._logprobs(piece.tokens), None)

    def closing(self, index: int, reason: str) -> Json:
        return self._part(index, {}, None, reason)

    def choice(self, index: int, pieces: Sequence[Piece], reason: str) -> Json:
        message = {"role": "assistant", "content": _join(piece for piece in pieces if not piece.reasoning)}
        if reasoning := _join(piece for piece in pieces if piece.reasoning):
            message["reasoning_content"] = reasoning
        logprobs = self._logprobs([token for piece in pieces for token in piece.tokens])
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def _part(self, index: int, delta: Json, logprobs: Json | None, reason: str | None) -> Json:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, tokens: Sequence[SampledToken]) -> Json | None:
        if not self._with_logprobs:
            return None
        return {
            "content": [
                self._entry(token.token, token.logprob)
                | {"top_logprobs": [self._entry(id, logprob) for id, logprob in token.top]}
                for token in tokens
            ]
        }

    def _entry(self, id: int, logprob: float | None) -> Json:
        data = self._tokenizer.token_bytes(id)
        return {"token": data.decode(errors="replace"), "logprob": finite(logprob), "bytes": list(data)}


class TextForm:
    """
    Args:
        echoes: for each choice, the prompt's text if it is to be part of the answer.
    """

    whole = chunk = "text_completion"

    def __init__(self, tokenizer: TextTokenizer, echoes: Sequence[str], *, logprobs: bool) -> None:
        self._tokenizer = tokenizer
        self._echoes = echoes
        self._with_logprobs = logprobs
        self._offsets = [0] * len(echoes)

    def opening(self, index: int) -> Json | None:
        return self._part(index, self._echoes[index], None, None) if self._echoes[index] else None

    def delta(self, index: int, piece: Piece) -> Json:
        return self._part(index, piece.text, self._logprobs(index, piece.tokens), None)

    def closing(self, index: int, reason: str) -> Json:
        return self._part(index, "", None, reason)

    def choice(self, index: int, pieces: Sequence[Piece], reason: str) -> Json:
        tokens = [token for piece in pieces for token in piece.tokens]
        return self._part(index, self._echoes[index] + _join(pieces), self._logprobs(index, tokens), reason)

    def _part(self, index: int, text: str, logprobs: Json | None, reason: str | None) -> Json:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, index: int, tokens: Sequence[SampledToken]) -> Json | None:
        if not self._with_logprobs:
            return None
        texts = [self._text(token.token) for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [finite(token.logprob) for token in tokens],
            "top_logprobs": [{self._text(id): finite(value) for id, value in token.top} for token in tokens],
            "text_offset": offsets,
        }

    def _text(self, id: int) -> str:
        return self._tokenizer.token_bytes(id).decode(errors="replace")


def _join(pieces: Iterable[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def finite(logprob: float | None) -> float:
    """JSON has no -inf: OpenAI's stand-in for "very unlikely" is -9999."""
    return max(logprob, -9999.0) if logprob is not None else -9999.0
