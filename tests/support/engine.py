"""A deterministic stand-in for the engine: the edge of the api's tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field

from lockstep_runtime.engine.client import EngineStats, FinishReason, GenerationRequest, Readiness, TokenEvent
from lockstep_runtime.protocol.step import SampledToken

# What an answer is made of: a token, an error, or something to wait for.
Part = int | Exception | asyncio.Event
Script = Callable[[GenerationRequest], Iterable[Part]]


@dataclass
class FakeEngine:
    """Answers every request by `script`, then with `end` for ever; stops as the real engine does."""

    script: Script
    end: int
    max_model_len: int | None = 2048
    state: Readiness = field(default_factory=lambda: Readiness(True, "all 2 ranks are in step"))
    refusal: Exception | None = None
    blocker: str = ""
    logprob: Callable[[GenerationRequest], float] = lambda _: -0.5  # of each token
    requests: list[GenerationRequest] = field(default_factory=list)
    running: set[str] = field(default_factory=set)
    cancelled: list[str] = field(default_factory=list)

    def readiness(self) -> Readiness:
        return self.state

    def set_serving_blocker(self, reason: str, *, loading: bool = False, may_pass: bool = False) -> None:
        self.blocker = "" if loading else reason

    def stats(self) -> EngineStats:
        return EngineStats(
            requests_running=len(self.running),
            requests_waiting=3,
            kv_blocks_used=25,
            kv_blocks_total=100,
            preemptions_total=4,
            prefix_cache_queries_total=13,
            prefix_cache_hits_total=9,
            steps_total=5,
            recoveries_total=6,
            epoch=7,
            last_step_at=8.5,
        )

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenEvent]:
        self.requests.append(request)
        if self.refusal is not None:
            raise self.refusal
        self.running.add(request.request_id)
        finished = False
        try:
            parts = iter(self.script(request))
            for drawn in range(1, request.max_tokens + 1):
                token = await self._next(parts)
                finish = _finish(request, token, drawn)
                finished = finish is not None
                sampled = _sampled(request, token, self.logprob(request))
                yield TokenEvent(sampled, finish, _scored(request) if drawn == 1 else ())
                if finished:
                    return
        finally:
            self.running.discard(request.request_id)
            if not finished:
                self.cancelled.append(request.request_id)

    async def _next(self, parts: Iterable[Part]) -> int:
        for part in parts:
            if isinstance(part, Exception):
                raise part
            if isinstance(part, int):
                await asyncio.sleep(0)
                return part
            await part.wait()
        await asyncio.sleep(0)
        return self.end


def _finish(request: GenerationRequest, token: int, drawn: int) -> FinishReason | None:
    if token in request.stop_token_ids:
        return FinishReason.STOP
    return FinishReason.LENGTH if drawn == request.max_tokens else None


def _sampled(request: GenerationRequest, token: int, logprob: float) -> SampledToken:
    asked = request.sampling.logprobs
    top = [(token + rank, logprob - rank) for rank in range(asked)] if asked > 0 else []
    return SampledToken(sequence_id=0, token=token, logprob=logprob if asked >= 0 else None, top=top)


def _scored(request: GenerationRequest) -> list[SampledToken]:
    """The prompt's tokens but the first; each less likely than the one before, and the next id likelier than it."""
    asked = request.sampling.prompt_logprobs
    if asked < 0:
        return []
    return [
        SampledToken(
            sequence_id=0,
            token=token,
            logprob=-float(index),
            top=[(token + 1, -0.5), (token, -float(index))] if asked else [],
        )
        for index, token in enumerate(request.prompt[1:], 1)
    ]


async def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Looks again and again: what it waits for happens in code that tells nobody.

    Raises:
        TimeoutError: the condition did not come true.
    """
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
