"""The operator's repairs as OpenTelemetry traces, beside those that groups make of their own recoveries."""

from __future__ import annotations

from collections.abc import Iterable

from opentelemetry.context import Context
from opentelemetry.trace import Link, SpanContext, TraceFlags, Tracer, TracerProvider, set_span_in_context
from opentelemetry.util.types import AttributeValue

import lockstep_runtime
from lockstep_operator.reporting.recovery_log import Repair
from lockstep_operator.types.names import ModelKey
from lockstep_runtime.protocol.status import FaultRecord
from lockstep_runtime.protocol.trace_ids import recovery_ids


class RepairTraces:
    """A trace for each step of the ladder after which a group serves again, with a span for each part of it."""

    def __init__(self, provider: TracerProvider) -> None:
        self._tracer: Tracer = provider.get_tracer("lockstep-operator", lockstep_runtime.__version__)

    def repaired(self, key: ModelKey, repairs: Iterable[Repair]) -> None:
        """Each repair once: those that the status just written is the first to hold."""
        for repair in repairs:
            if repair.steps:
                self._trace(key, repair)

    def _trace(self, key: ModelKey, repair: Repair) -> None:
        attributes: dict[str, AttributeValue] = {
            "k8s.namespace.name": key.namespace,
            "lockstep.model": key.name,
            "lockstep.group": repair.group,
            "lockstep.fault.type": repair.fault,
            "lockstep.recovery.rung": repair.rung,
            "lockstep.recovery.requests_resumed": repair.resumed,
            **({} if repair.rank is None else {"lockstep.fault.rank": repair.rank}),
        }
        span = self._tracer.start_span(
            f"repair {repair.rung}",
            Context(),
            attributes=attributes,
            links=[Link(_recovery(key, repair.group, repair.record))] if repair.record else [],
            start_time=_nanoseconds(repair.steps[0].start),
        )
        for step in repair.steps:
            part = self._tracer.start_span(step.name, set_span_in_context(span), start_time=_nanoseconds(step.start))
            part.end(_nanoseconds(step.end))
        span.end(_nanoseconds(repair.steps[-1].end))


def _recovery(key: ModelKey, group: int, record: FaultRecord) -> SpanContext:
    """Of the group's own trace, which its first pod exports."""
    trace, span = recovery_ids(key.name, group, record)
    return SpanContext(trace, span, is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED))


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
