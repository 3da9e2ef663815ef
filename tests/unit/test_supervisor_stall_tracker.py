"""A process that others keep from the CPU is told from one that waits for something."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from lockstep_runtime.protocol.progress_record import Record, Stage
from lockstep_runtime.supervisor.stall_tracker import StallTracker, run_delay

BURN = "while True: pass"
SLEEP = "import time; time.sleep(1000)"
DEADLINE_SECONDS = 60.0


@contextmanager
def running(*programs: str) -> Iterator[list[int]]:
    """Their pids; all on one core."""
    core = {min(os.sched_getaffinity(0))}
    processes = [subprocess.Popen([sys.executable, "-c", program]) for program in programs]
    try:
        for process in processes:
            os.sched_setaffinity(process.pid, core)
        yield [process.pid for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def at_step(step: int) -> Record:
    return Record(stage=Stage.LOADED, epoch=1, step=step, in_step=True, collective=1, inside=False, place="")


def until_delayed(pid: int, seconds: float) -> None:
    deadline, start = time.monotonic() + DEADLINE_SECONDS, run_delay(pid)
    while run_delay(pid) - start < seconds:
        assert time.monotonic() < deadline, f"process {pid} is not kept waiting"
        time.sleep(0.02)


def test_of_a_process_that_shares_its_core_the_wait_counts_from_its_last_move() -> None:
    with running(BURN, BURN, BURN) as pids:
        standstill = StallTracker(pids[0], now=0.0)
        assert standstill.look(at_step(1), now=10.0) == (0.0, 0.0)
        until_delayed(pids[0], 0.5)
        stood, starved = standstill.look(at_step(1), now=13.0)
        assert stood == 3.0
        assert starved >= 0.5
        assert standstill.look(at_step(2), now=14.0) == (0.0, 0.0)  # it got further meanwhile


def test_of_a_process_that_sleeps_hardly_any() -> None:
    with running(SLEEP, BURN, BURN) as [sleeper, burner, _]:
        until_delayed(burner, 0.3)  # all have begun
        standstill = StallTracker(sleeper, now=0.0)
        standstill.look(at_step(1), now=0.0)
        until_delayed(burner, 0.5)
        assert standstill.look(at_step(1), now=1.0)[1] < 0.1


def test_of_a_process_that_is_gone_nothing() -> None:
    assert run_delay(2**22 + 1) == 0.0
