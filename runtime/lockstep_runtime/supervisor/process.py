"""Child processes: started with their names, incarnations and progress records, reaped, signalled by pid."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from lockstep_runtime import child
from lockstep_runtime.progress import Progress, Stage, new_memory
from lockstep_runtime.supervisor.machine import ENGINE, Name

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
class _Process:
    name: Name
    pid: int
    incarnation: str
    started: float
    progress: int  # descriptor; -1 for the engine


class Processes:
    """All children of this supervisor."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = dict(environment)
        self._by_name: dict[Name, _Process] = {}

    def spawn(self, name: Name, extra: Mapping[str, str] | None = None) -> int:
        """Start the child in a process group of its own; returns its pid."""
        incarnation = secrets.token_hex(8)
        progress = -1 if name == ENGINE else new_memory(f"lockstep-progress-{name}")
        environment = self._environment | {
            child.PARENT_VARIABLE: str(os.getpid()),
            child.INCARNATION_VARIABLE: incarnation,
            child.PROGRESS_VARIABLE: str(progress),
            **(extra or {}),
        }
        module = ["lockstep_runtime.engine"] if name == ENGINE else ["lockstep_runtime.worker", "--rank", str(name)]
        pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-m", *module],
            environment,
            setpgroup=0,
            setsigdef=[signal.SIGTERM, signal.SIGINT, signal.SIGCHLD],
            setsigmask=[],
        )
        if progress >= 0:
            os.set_inheritable(progress, False)
        self._by_name[name] = _Process(name, pid, incarnation, time.monotonic(), progress)
        return pid

    def signal(self, name: Name, number: int) -> None:
        process = self._by_name.get(name)
        if process is not None:
            os.kill(process.pid, number)  # not reaped yet, so the pid is still its own

    def incarnation(self, name: Name) -> str:
        process = self._by_name.get(name)
        return process.incarnation if process else ""

    def pids(self) -> dict[Name, int]:
        return {name: process.pid for name, process in self._by_name.items()}

    def reap(self) -> list[Exit]:
        """Every child that has ended; as PID 1 also orphans of others, of which nothing is said."""
        exits: list[Exit] = []
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return exits
            if pid == 0:
                return exits
            process = next((one for one in self._by_name.values() if one.pid == pid), None)
            if process is not None:
                exits.append(self._ended(process, status))

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
        if process.progress < 0:
            return time.monotonic() - process.started > _HEALTHY_ENGINE_SECONDS
        record = Progress(process.progress)
        stage = record.read().stage
        record.close()
        os.close(process.progress)
        return stage is Stage.LOADED
