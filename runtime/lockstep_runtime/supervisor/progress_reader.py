"""The supervisor's side of a rank's progress record: read without asking the rank."""

from __future__ import annotations

import os

from lockstep_runtime.protocol import bus
from lockstep_runtime.protocol.progress_record import Progress, Record
from lockstep_runtime.supervisor.stall_tracker import StallTracker


class ProgressReader:
    """Of one process of a rank. `descriptor`: of the record's memory; it is this object's from then on."""

    def __init__(self, descriptor: int, pid: int, now: float) -> None:
        self._descriptor = descriptor
        self._stall = StallTracker(pid, now)

    def read(self) -> Record:
        """As it is now."""
        progress = Progress(self._descriptor)
        record = progress.read()
        progress.close()
        return record

    def look(self, now: float) -> None:
        """So that `report` can say since when the rank has not got further."""
        self._stall.look(self.read(), now)

    def report(self, rank: int, incarnation: str, now: float) -> bus.ProgressRecord:
        """How far it has come, whether it answers or not."""
        record = self.read()
        age, starved = self._stall.look(record, now)
        return bus.ProgressRecord(
            rank=rank,
            incarnation=incarnation,
            epoch=record.epoch,
            step=record.step,
            in_step=record.in_step,
            collective=record.collective,
            inside=record.inside,
            place=record.place,
            awaited=record.awaited,
            age=age,
            starved=starved,
        )

    def close(self) -> None:
        os.close(self._descriptor)
