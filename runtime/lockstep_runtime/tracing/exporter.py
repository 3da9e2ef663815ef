"""The way to the collector: OTLP over HTTP, as the standard variables say, in a thread with a bounded queue.

Source: https://opentelemetry.io/docs/specs/otel/protocol/exporter/
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

log = logging.getLogger(__name__)

ENDPOINT_VARIABLES: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
FLUSH_SECONDS: Final = 2.0  # at the end, for the last spans


def wanted(environment: Mapping[str, str]) -> bool:
    """Whether the standard variables ask for traces."""
    off = (
        environment.get("OTEL_SDK_DISABLED", "").lower() == "true" or environment.get("OTEL_TRACES_EXPORTER") == "none"
    )
    return not off and any(environment.get(name) for name in ENDPOINT_VARIABLES)


def provider(environment: Mapping[str, str], attributes: Mapping[str, str]) -> TracerProvider | None:
    """One that sends to the collector; None, with a warning, where that can't be. `attributes` say which process this
    is. Importing what it takes costs a quarter of a second."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        resource = Resource.create({"service.name": environment.get("OTEL_SERVICE_NAME") or "lockstep", **attributes})
        made = TracerProvider(resource=resource, shutdown_on_exit=False)
        made.add_span_processor(BatchSpanProcessor(_quiet(OTLPSpanExporter())))
    except ImportError:
        log.warning("a collector of traces is named, but the extra `tracing` is not installed: there are no traces")
        return None
    except Exception as error:  # a variable that can't be read, a missing certificate: serving needs no traces
        log.warning("there are no traces: %s: %s", type(error).__name__, error)
        return None
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # of failures `_quiet` tells, once
    return made


async def flush(made: TracerProvider) -> None:
    """Send what is left, within a bounded time, and stop."""
    ending = threading.Thread(target=made.shutdown, daemon=True)
    ending.start()
    await asyncio.to_thread(ending.join, FLUSH_SECONDS)


def _quiet(inner: SpanExporter) -> SpanExporter:
    """Tells once that the collector doesn't answer, and once that it does again."""
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

    class Quiet(SpanExporter):
        failing = False

        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            result = inner.export(spans)
            failed = result is not SpanExportResult.SUCCESS
            if failed and not self.failing:
                log.warning("the collector of traces doesn't take them: they are dropped until it does")
            if self.failing and not failed:
                log.info("the collector takes traces again")
            self.failing = failed
            return result

        def shutdown(self) -> None:
            inner.shutdown()

    return Quiet()
