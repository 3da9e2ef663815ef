"""What each way to a new process buys: a rank is killed while the others of these ways are gone, too.

Nothing is switched off: the processes that stand ready are killed before the rank is, so that what is measured is what
the product does without them.
"""

from __future__ import annotations

import enum
import os
import re
import signal
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from bench.report import Row
from tests.support.serve import Served, title_of

from lockstep_runtime.protocol.status import FaultRecord

RANK: Final = 1
STANDBY: Final = f"lockstep: standby of rank {RANK} "
LOADED: Final = f"lockstep: loaded zygote of rank {RANK} "
ZYGOTE: Final = "lockstep: zygote "
READY_SECONDS: Final = 120.0


class Without(enum.StrEnum):
    """What has gone when the rank is killed."""

    NOTHING = "with all that stands ready"
    STANDBY = "without a standby"
    LOADED = "without a loaded zygote"
    ANY = "without any zygote"


Disturb = Callable[[Callable[[], None]], tuple[float, FaultRecord]]  # calls it, kills the rank; the pause, the record


def measure_starts(name: str, serve: Served, rounds: int, disturb: Disturb) -> list[Row]:
    """Medians of the pause and of its respawn phase, and the memory of what stands ready."""
    serve.until(lambda: _pids(serve, STANDBY) != [], "all processes stand ready", READY_SECONDS)
    rows = [
        Row(case=f"{name}: {what}", metric="memory", value=_memory(serve, title) / 2**20, unit="MiB")
        for what, title in (("standby", STANDBY), ("loaded zygote", LOADED), ("zygote", ZYGOTE))
    ]
    return rows + [row for without in Without for row in _measure(name, serve, rounds, disturb, without)]


def _measure(name: str, serve: Served, rounds: int, disturb: Disturb, without: Without) -> list[Row]:
    pauses, respawns = [], []
    for _ in range(rounds):
        serve.until(lambda: _pids(serve, STANDBY) != [], "all processes stand ready", READY_SECONDS)
        pause, record = disturb(lambda: _remove(serve, without))
        pauses.append(pause)
        respawns.append(record.phases.get("respawn", 0.0))
        print(f"{name}: {without}: {pause:.3f} s", flush=True)
    case = f"{name}: sigkill on rank {RANK} {without}"
    return [
        Row(case=case, metric="pause", value=statistics.median(pauses), unit="s"),
        Row(case=case, metric="respawn", value=statistics.median(respawns), unit="s"),
    ]


def _remove(serve: Served, without: Without) -> None:
    if without is Without.STANDBY:
        _kill(serve, STANDBY)
    if without in (Without.LOADED, Without.ANY):
        _kill(serve, LOADED)  # with it ends what it has forked ahead
        serve.until(lambda: not _pids(serve, STANDBY), "the process forked ahead has ended")
    if without is Without.ANY:
        _kill(serve, ZYGOTE)


def _kill(serve: Served, title: str) -> None:
    [pid] = _pids(serve, title)
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + READY_SECONDS
    while pid in serve.child_pids():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{title} did not end")
        time.sleep(0.001)


def _pids(serve: Served, title: str) -> list[int]:
    return [pid for pid in serve.child_pids() if title_of(pid).startswith(title)]


def _memory(serve: Served, title: str) -> int:
    """Bytes: its own pages, and its share of those that it has in common with others (proc(5), Pss)."""
    [pid] = _pids(serve, title)
    found = re.search(r"^Pss:\s+(\d+) kB$", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024
