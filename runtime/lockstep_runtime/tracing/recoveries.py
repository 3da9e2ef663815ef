"""Each recovery of the group as a trace of its own: the fault's record, with a span for each phase."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Final

from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanContext, Status, StatusCode, Tracer, set_span_in_context

from lockstep_runtime.protocol.status import FaultRecord
from lockstep_runtime.tracing.request import Attributes

PHASES: Final = ("abort", "respawn", "rebuild", "verify")  # one after another, from the detection on
FIRST_TOKEN_SECONDS: Final = 10.0  # a repair whose first token hasn't come by then ends without
_DROPPED: Final = "Drop"  # one request was refused: nothing was repaired


@dataclass(slots=True)
class _Recovery:
    """Unix seconds, from what paused requests to when they went on."""

    span: Span
    start: float
    resumed: float = math.inf
    ended: bool = False


class Recoveries:
    """Remembers as many as there are records. What was repaired before this engine began is not its to tell."""

    def __init__(
        self,
        tracer: Tracer,
        records: Callable[[], Sequence[FaultRecord]],
        now: Callable[[], float],
        ids_of: Callable[[FaultRecord], AbstractContextManager[None]] = lambda _: nullcontext(),
    ) -> None:
        """`ids_of`: while it is entered, a span gets the ids that this record's recovery is known by."""
        self._tracer, self._records, self._now, self._ids_of = tracer, records, now, ids_of
        self._before = max((one.id for one in records() if one.recovered_at is not None), default=0)
        self._known: dict[int, _Recovery] = {}

    def look(self) -> None:
        """Begin and end what the records say has begun and ended."""
        records = [one for one in self._records() if one.id > self._before and one.rung != _DROPPED]
        for record in records:
            known = self._known.get(record.id)
            if known is None:
                known = self._known[record.id] = _Recovery(self._begin(record), _start(record))
            if record.recovered_at is not None:
                known.resumed = record.recovered_at
            if not known.ended and self._is_over(record):
                self._end(known, record)
        kept = {one.id for one in records}
        self._known = {number: one for number, one in self._known.items() if number in kept}

    def between(self, start: float, end: float) -> list[SpanContext]:
        """Those that paused a request which was here from `start` to `end`, in unix seconds."""
        self.look()
        return [
            one.span.get_span_context() for one in self._known.values() if one.start <= end and one.resumed >= start
        ]

    def close(self) -> None:
        """What is open now is nobody's to repair any longer, or another's."""
        self.look()
        for known in self._known.values():
            if not known.ended:
                known.span.set_status(Status(StatusCode.ERROR, "the engine ended before the group was repaired"))
                known.span.end()

    def _begin(self, record: FaultRecord) -> Span:
        attributes: Attributes = {
            "lockstep.fault.type": str(record.fault),
            "lockstep.fault.id": record.id,
            "lockstep.epoch": record.epoch,
        }
        with self._ids_of(record):
            return self._tracer.start_span(
                f"recovery {record.fault}", Context(), attributes=attributes, start_time=_nanoseconds(_start(record))
            )

    def _end(self, known: _Recovery, record: FaultRecord) -> None:
        end = known.resumed
        for name, start, seconds in _phases(record):
            span = self._tracer.start_span(name, set_span_in_context(known.span), start_time=_nanoseconds(start))
            span.end(_nanoseconds(start) + _nanoseconds(seconds))
            end = max(end, start + seconds)
        known.span.set_attributes(
            {
                "lockstep.fault.message": record.message,
                "lockstep.recovery.rung": record.rung,
                "lockstep.recovery.requests_resumed": record.requests_resumed,
                **({} if record.rank is None else {"lockstep.fault.rank": record.rank}),
            }
        )
        known.span.end(_nanoseconds(end))
        known.ended = True

    def _is_over(self, record: FaultRecord) -> bool:
        if record.recovered_at is None:
            return False
        awaited = record.requests_resumed > 0 and "firstToken" not in record.phases
        return not awaited or self._now() - record.recovered_at > FIRST_TOKEN_SECONDS


def _start(record: FaultRecord) -> float:
    return record.at - record.phases.get("detect", 0.0)


def _phases(record: FaultRecord) -> Iterator[tuple[str, float, float]]:
    """Name, beginning in unix seconds, duration in seconds."""
    phases, at = record.phases, record.at
    if "detect" in phases:
        yield "detect", _start(record), phases["detect"]
    for name in PHASES:
        if name in phases:
            yield name, at, phases[name]
            at += phases[name]
    if "firstToken" in phases and record.recovered_at is not None:
        yield "firstToken", record.recovered_at, phases["firstToken"]


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
