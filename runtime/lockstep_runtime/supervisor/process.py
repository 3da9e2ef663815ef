"""Child processes: started with their names, incarnations and progress records, reaped, signalled by pid."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import msgspec

from lockstep_runtime import child, wire
from lockstep_runtime.progress import Progress, Record, Stage, new_memory
from lockstep_runtime.supervisor.machine import ENGINE, SPARE, Name

logger = logging.getLogger(__name__)
_HEALTHY_ENGINE_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class Exit:
    """How a child ended. Exactly one of `code` and `signal` is set."""

    name: Name
    pid: int
    incarnation: str
    healthy: bool
    code: int | None
    signal: int | None


@dataclass(frozen=True, slots=True)
class Stop:
    """A child was stopped by a signal; 0: it goes on."""

    name: Name
    signal: int


@dataclass(frozen=True, slots=True)
class _Process:
    name: Name
    pid: int
    incarnation: str
    started: float
    progress: int  # descriptor; -1 for the engine
    orders: int  # the writing end of a spare's standard input; -1 for others


class Processes:
    """All children of this supervisor."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = dict(environment)
        self._by_name: dict[Name, _Process] = {}

    def spawn(self, name: Name, extra: Mapping[str, str] | None = None) -> int:
        """Start the child in a process group of its own; returns its pid."""
        incarnation = secrets.token_hex(8)
        progress = -1 if name == ENGINE else new_memory(f"lockstep-progress-{name}")
        read_end, orders = os.pipe() if name == SPARE else (-1, -1)  # neither is inherited but as standard input
        environment = self._environment | {
            child.PARENT_VARIABLE: str(os.getpid()),
            child.INCARNATION_VARIABLE: incarnation,
            child.PROGRESS_VARIABLE: str(progress),
            **(extra or {}),
        }
        pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-m", *_module(name)],
            environment,
            file_actions=[(os.POSIX_SPAWN_DUP2, read_end, 0)] if read_end >= 0 else [],
            setpgroup=0,
            setsigdef=[signal.SIGTERM, signal.SIGINT, signal.SIGCHLD],
            setsigmask=[],
        )
        if progress >= 0:
            os.set_inheritable(progress, False)
        if read_end >= 0:
            os.close(read_end)
        self._by_name[name] = _Process(name, pid, incarnation, time.monotonic(), progress, orders)
        return pid

    def promote(self, rank: int) -> int:
        """Give the spare this rank; returns its pid. One that has just ended is reaped as the rank's process."""
        spare = self._by_name.pop(SPARE)
        self._by_name[rank] = replace(spare, name=rank, orders=-1)
        with contextlib.suppress(BrokenPipeError):
            os.write(spare.orders, msgspec.json.encode(child.Promotion(rank=rank)) + b"\n")
        os.close(spare.orders)
        return spare.pid

    def records(self) -> list[wire.ProgressRecord]:
        """How far every worker has come, whether it answers or not."""
        now = time.monotonic()
        return [
            _told(process.name, process.incarnation, self._record(process), now)
            for process in self._by_name.values()
            if isinstance(process.name, int)
        ]

    def are_loaded(self, ranks: Sequence[int]) -> bool:
        """Whether each of them has its weights."""
        found = [self._by_name.get(rank) for rank in ranks]
        return all(process is not None and self._record(process).stage is Stage.LOADED for process in found)

    def signal(self, name: Name, number: int) -> None:
        process = self._by_name.get(name)
        if process is not None:
            os.kill(process.pid, number)  # not reaped yet, so the pid is still its own

    def incarnation(self, name: Name) -> str:
        process = self._by_name.get(name)
        return process.incarnation if process else ""

    def pids(self) -> dict[Name, int]:
        return {name: process.pid for name, process in self._by_name.items()}

    def reap(self) -> list[Exit | Stop]:
        """Every child that has ended, was stopped or goes on; as PID 1 also orphans, of which nothing is said."""
        news: list[Exit | Stop] = []
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
            except ChildProcessError:
                return news
            if pid == 0:
                return news
            process = next((one for one in self._by_name.values() if one.pid == pid), None)
            if process is None:
                continue
            if os.WIFSTOPPED(status) or os.WIFCONTINUED(status):
                news.append(Stop(process.name, os.WSTOPSIG(status) if os.WIFSTOPPED(status) else 0))
            else:
                news.append(self._ended(process, status))

    def _ended(self, process: _Process, status: int) -> Exit:
        del self._by_name[process.name]
        killed = os.WIFSIGNALED(status)
        return Exit(
            name=process.name,
            pid=process.pid,
            incarnation=process.incarnation,
            healthy=self._was_healthy(process),
            code=None if killed else os.WEXITSTATUS(status),
            signal=os.WTERMSIG(status) if killed else None,
        )

    def _was_healthy(self, process: _Process) -> bool:
        if process.orders >= 0:
            os.close(process.orders)
        if process.progress < 0:
            return time.monotonic() - process.started > _HEALTHY_ENGINE_SECONDS
        stage = self._record(process).stage
        os.close(process.progress)
        return stage is Stage.LOADED

    def _record(self, process: _Process) -> Record:
        progress = Progress(process.progress)
        record = progress.read()
        progress.close()
        return record


def _module(name: Name) -> list[str]:
    if name == ENGINE:
        return ["lockstep_runtime.engine"]
    return ["lockstep_runtime.worker", *(["--spare"] if name == SPARE else ["--rank", str(name)])]


def _told(rank: int, incarnation: str, record: Record, now: float) -> wire.ProgressRecord:
    return wire.ProgressRecord(
        rank=rank,
        incarnation=incarnation,
        epoch=record.epoch,
        step=record.step,
        in_step=record.in_step,
        collective=record.collective,
        inside=record.inside,
        place=record.place,
        age=max(0.0, now - record.moved),
    )
