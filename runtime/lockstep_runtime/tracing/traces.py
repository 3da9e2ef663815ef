"""What is traced: requests from their arrival on, with their W3C context, and the recoveries that paused them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from opentelemetry.trace import SpanContext, SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

import lockstep_runtime
from lockstep_runtime.protocol.status import FaultRecord
from lockstep_runtime.protocol.trace_ids import recovery_ids
from lockstep_runtime.tracing.recoveries import Recoveries
from lockstep_runtime.tracing.request import Attributes, RequestTrace

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

LOOK_SECONDS: Final = 1.0
_CONTEXT: Final = TraceContextTextMapPropagator()


class Traces:
    """Of one engine. `records` gives the faults that are on record, the oldest first."""

    def __init__(
        self, provider: TracerProvider, model: str, group: int, records: Callable[[], Sequence[FaultRecord]]
    ) -> None:
        from lockstep_runtime.tracing.chosen_ids import ChosenIds  # needs the extra `tracing`, as the provider does

        provider.id_generator = ids = ChosenIds()
        self._tracer = provider.get_tracer("lockstep", lockstep_runtime.__version__)
        self._recoveries = Recoveries(
            self._tracer, records, time.time, lambda record: ids.chosen(recovery_ids(model, group, record))
        )
        self._offset = time.time() - time.monotonic()

    async def run(self) -> None:
        """Look at the records now and then, until cancelled: spans have the records' own times."""
        while True:
            self._recoveries.look()
            await asyncio.sleep(LOOK_SECONDS)

    def close(self) -> None:
        """No more is to come."""
        self._recoveries.close()

    def request(self, name: str, headers: Mapping[str, str], attributes: Attributes, arrived: float) -> RequestTrace:
        """`headers` may have a traceparent, whose trace this request joins; `arrived` is monotonic, in seconds."""
        parent = _CONTEXT.extract(headers)
        span = self._tracer.start_span(
            name, context=parent, kind=SpanKind.SERVER, attributes=attributes, start_time=self._unix(arrived)
        )
        return RequestTrace(self._tracer, span, arrived, self._unix, self._pauses)

    def _unix(self, monotonic: float) -> int:
        """In nanoseconds, as spans have it."""
        return round((monotonic + self._offset) * 1e9)

    def _pauses(self, start: float, end: float) -> list[SpanContext]:
        return self._recoveries.between(start + self._offset, end + self._offset)
