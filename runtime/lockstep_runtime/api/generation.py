"""One HTTP request on its way: what the engine is asked for, and each choice's tokens becoming pieces of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lockstep_runtime.api.answer_text import AnswerText, Delta
from lockstep_runtime.api.detokenizer import Detokenizer
from lockstep_runtime.api.reasoning import ReasoningMarkers
from lockstep_runtime.api.stop_matcher import StopMatcher
from lockstep_runtime.api.tokenizer import TextTokenizer
from lockstep_runtime.api.tools.formats import MARKERS, ToolFormat, tool_parser
from lockstep_runtime.engine.client import FinishReason, GenerationRequest, TokenEvent
from lockstep_runtime.protocol.step import SampledToken


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """The tools that an answer may call, as in the request, and how the model writes calls."""

    format: ToolFormat
    tools: Sequence[dict[str, Any]]
    parallel: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """`requests[i]` is choice i. `prompt_tokens` counts each prompt once, whatever `n` is."""

    id: str
    created: int  # unix seconds
    model: str
    requests: tuple[GenerationRequest, ...]
    prompt_tokens: int
    stops: tuple[str, ...]
    includes_stop: bool = False  # the answer has the stop string, or the stop token's text, at its end
    shows_special: bool = False  # special tokens are text
    chat: bool
    continues: bool = False  # the answer goes on with the prompt's text, it begins none
    markers: ReasoningMarkers | None = None  # part reasoning from answer
    thinks: bool = False  # the prompt's end has opened the reasoning already
    tools: ToolUse | None = None  # part calls from answer
    form_field: str = ""  # the request's, that asks for a form of the answer
    scores_prompt: bool = False  # the prompt's log probabilities are part of the answer
    prompt_only: bool = False  # the one token that is drawn is no part of the answer
    drawn: int = 1  # choices of each prompt
    kept: int = 1  # the likeliest of them, as many as the answer has
    stream: bool
    include_usage: bool


class Choice:
    """Turns one choice's token events into pieces. Of a stream or not, the pieces are the same."""

    def __init__(self, job: Job, index: int, tokenizer: TextTokenizer) -> None:
        request = job.requests[index]
        self.index = index
        self.tokens = 0
        self.cached_tokens = 0  # of its prompt, that stood in the prefix cache
        self.reasoning_tokens = 0  # drawn between the markers
        self.begun = False  # its prompt's log probabilities were taken
        self._likelihood = 0.0  # the sum of its tokens' log probabilities
        self.finish_reason: FinishReason | None = None
        self._tokenizer = tokenizer
        self._shown = tokenizer.special_ids if job.shows_special else _shown(tokenizer, job.tools)
        self._detokenizer = Detokenizer(tokenizer, request.prompt if job.continues else (), self._shown)
        self._stops = StopMatcher(job.stops, included=job.includes_stop)
        self._includes_stop = job.includes_stop
        self._least = request.rules.min_tokens if request.rules else 0  # tokens in which no stop string counts
        self._keep_tokens = request.sampling.logprobs >= 0
        self._pending: list[SampledToken] = []
        self._markers = job.markers
        self._prompt_only = job.prompt_only
        self._text = _text(job)

    @property
    def reason(self) -> str:
        """The finish reason as clients know it."""
        if self._text.calls and self.finish_reason is FinishReason.STOP:
            return "tool_calls"
        return str(self.finish_reason)

    @property
    def mean_logprob(self) -> float:
        """How likely its tokens were, on average; for requests whose tokens have log probabilities."""
        return self._likelihood / max(1, self.tokens)

    def feed(self, event: TokenEvent) -> list[Delta]:
        """Sets `finish_reason` when the choice is complete; nothing may be fed after that."""
        self.cached_tokens = event.cached
        if self._prompt_only:
            self.finish_reason = FinishReason.LENGTH
            return []
        self.tokens += 1
        self._likelihood += event.token.logprob or 0.0
        pieces: list[Delta] = []
        if event.finish is not FinishReason.STOP or self._includes_stop:
            self._take(event.token, pieces)
        if event.finish is not None and self.finish_reason is None:
            self._flush(pieces)
            self.finish_reason = self.finish_reason or event.finish
        if self.finish_reason is not None:
            self._append(self._text.finish(cut=self.finish_reason is FinishReason.LENGTH), pieces)
            if self._pending:
                self._append([Delta(reasoning=self._text.reasoning)], pieces)
        return pieces

    def _take(self, sampled: SampledToken, pieces: list[Delta]) -> None:
        if self._keep_tokens:
            self._pending.append(sampled)
        token = sampled.token
        if self._markers is not None:
            if self._text.reasoning and token == self._markers.closing:
                return self._turn(token, False, pieces)
            if token == self._markers.opening and self._text.may_think:
                return self._turn(token, True, pieces)
        self.reasoning_tokens += self._text.reasoning
        if text := self._detokenizer.feed(token):
            self._emit(self._unstopped(text), pieces)
        return None

    def _turn(self, marker: int, reasoning: bool, pieces: list[Delta]) -> None:
        """Stop strings don't reach across a marker."""
        self._flush(pieces)
        self._append(self._text.turn(reasoning=reasoning), pieces)
        self._detokenizer = Detokenizer(self._tokenizer, (marker,), self._shown)

    def _flush(self, pieces: list[Delta]) -> None:
        text = self._unstopped(self._detokenizer.finish())
        self._emit(text if self._stops.stopped else text + self._stops.finish(), pieces)

    def _unstopped(self, text: str) -> str:
        """What of it can't be part of a stop string."""
        return text if self.tokens <= self._least else self._stops.feed(text)

    def _emit(self, text: str, pieces: list[Delta]) -> None:
        if text:
            self._append(self._text.feed(text), pieces)
        if self._stops.stopped or self._text.full:
            self.finish_reason = FinishReason.STOP

    def _append(self, deltas: Sequence[Delta], pieces: list[Delta]) -> None:
        for delta in deltas:
            pieces.append(replace(delta, tokens=tuple(self._pending)) if self._pending else delta)
            self._pending.clear()


def _text(job: Job) -> AnswerText:
    begins = job.thinks and not job.continues
    if job.tools is None:
        return AnswerText(thinks=job.thinks, begins=begins)
    parser = tool_parser(job.tools.format, job.tools.tools)
    return AnswerText(thinks=job.thinks, begins=begins, parser=parser, parallel=job.tools.parallel)


def _shown(tokenizer: TextTokenizer, tools: ToolUse | None) -> frozenset[int]:
    """Special tokens that are text nevertheless: the markers of calls are for the parser."""
    texts = () if tools is None else MARKERS[tools.format]
    return frozenset(id for text in texts if (id := tokenizer.added.get(text)) is not None)
