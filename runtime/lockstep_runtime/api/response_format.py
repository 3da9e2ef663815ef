"""The two forms of an answer: chat completions and text completions, whole or in chunks.

Source: https://platform.openai.com/docs/api-reference/chat/object, .../chat-streaming, .../completions/object
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from lockstep_runtime.api.generation import Delta
from lockstep_runtime.api.logprobs import ChatLogprobs, TextLogprobs
from lockstep_runtime.api.tokenizer import TextTokenizer
from lockstep_runtime.protocol.step import SampledToken

Json = dict[str, Any]


class ResponseFormat(Protocol):
    """Entries of `choices`: in chunks (`opening`, `delta`, `closing`), or whole (`take`, then `choice`)."""

    whole: str  # `object` of a whole answer
    chunk: str  # `object` of a stream's chunks

    def opening(self, index: int) -> Json | None:
        """The first chunk of a choice, before any token."""

    def describe_prompt(self, index: int, scored: Sequence[SampledToken]) -> None:
        """The prompt's log probabilities came. This takes time in proportion to them: call it in a thread."""

    def echo(self, index: int) -> Json | None:
        """The chunk with the prompt as given to `describe_prompt`."""

    def delta(self, index: int, piece: Delta) -> Json: ...

    def closing(self, index: int, reason: str) -> Json: ...

    def take(self, index: int, piece: Delta) -> None: ...

    def choice(self, index: int, reason: str) -> Json: ...


class ChatFormat:
    whole = "chat.completion"
    chunk = "chat.completion.chunk"

    def __init__(self, tokenizer: TextTokenizer, choices: int, *, logprobs: bool) -> None:
        self._answers: list[list[str]] = [[] for _ in range(choices)]
        self._thoughts: list[list[str]] = [[] for _ in range(choices)]
        self._described = [ChatLogprobs(tokenizer) for _ in range(choices)] if logprobs else None

    def opening(self, index: int) -> Json | None:
        return self._part(index, {"role": "assistant", "content": ""}, None, None)

    def describe_prompt(self, index: int, scored: Sequence[SampledToken]) -> None:
        """A chat doesn't give its prompt back."""

    def echo(self, index: int) -> Json | None:
        return None

    def delta(self, index: int, piece: Delta) -> Json:
        logprobs = None if self._described is None else self._described[index].of(piece.tokens)
        delta = _reasoning(piece.text) if piece.reasoning else {"content": piece.text}
        return self._part(index, delta, logprobs, None)

    def closing(self, index: int, reason: str) -> Json:
        return self._part(index, {}, None, reason)

    def take(self, index: int, piece: Delta) -> None:
        (self._thoughts if piece.reasoning else self._answers)[index].append(piece.text)
        if self._described is not None:
            self._described[index].add(piece.tokens)

    def choice(self, index: int, reason: str) -> Json:
        message = {"role": "assistant", "content": "".join(self._answers[index])}
        if reasoning := "".join(self._thoughts[index]):
            message |= _reasoning(reasoning)
        logprobs = None if self._described is None else self._described[index].take()
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def _part(self, index: int, delta: Json, logprobs: Json | None, reason: str | None) -> Json:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _reasoning(text: str) -> Json:
    """By both of its names: SGLang's and DeepSeek's clients read the first, vLLM's the second."""
    return {"reasoning_content": text, "reasoning": text}


class CompletionFormat:
    """
    Args:
        echoes: for each choice, the prompt's text if it is to be part of the answer.
        prompts: for each choice, the prompt's ids, if their log probabilities are to be; else empty.
    """

    whole = chunk = "text_completion"

    def __init__(
        self,
        tokenizer: TextTokenizer,
        echoes: Sequence[str],
        prompts: Sequence[Sequence[int]] = (),
        *,
        logprobs: bool,
    ) -> None:
        self._echoes = echoes
        self._prompts = prompts
        self._texts: list[list[str]] = [[echo] for echo in echoes]
        self._described = (
            [TextLogprobs(tokenizer, echo, described=bool(prompts)) for echo in echoes] if logprobs else None
        )

    def opening(self, index: int) -> Json | None:
        if not self._echoes[index] or self._prompts:
            return None
        return self._part(index, self._echoes[index], None, None)

    def describe_prompt(self, index: int, scored: Sequence[SampledToken]) -> None:
        if self._described is not None and self._prompts:
            self._described[index].add_prompt(self._prompts[index], scored, self._echoes[index])

    def echo(self, index: int) -> Json | None:
        logprobs = None if self._described is None else self._described[index].take()
        return self._part(index, self._echoes[index], logprobs, None)

    def delta(self, index: int, piece: Delta) -> Json:
        return self._part(index, piece.text, self._logprobs(index, piece), None)

    def closing(self, index: int, reason: str) -> Json:
        return self._part(index, "", None, reason)

    def take(self, index: int, piece: Delta) -> None:
        self._texts[index].append(piece.text)
        if self._described is not None:
            self._described[index].add(piece.tokens)

    def choice(self, index: int, reason: str) -> Json:
        logprobs = None if self._described is None else self._described[index].take()
        return self._part(index, "".join(self._texts[index]), logprobs, reason)

    def _part(self, index: int, text: str, logprobs: Json | None, reason: str | None) -> Json:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, index: int, piece: Delta) -> Json | None:
        if self._described is None:
            return None
        self._described[index].add(piece.tokens)
        return self._described[index].take()
