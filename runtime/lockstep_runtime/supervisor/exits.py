"""How child processes end, are stopped and go on: wait4(2), as PID 1 of a pod has it, and what it means."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from lockstep_runtime.supervisor.state_machine import Name

_BY_OTHERS: Final = frozenset({signal.SIGKILL, signal.SIGTERM})  # what ends a process in which nothing is wrong


@dataclass(frozen=True, slots=True)
class Exit:
    """How a child ended. Exactly one of `code` and `signal` is set. `used`: most resident memory it had, in bytes.
    `message`: the engine's termination message."""

    name: Name
    pid: int
    incarnation: str
    healthy: bool
    code: int | None
    signal: int | None
    used: int = 0
    message: str = ""


@dataclass(frozen=True, slots=True)
class Orphan:
    """A process without a name, such as a loaded zygote, was killed: by this signal."""

    signal: int


@dataclass(frozen=True, slots=True)
class Stop:
    """A child was stopped by a signal; 0: it goes on."""

    name: Name
    signal: int


@dataclass(frozen=True, slots=True)
class Waited:
    """What wait4(2) returned. `used` in bytes."""

    pid: int
    status: int
    used: int

    @property
    def has_ended(self) -> bool:
        return not (os.WIFSTOPPED(self.status) or os.WIFCONTINUED(self.status))

    @property
    def signal(self) -> int | None:
        """That ended it."""
        return os.WTERMSIG(self.status) if os.WIFSIGNALED(self.status) else None

    @property
    def stopped_by(self) -> int:
        """0: by none."""
        return os.WSTOPSIG(self.status) if os.WIFSTOPPED(self.status) else 0

    @property
    def was_killed(self) -> bool:
        """By somebody else: nothing was wrong with the process."""
        return self.signal in _BY_OTHERS

    @property
    def has_crashed(self) -> bool:
        """It may have written anywhere before."""
        return self.signal is not None and not self.was_killed

    def exit(self, name: Name, incarnation: str, message: str, *, healthy: bool) -> Exit:
        code = None if self.signal is not None else os.WEXITSTATUS(self.status)
        return Exit(name, self.pid, incarnation, healthy, code, self.signal, self.used, message)


def wait_all() -> Iterator[Waited]:
    """Every child that has ended, was stopped or goes on since the last call. Doesn't block."""
    while True:
        try:
            pid, status, usage = os.wait4(-1, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
        except ChildProcessError:
            return
        if pid == 0:
            return
        yield Waited(pid, status, usage.ru_maxrss * 1024)


async def wait_for_none(seconds: float) -> None:
    """Until there is no child, or so long."""
    deadline = time.monotonic() + seconds
    with contextlib.suppress(ChildProcessError):
        while time.monotonic() < deadline:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:  # noqa: ASYNC222 - it does not wait
                await asyncio.sleep(0.002)
