"""One request's spans: itself, and of each choice the queue, the prefill and the decode.

Source: https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from opentelemetry.trace import Span, SpanContext, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.util.types import AttributeValue

Attributes = Mapping[str, AttributeValue]


@dataclass(slots=True)
class _Choice:
    """Monotonic seconds."""

    begun: float
    first: float
    finished: float | None = None
    reason: str = ""


class RequestTrace:
    """Times are monotonic seconds. Everything but the request's own span is made when it has ended."""

    def __init__(
        self,
        tracer: Tracer,
        span: Span,
        arrived: float,
        unix: Callable[[float], int],
        pauses: Callable[[float, float], Sequence[SpanContext]],
    ) -> None:
        self._tracer, self._span, self._arrived = tracer, span, arrived
        self._unix, self._pauses = unix, pauses
        self._choices: dict[int, _Choice] = {}
        self._error = ""

    @property
    def response_header(self) -> tuple[bytes, bytes]:
        """As https://www.w3.org/TR/trace-context-2/ has it."""
        context = self._span.get_span_context()
        value = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
        return b"traceresponse", value.encode()

    def first_token(self, choice: int, begun: float | None, now: float) -> None:
        """`begun`: when its first step was planned."""
        self._choices[choice] = _Choice(self._arrived if begun is None else begun, now)

    def finished(self, choice: int, reason: str, now: float) -> None:
        self._choices[choice].finished = now
        self._choices[choice].reason = reason

    def failed(self, kind: str) -> None:
        """`kind`: the HTTP status, or why there is none."""
        self._error = kind

    def end(self, attributes: Attributes, now: float) -> None:
        if self._span.is_recording():
            parent = set_span_in_context(self._span)
            for index, choice in self._choices.items():
                of_choice = {"lockstep.choice.index": index}
                spans = (
                    ("queue", self._arrived, choice.begun),
                    ("prefill", choice.begun, choice.first),
                    ("decode", choice.first, now if choice.finished is None else choice.finished),
                )
                for name, start, stop in spans:
                    span = self._tracer.start_span(name, parent, attributes=of_choice, start_time=self._unix(start))
                    span.end(self._unix(stop))
            for context in self._pauses(self._arrived, now):
                self._span.add_link(context)
            reasons = [choice.reason for _, choice in sorted(self._choices.items()) if choice.reason]
            self._span.set_attributes({**attributes, "gen_ai.response.finish_reasons": reasons})
            if self._error:
                self._span.set_attribute("error.type", self._error)
                self._span.set_status(Status(StatusCode.ERROR))
        self._span.end(self._unix(now))
