"""Repairs as traces, where a collector is named; elsewhere that costs nothing."""

from __future__ import annotations

import asyncio
import importlib
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from lockstep_operator.reconcile import Tell, unheard
from lockstep_runtime.tracing import exporter

if TYPE_CHECKING:
    from lockstep_operator.reporting.repair_traces import RepairTraces


async def _nothing() -> None:
    """There is nothing to close."""


@dataclass(frozen=True, slots=True)
class Tracing:
    """Whom to tell of repairs, and what sends the last spans."""

    tell: Tell = unheard
    close: Callable[[], Awaitable[None]] = _nothing


async def begun(endpoint: str | None, pod: str) -> Tracing:
    """`endpoint`: the collector's, unless the standard variables name one."""
    if endpoint:
        os.environ.setdefault("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
    if not exporter.wanted(os.environ):
        return Tracing()
    os.environ.setdefault("OTEL_SERVICE_NAME", "lockstep-operator")
    provider = await asyncio.to_thread(exporter.provider, os.environ, {"k8s.pod.name": pod})
    if provider is None:
        return Tracing()
    module = await asyncio.to_thread(importlib.import_module, "lockstep_operator.reporting.repair_traces")
    traces: RepairTraces = module.RepairTraces(provider)
    return Tracing(traces.repaired, partial(exporter.flush, provider))
