"""Sending an answer: whole, or as server-sent events. When the client goes away, or takes nothing more, work stops.

Starlette's StreamingResponse sends the status before the first token, which may yet be refused; from ASGI 2.4 on it
notices a client that went away only when it sends; and its task group cancels every await of the clean-up, too.

Source: https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from time import monotonic
from typing import Any, Final

import msgspec
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from lockstep_runtime.api import errors
from lockstep_runtime.api.answer_text import Delta
from lockstep_runtime.api.errors import ApiError
from lockstep_runtime.api.generation import Choice, Job
from lockstep_runtime.api.limits import Limits
from lockstep_runtime.api.metrics import Metrics
from lockstep_runtime.api.multiplex import Batch, Multiplexed
from lockstep_runtime.api.response_format import ResponseFormat
from lockstep_runtime.api.telemetry import answer_attributes, with_header
from lockstep_runtime.api.tokenizer import TextTokenizer
from lockstep_runtime.engine.client import EngineBusyError, EngineClient, GenerationFailedError, RequestTooLongError
from lockstep_runtime.log import fields
from lockstep_runtime.tracing.request import RequestTrace

log = logging.getLogger(__name__)

KEEP_ALIVE: Final = b": keep-alive\n\n"
DONE: Final = b"data: [DONE]\n\n"
_STREAM_HEADERS: Final = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold the events back
]


@dataclass(frozen=True, slots=True)
class Services:
    """What every answer needs."""

    engine: EngineClient
    metrics: Metrics
    limits: Limits


def as_api_error(error: Exception) -> ApiError:
    """The API error for an engine's error."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestTooLongError):
        return errors.too_long(str(error))
    if isinstance(error, EngineBusyError):
        return errors.unavailable(str(error), error.retry_after)
    if isinstance(error, GenerationFailedError):
        return errors.failed(str(error))
    log.error("a request failed unexpectedly", exc_info=error)
    return errors.failed("The request failed by an internal error")


def refuse(error: Exception, metrics: Metrics) -> ApiError:
    """Count the error and return the API error for the client."""
    refusal = as_api_error(error)
    metrics.failed("refused" if refusal.status < 500 else "unavailable" if refusal.status == 503 else "failed")
    return refusal


