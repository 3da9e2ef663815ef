"""The cluster's own daemons: started into the background, and stopped only if they are still the same processes.

A process is its pid and its start time (field 22 of /proc/PID/stat): a pid alone may be someone else's by now.
"""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from dev.cluster.layout import LOGS, PIDS


@dataclass(frozen=True, slots=True)
class Daemon:
    name: str
    pid: int
    start_ticks: int

    @property
    def alive(self) -> bool:
        return start_ticks(self.pid) == self.start_ticks


def start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if there is none, or only its zombie."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state == "Z" else int(rest[18])


def start(name: str, command: list[str], environment: dict[str, str] | None = None) -> Daemon:
    LOGS.mkdir(parents=True, exist_ok=True)
    PIDS.mkdir(parents=True, exist_ok=True)
    with (LOGS / f"{name}.log").open("ab") as log:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**os.environ, **(environment or {})},
        )
    child.returncode = 0  # it outlives this program by design: no warning that it still runs
    daemon = Daemon(name, child.pid, start_ticks(child.pid) or 0)
    (PIDS / f"{name}.json").write_text(json.dumps(asdict(daemon)))
    return daemon


def recorded() -> list[Daemon]:
    return [Daemon(**json.loads(path.read_text())) for path in sorted(PIDS.glob("*.json"))]


def stop(daemons: Iterable[Daemon], patience: float) -> None:
    """SIGTERM to all at once, and SIGKILL after `patience` seconds to those that are left."""
    living = [daemon for daemon in daemons if daemon.alive]
    _signal(living, signal.SIGTERM)
    living = _await_end(living, patience)
    _signal(living, signal.SIGKILL)
    _await_end(living, 10)


def last_words(name: str, lines: int = 8) -> str:
    log = LOGS / f"{name}.log"
    text = log.read_text(errors="replace") if log.exists() else ""
    return "\n".join(text.splitlines()[-lines:])


def _signal(daemons: Iterable[Daemon], number: signal.Signals) -> None:
    for daemon in daemons:
        with contextlib.suppress(ProcessLookupError):
            os.kill(daemon.pid, number)


def _await_end(daemons: list[Daemon], patience: float) -> list[Daemon]:
    deadline = time.monotonic() + patience
    while (living := [daemon for daemon in daemons if daemon.alive]) and time.monotonic() < deadline:
        time.sleep(0.02)
    return living
