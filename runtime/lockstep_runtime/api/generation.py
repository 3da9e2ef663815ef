"""One HTTP request on its way: what the engine is asked for, and each choice's tokens becoming pieces of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lockstep_runtime.api.detokenizer import Detokenizer
from lockstep_runtime.api.reasoning import ReasoningMarkers
from lockstep_runtime.api.stop_matcher import StopMatcher
from lockstep_runtime.api.tokenizer import TextTokenizer
from lockstep_runtime.engine.client import FinishReason, GenerationRequest, TokenEvent
from lockstep_runtime.protocol.step import SampledToken


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """`requests[i]` is choice i. `prompt_tokens` counts each prompt once, whatever `n` is."""

    id: str
    created: int  # unix seconds
    model: str
    requests: tuple[GenerationRequest, ...]
    prompt_tokens: int
    stops: tuple[str, ...]
    chat: bool  # the answer begins a text; a completion goes on with its prompt's
    markers: ReasoningMarkers | None = None  # part reasoning from answer
    thinks: bool = False  # the prompt's end has opened the reasoning already
    scores_prompt: bool = False  # the prompt's log probabilities are part of the answer
    prompt_only: bool = False  # the one token that is drawn is no part of the answer
    stream: bool
    include_usage: bool


@dataclass(frozen=True, slots=True)
class Delta:
    """Text to send, and the tokens sampled since the last piece, if log probabilities were requested."""

    text: str
    reasoning: bool = False
    tokens: Sequence[SampledToken] = ()


class Choice:
    """Turns one choice's token events into pieces. Of a stream or not, the pieces are the same."""

    def __init__(self, job: Job, index: int, tokenizer: TextTokenizer) -> None:
        request = job.requests[index]
        self.index = index
        self.tokens = 0
        self.begun = False  # its prompt's log probabilities were taken
        self.finish_reason: FinishReason | None = None
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer, () if job.chat else request.prompt)
        self._stops = StopMatcher(job.stops)
        self._keep_tokens = request.sampling.logprobs >= 0
        self._pending: list[SampledToken] = []
        self._markers = job.markers
        self._reasoning = job.thinks
        self.reasoning_tokens = 0  # drawn between the markers
        self._prompt_only = job.prompt_only
        self._answered = False
        self._trim = self._reasoning  # newlines beside a marker belong to the markup
        self._newlines = ""

    def feed(self, event: TokenEvent) -> list[Delta]:
        """Sets `finish_reason` when the choice is complete; nothing may be fed after that."""
        if self._prompt_only:
            self.finish_reason = FinishReason.LENGTH
            return []
        self.tokens += 1
        pieces: list[Delta] = []
        if event.finish is not FinishReason.STOP:  # a stop token is no text
            self._take(event.token, pieces)
        if event.finish is not None and self.finish_reason is None:
            self._flush(pieces)
            self.finish_reason = event.finish
        if self.finish_reason is not None and self._pending:
            self._append("", pieces)
        return pieces

    def _take(self, sampled: SampledToken, pieces: list[Delta]) -> None:
        if self._keep_tokens:
            self._pending.append(sampled)
        token = sampled.token
        if self._markers is not None:
            if self._reasoning and token == self._markers.closing:
                return self._turn(token, False, pieces)
            if token == self._markers.opening and not self._reasoning and not self._answered:
                return self._turn(token, True, pieces)
        self.reasoning_tokens += self._reasoning
        if text := self._detokenizer.feed(token):
            self._emit(self._stops.feed(text), pieces)
            self._check_stopped()
        return None

    def _turn(self, marker: int, reasoning: bool, pieces: list[Delta]) -> None:
        """Stop strings don't reach across a marker."""
        self._flush(pieces)
        self._detokenizer = Detokenizer(self._tokenizer, (marker,))
        self._reasoning, self._trim, self._newlines = reasoning, True, ""

    def _flush(self, pieces: list[Delta]) -> None:
        text = self._stops.feed(self._detokenizer.finish())
        self._emit(text if self._stops.stopped else text + self._stops.finish(), pieces)
        self._check_stopped()

    def _check_stopped(self) -> None:
        if self._stops.stopped:
            self.finish_reason = FinishReason.STOP

    def _emit(self, text: str, pieces: list[Delta]) -> None:
        if self._trim:
            text = text.lstrip("\n")
            self._trim = not text
        if self._reasoning:
            text = self._newlines + text
            kept = text.rstrip("\n")
            self._newlines, text = text[len(kept) :], kept
        elif text.strip():
            self._answered = True
        if text:
            self._append(text, pieces)

    def _append(self, text: str, pieces: list[Delta]) -> None:
        pieces.append(Delta(text, self._reasoning, tuple(self._pending)))
        self._pending.clear()