class Answer(Response):
    """Generates and sends. Nothing runs before it is called as an ASGI application, and nothing after."""

    def __init__(
        self,
        job: Job,
        form: ResponseFormat,
        tokenizer: TextTokenizer,
        services: Services,
        arrived: float,
        trace: RequestTrace | None = None,
    ) -> None:
        super().__init__()
        self._job = job
        self._form = form
        self._engine = services.engine
        self._metrics = services.metrics
        self._limits = services.limits
        self._choices = [Choice(job, index, tokenizer) for index in range(len(job.requests))]
        self._clocks = [services.metrics.clock(arrived) for _ in job.requests]
        self._trace = trace
        self._head, self._tail = self._chunk_frame()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._log(logging.DEBUG, f"asks for {len(self._job.requests)} choices")
        if self._trace:
            send = with_header(send, self._trace.response_header)
        gone = asyncio.create_task(_disconnected(receive))
        work = asyncio.create_task(self._run(scope, receive, self._bounded(send, gone)))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                self._metrics.failed("disconnected")
                if self._trace:
                    self._trace.failed("disconnected")
                self._log(logging.DEBUG, "is given up: its client is gone, or takes nothing")
        finally:
            work.cancel()
            gone.cancel()
            await asyncio.wait((work, gone))
            if self._trace:
                self._trace.end(answer_attributes(self._job, self._usage()), monotonic())
        if not work.cancelled():
            work.result()

    def _log(self, level: int, what: str) -> None:
        """The engine's lines add the choice to the id: `chatcmpl-…-0`."""
        log.log(level, "request %s %s", self._job.id, what, extra=fields(request=self._job.id))

    def _refuse(self, error: Exception) -> ApiError:
        refusal = refuse(error, self._metrics)
        if self._trace:
            self._trace.failed(str(refusal.status))
        busy = refusal.status != 500  # which is the same for every request
        self._log(logging.DEBUG if busy else logging.WARNING, f"is answered with {refusal.status}: {refusal.message}")
        return refusal

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with Multiplexed(self._engine, self._job.requests) as merged:
            try:
                batch = await merged.next(self._limits.headers_seconds)
                parts = None if self._job.stream else await self._whole(batch, merged)
            except Exception as error:  # the engine's, early enough to be an HTTP status
                await self._refuse(error).response()(scope, receive, send)
                return
            if parts is None:
                await self._stream(batch, merged, send)
            else:
                await _send_parts(parts, send)

    async def _whole(self, batch: Batch, merged: Multiplexed) -> list[bytes]:
        """The body in parts, one for each choice: together they may be very long."""
        while True:
            await self._describe_prompts(batch)
            for choice, pieces in self._feed(batch, merged):
                for piece in pieces:
                    self._form.take(choice.index, piece)
            if not self._unfinished():
                break
            batch = await merged.next(self._limits.keep_alive_seconds)
        parts = [msgspec.json.encode(self._frame(self._form.whole))[:-1] + b',"choices":[']
        for index, choice in enumerate(self._kept()):
            entry = msgspec.json.encode(self._form.choice(choice.index, choice.reason) | {"index": index})
            parts.append(b"," + entry if index else entry)
            await asyncio.sleep(0)
        parts.append(b'],"usage":' + msgspec.json.encode(self._usage()) + b"}")
        return parts

    async def _stream(self, batch: Batch, merged: Multiplexed, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
        openings = [self._form.opening(choice.index) for choice in self._choices]
        events = b"".join(self._event(opening) for opening in openings if opening)
        while True:
            begun = await self._describe_prompts(batch)
            events += b"".join(self._event(echo) for index in begun if (echo := self._form.echo(index)))
            events += self._events(batch, merged)
            if not self._unfinished():
                break
            if events:
                await _part(send, events)
            try:
                batch = await merged.next(self._limits.keep_alive_seconds)
            except Exception as error:  # the engine's: neither a finish_reason nor [DONE] may follow it
                return await _part(send, b"data: " + self._refuse(error).body() + b"\n\n", more=False)
            events = b"" if batch else KEEP_ALIVE
        return await _part(send, events + self._ending(), more=False)

    async def _describe_prompts(self, batch: Batch) -> list[int]:
        """The choices whose first token came, and with it their prompts' log probabilities: perhaps very many."""
        if not self._job.scores_prompt:
            return []
        begun = [(index, event) for index, event in batch if not self._choices[index].begun]
        for index, event in begun:
            self._choices[index].begun = True
            await asyncio.to_thread(self._form.describe_prompt, index, event.prompt)
        return [index for index, _ in begun]

    def _events(self, batch: Batch, merged: Multiplexed) -> bytes:
        parts: list[bytes] = []
        for choice, pieces in self._feed(batch, merged):
            parts += [self._event(self._form.delta(choice.index, piece)) for piece in pieces]
            if choice.finish_reason is not None:
                parts.append(self._event(self._form.closing(choice.index, choice.reason)))
        return b"".join(parts)

    def _feed(self, batch: Batch, merged: Multiplexed) -> Iterator[tuple[Choice, list[Delta]]]:
        """Each choice with its new pieces; its `finish_reason` is set the last time."""
        now = monotonic()
        for index, event in batch:
            choice = self._choices[index]
            if choice.finish_reason is not None:
                continue  # tokens that were under way when a stop string ended it
            if not choice.tokens:
                self._metrics.accepted(len(self._job.requests[index].prompt))
                if self._trace:
                    self._trace.first_token(index, event.begun, now)
            self._clocks[index].token(now)
            pieces = choice.feed(event)
            if choice.finish_reason is not None:
                merged.cancel(index)
                self._clocks[index].finished(choice.finish_reason, now)
                if self._trace:
                    self._trace.finished(index, choice.reason, now)
            yield choice, pieces

    def _kept(self) -> list[Choice]:
        """Of each prompt's choices the likeliest, the best first; all in their order where all are wanted."""
        drawn, kept = self._job.drawn, self._job.kept
        if drawn == kept:
            return self._choices
        groups = [self._choices[start : start + drawn] for start in range(0, len(self._choices), drawn)]
        return [
            choice
            for group in groups
            for choice in sorted(group, key=lambda one: one.mean_logprob, reverse=True)[:kept]
        ]

    def _unfinished(self) -> bool:
        return any(choice.finish_reason is None for choice in self._choices)

    def _ending(self) -> bytes:
        if not self._job.include_usage:
            return DONE
        usage = self._frame(self._form.chunk) | {"choices": [], "usage": self._usage()}
        return b"data: " + msgspec.json.encode(usage) + b"\n\n" + DONE

    def _frame(self, kind: str) -> dict[str, Any]:
        return {"id": self._job.id, "object": kind, "created": self._job.created, "model": self._job.model}

    def _chunk_frame(self) -> tuple[bytes, bytes]:
        """What all chunks share, encoded once: a chunk is head, choice, tail."""
        frame = msgspec.json.encode(self._frame(self._form.chunk))
        tail = b'],"usage":null}\n\n' if self._job.include_usage else b"]}\n\n"
        return b"data: " + frame[:-1] + b',"choices":[', tail

    def _event(self, choice: Mapping[str, Any]) -> bytes:
        return self._head + msgspec.json.encode(choice) + self._tail

    def _usage(self) -> dict[str, Any]:
        drawn = sum(choice.tokens for choice in self._choices)
        prompt = self._job.prompt_tokens
        cached = sum(choice.cached_tokens for choice in self._choices[:: self._job.drawn])  # of each prompt, as above
        usage: dict[str, Any] = {
            "prompt_tokens": prompt,
            "completion_tokens": drawn,
            "total_tokens": prompt + drawn,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
        if not self._job.chat:
            return usage
        reasoning = sum(choice.reasoning_tokens for choice in self._choices)
        return usage | {"completion_tokens_details": {"reasoning_tokens": reasoning}}

    def _bounded(self, send: Send, gone: asyncio.Task[None]) -> Send:
        """A client that takes nothing for too long is as good as gone."""
        loop = asyncio.get_running_loop()

        async def bounded(message: Message) -> None:
            timer = loop.call_later(self._limits.write_seconds, gone.cancel)
            try:
                await send(message)
            finally:
                timer.cancel()

        return bounded


async def _send_parts(parts: list[bytes], send: Send) -> None:
    length = str(sum(map(len, parts))).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", length)]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for number, part in enumerate(parts, 1):
        await _part(send, part, more=number < len(parts))


async def _part(send: Send, data: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": more})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
