"""The seam between api and engine: token ids in, token events out. The api knows no ranks, the engine no text."""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from lockstep_runtime.protocol.images import ImageSpan, Pixels
from lockstep_runtime.protocol.step import LogitRules, SampledToken, SamplingParams


class FinishReason(enum.StrEnum):
    STOP = "stop"  # a stop token id was sampled
    LENGTH = "length"  # max_tokens, or the model's length, was reached


@dataclass(frozen=True, slots=True)
class PromptImage:
    """An image, and its place in the prompt."""

    span: ImageSpan
    pixels: Pixels


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One continuation of one prompt. A request with `n` choices is n of these."""

    request_id: str
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams
    stop_token_ids: frozenset[int] = frozenset()
    cache_salt: str = ""  # only requests with the same share what was computed for their prompts
    rules: LogitRules | None = None
    images: tuple[PromptImage, ...] = ()  # in order


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One sampled token. The last of a request has `finish`; a stop token itself is delivered with STOP.

    The first of a request with `prompt_logprobs` has the prompt's tokens except the first, as if they were sampled.
    """

    token: SampledToken
    finish: FinishReason | None = None
    prompt: Sequence[SampledToken] = ()
    cached: int = 0  # tokens of the prompt that were not computed for it
    begun: float | None = None  # monotonic seconds, when the request left the queue


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether the group makes progress, or would if it were asked; the reason is a sentence."""

    ready: bool
    reason: str
    draining: bool = False  # asked to end: clients had better open their next connection elsewhere


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot for /metrics. Counters only rise."""

    requests_running: int
    requests_waiting: int
    kv_blocks_used: int
    kv_blocks_total: int
    preemptions_total: int
    prefix_cache_queries_total: int  # tokens
    prefix_cache_hits_total: int
    steps_total: int
    recoveries_total: int
    epoch: int
    last_step_at: float | None  # unix seconds


class RequestTooLongError(ValueError):
    """The prompt and its answer can never fit. The message has the numbers."""


class EngineBusyError(RuntimeError):
    """Nothing can be queued now; try again after `retry_after` seconds."""

    def __init__(self, reason: str, retry_after: float) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class GenerationFailedError(RuntimeError):
    """The request failed permanently after it was accepted. The message is fit for the client."""


class EngineClient(Protocol):
    """What the api may ask of the engine; all on one event loop."""

    @property
    def max_model_len(self) -> int | None:
        """In tokens; None until the model's configuration has been read."""

    def readiness(self) -> Readiness: ...

    def stats(self) -> EngineStats: ...

    def set_serving_blocker(self, reason: str, *, loading: bool = False, may_pass: bool = False) -> None:
        """Set why the api can't serve this model; an empty reason clears it.

        Meanwhile requests are refused and the group's state is `Failed` with this reason, or, if `loading`, at most
        `Loading`. `may_pass`: whether it may resolve by itself, without a person.
        """

    def generate(self, request: GenerationRequest) -> AsyncIterator[TokenEvent]:
        """Queue the request at once and yield its tokens as they are sampled.

        Closing the iterator (`aclose`, or cancelling the task that iterates) cancels the request.

        Raises:
            RequestTooLongError: before the first event.
            EngineBusyError: before the first event; the queue is full, or the group drains or is not loaded.
            GenerationFailedError: at any time.
        """
