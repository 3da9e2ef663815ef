"""Ids of spans: random ones, but for those that others must be able to compute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry.sdk.trace.id_generator import RandomIdGenerator


class ChosenIds(RandomIdGenerator):
    """Not safe for several threads."""

    def __init__(self) -> None:
        self._next: tuple[int, int] | None = None

    @contextmanager
    def chosen(self, ids: tuple[int, int]) -> Iterator[None]:
        """A span that begins a trace now gets these, of the trace and of itself."""
        self._next = ids
        try:
            yield
        finally:
            self._next = None

    def generate_trace_id(self) -> int:
        return self._next[0] if self._next else super().generate_trace_id()

    def generate_span_id(self) -> int:
        return self._next[1] if self._next else super().generate_span_id()
