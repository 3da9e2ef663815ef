"""The two forms of an answer: chat completions and text completions, whole or in chunks.

Source: https://platform.openai.com/docs/api-reference/chat/object, .../chat-streaming, .../completions/object
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any, Protocol

from lockstep_runtime.api.answer_text import Delta
from lockstep_runtime.api.logprobs import ChatLogprobs, TextLogprobs
from lockstep_runtime.api.tokenizer import TextTokenizer
from lockstep_runtime.api.tools.parts import CallArguments, CallBegun, CallBroken
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

    """
    Args:
        echo: what the answers begin with: the message that they go on with.
    """

    def __init__(self, tokenizer: TextTokenizer, choices: int, *, logprobs: bool, echo: str = "") -> None:
        self._echo = echo
        self._messages = [_Message(echo) for _ in range(choices)]
        self._described = [ChatLogprobs(tokenizer) for _ in range(choices)] if logprobs else None

    def opening(self, index: int) -> Json | None:
        return self._part(index, {"role": "assistant", "content": self._echo}, None, None)

    def describe_prompt(self, index: int, scored: Sequence[SampledToken]) -> None:
        """A chat doesn't give its prompt back."""

    def echo(self, index: int) -> Json | None:
        return None

    def delta(self, index: int, piece: Delta) -> Json:
        logprobs = None if self._described is None else self._described[index].of(piece.tokens)
        return self._part(index, _delta(piece), logprobs, None)

    def closing(self, index: int, reason: str) -> Json:
        return self._part(index, {}, None, reason)

    def take(self, index: int, piece: Delta) -> None:
        self._messages[index].take(piece)
        if self._described is not None:
            self._described[index].add(piece.tokens)

    def choice(self, index: int, reason: str) -> Json:
        message = self._messages[index].whole()
        logprobs = None if self._described is None else self._described[index].take()
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def _part(self, index: int, delta: Json, logprobs: Json | None, reason: str | None) -> Json:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


class _Message:
    """What a whole answer is put together from. A call that broke is none: what the model wrote is content."""

    def __init__(self, echo: str) -> None:
        self._content = [echo]
        self._reasoning: list[str] = []
        self._calls: dict[int, tuple[CallBegun, list[str]]] = {}

    def take(self, piece: Delta) -> None:
        match piece.call:
            case None:
                (self._reasoning if piece.reasoning else self._content).append(piece.text)
            case CallBegun(index):
                self._calls[index] = piece.call, []
            case CallArguments(index, json):
                self._calls[index][1].append(json)
            case CallBroken(index, text):
                del self._calls[index]
                self._content.append(text)

    def whole(self) -> Json:
        content = "".join(self._content)
        message: Json = {"role": "assistant", "content": content if content or not self._calls else None}
        if reasoning := "".join(self._reasoning):
            message |= _reasoning(reasoning)
        if self._calls:
            message["tool_calls"] = [_call(begun, "".join(pieces)) for begun, pieces in self._calls.values()]
        return message


def _delta(piece: Delta) -> Json:
    match piece.call:
        case None:
            return _reasoning(piece.text) if piece.reasoning else {"content": piece.text}
        case CallBegun(index):
            return {"tool_calls": [{"index": index, **_call(piece.call, "")}]}
        case CallArguments(index, json):
            return {"tool_calls": [{"index": index, "function": {"arguments": json}}]}
        case CallBroken(_, text):
            return {"content": text}


def _call(begun: CallBegun, arguments: str) -> Json:
    function = {"name": begun.name, "arguments": arguments}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def _reasoning(text: str) -> Json:
    """By both of its names: SGLang's and DeepSeek's clients read the first, vLLM's the second."""
    return {"reasoning_content": text, "reasoning": text}


class CompletionFormat:
    """
    Args:
        echoes: for each choice, the prompt's text if it is to be part of the answer.
        prompts: for each choice, the prompt's ids, if their log probabilities are to be; else empty.
        shows_special: special tokens are part of the text.
    """

    whole = chunk = "text_completion"

    def __init__(
        self,
        tokenizer: TextTokenizer,
        echoes: Sequence[str],
        prompts: Sequence[Sequence[int]] = (),
        *,
        logprobs: bool,
        shows_special: bool = False,
    ) -> None:
        hidden = frozenset() if shows_special else tokenizer.special_ids
        described = bool(prompts)
        self._echoes = echoes
        self._prompts = prompts
        self._texts: list[list[str]] = [[echo] for echo in echoes]
        self._described = (
            [TextLogprobs(tokenizer, echo, described=described, hidden=hidden) for echo in echoes] if logprobs else None
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
