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
    """What wait4(2) returned. `stopped_by`: 0 if the process goes on; None if it has ended. `used`: bytes."""

    pid: int
    code: int | None
    signal: int | None
    stopped_by: int | None
    used: int

    @property
    def was_killed(self) -> bool:
        """By somebody else: nothing was wrong with the process."""
        return self.signal in _BY_OTHERS


def wait_all() -> Iterator[Waited]:
    """Every child that has ended, was stopped or goes on since the last call. Doesn't block."""
    while True:
        try:
            pid, status, usage = os.wait4(-1, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
        except ChildProcessError:
            return
        if pid == 0:
            return
        used = usage.ru_maxrss * 1024
        if os.WIFSTOPPED(status) or os.WIFCONTINUED(status):
            yield Waited(pid, None, None, os.WSTOPSIG(status) if os.WIFSTOPPED(status) else 0, used)
        elif os.WIFSIGNALED(status):
            yield Waited(pid, None, os.WTERMSIG(status), None, used)
        else:
            yield Waited(pid, os.WEXITSTATUS(status), None, None, used)


async def wait_for_none(seconds: float) -> None:
    """Until there is no child, or so long."""
    deadline = time.monotonic() + seconds
    with contextlib.suppress(ChildProcessError):
        while time.monotonic() < deadline:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:  # noqa: ASYNC222 - it does not wait
                await asyncio.sleep(0.002)
