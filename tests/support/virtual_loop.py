"""An event loop whose clock jumps to the next timer when there is nothing to do: hours pass in milliseconds."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar
from unittest import mock

T = TypeVar("T")


LOOK_EVERY = 256  # turns: only an interrupt comes from outside, and to look for it costs more than most turns


class _Selector(selectors.DefaultSelector):
    """Waits for nothing but time, and that only virtually."""

    now = 1_000.0
    turns = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.turns += 1
        if timeout is None or self.turns % LOOK_EVERY == 0:
            if ready := super().select(0):
                return ready
            if timeout is None:
                raise RuntimeError("nothing is left to happen, and the test waits")
        self.now += timeout
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """What a callback raises, which asyncio would only log, is kept as `trouble`."""

    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)
        self.trouble: list[BaseException] = []
        self.set_exception_handler(lambda loop, context: self.trouble.append(_error_of(context)))

    def time(self) -> float:
        return self._virtual.now


def _error_of(context: dict[str, Any]) -> BaseException:
    return context.get("exception") or RuntimeError(context["message"])


def run_virtually(work: Coroutine[Any, Any, T]) -> T:
    """Run it to its end; `time.monotonic` and `time.time` are the loop's meanwhile. A callback may not raise."""
    loop = VirtualLoop()
    with (
        asyncio.Runner(loop_factory=lambda: loop) as runner,
        mock.patch("time.monotonic", loop.time),
        mock.patch("time.time", loop.time),
    ):
        result = runner.run(work)
    if loop.trouble:
        raise loop.trouble[0]
    return result
