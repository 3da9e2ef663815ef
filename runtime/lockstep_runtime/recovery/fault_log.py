"""The record of faults: ids that rise and never repeat, the newest 32 kept. Pure."""

from __future__ import annotations

from typing import Final

import msgspec

from lockstep_runtime.protocol.status import Fault, FaultRecord
from lockstep_runtime.recovery.bounded import bounded
from lockstep_runtime.recovery.diagnosis import Evidence
from lockstep_runtime.recovery.policy import Rung

KEPT: Final = 32


class FaultLog:
    """Open faults are closed together, by the repair that ends them all."""

    def __init__(self, history: list[FaultRecord], recoveries: int) -> None:
        self._records = list(history)[-KEPT:]
        self.recoveries = recoveries
        self._open = {one.id for one in self._records if one.recovered_at is None}  # of the engine before
        self._awaits_token = False
        self._added: dict[tuple[int, str], int] = {}  # to an open record's message: how often

    @property
    def open_id(self) -> int:
        """Of the newest fault that is not repaired yet; 0 when there is none."""
        return max(self._open, default=0)

    @property
    def footprint(self) -> int:
        """How much it remembers beside the records: numbers of open faults, and what was added to their messages."""
        return len(self._open) + len(self._added)

    @property
    def records(self) -> list[FaultRecord]:
        return list(self._records)

    def begin(self, cause: Evidence, rung: str, *, at: float, epoch: int, detect: float) -> FaultRecord:
        """Open a record, unless the last one is open and of the same cause. `detect`: seconds until the detection."""
        last = self._records[-1] if self._records else None
        if last is not None and last.id in self._open and (last.fault, last.rank) == (cause.fault, cause.rank):
            if bounded(cause.message) not in last.message:
                self._add(last, cause.message, last.rank, rung or last.rung)
            return self._records[-1]
        record = FaultRecord(
            id=last.id + 1 if last else 1,
            fault=cause.fault,
            rank=cause.rank,
            message=bounded(cause.message),
            at=at,
            epoch=epoch,
            rung=rung,
            phases={"detect": round(detect, 4)},
        )
        self._records = [*self._records, record][-KEPT:]
        self._open = {one.id for one in self._records if one.id in self._open} | {record.id}
        return record

    def set_cause(self, rank: int, message: str, rung: Rung) -> None:
        """Set the rank that caused the newest open fault; repeated messages are only counted."""
        newest = next((one for one in reversed(self._records) if one.id in self._open), None)
        if newest is not None:
            self._add(newest, message, rank, rung)

    def _add(self, record: FaultRecord, message: str, rank: int | None, rung: str) -> None:
        if len(self._added) >= KEPT:
            self._added.clear()
        self._added[record.id, message] = times = self._added.get((record.id, message), 0) + 1
        text = record.message if times > 1 else f"{record.message}; {message}"
        if times > 1:
            before = f"{message} ({times - 1} times)" if times > 2 else message
            text = text.replace(before, f"{message} ({times} times)")
        self._replace(msgspec.structs.replace(record, rank=rank, message=bounded(text), rung=rung))

    def attribute(self, fault: Fault, rank: int, message: str) -> None:
        """An open fault of this kind that nobody was named for is this rank's."""
        for record in reversed(self._records):
            if record.id in self._open and (record.fault, record.rank) == (fault, None):
                self._replace(
                    msgspec.structs.replace(record, rank=rank, message=bounded(f"{record.message}; {message}"))
                )
                return

    def refine(self, before: str, message: str) -> None:
        """Replace the message of a loss by a better one, in every open record that has it."""
        for record in self._records:
            if record.id in self._open and before in record.message:
                text = bounded(record.message.replace(before, message))
                self._replace(msgspec.structs.replace(record, message=text))

    def drop(self, cause: Evidence, *, at: float, epoch: int) -> FaultRecord:
        """A request was given up, and nothing else happened."""
        before = set(self._open)
        record = self.begin(cause, Rung.DROP, at=at, epoch=epoch, detect=0.0)
        self._open = before
        closed = msgspec.structs.replace(record, recovered_at=at)
        self._replace(closed)
        return closed

    def phase(self, name: str, seconds: float) -> None:
        """A phase of the repair is over. A new attempt begins with `abort`: what an earlier one took is forgotten."""
        for record in self._records:
            if record.id in self._open:
                kept = {one: record.phases[one] for one in record.phases if one == "detect" or name != "abort"}
                self._replace(msgspec.structs.replace(record, phases={**kept, name: round(seconds, 4)}))

    def repaired(self, phases: dict[str, float], *, at: float, resumed: int, respawned: bool = True) -> None:
        """The group has joined again, with so many requests to go on with; `respawned`: with any new process."""
        if not self._open:
            return
        for record in self._records:
            if record.id in self._open:
                merged = {**record.phases, **phases}
                rung = Rung.RESPAWN if respawned else Rung.REBUILD  # a lost rank may only have lost its connection
                self._replace(
                    msgspec.structs.replace(record, recovered_at=at, phases=merged, requests_resumed=resumed, rung=rung)
                )
        self._open.clear()
        self._added.clear()
        self.recoveries += 1
        self._awaits_token = resumed > 0

    def token(self, at: float) -> bool:
        """Note a sampled token; returns whether it was the first after a repair."""
        if not self._awaits_token:
            return False
        self._awaits_token = False
        record = self._records[-1]
        seconds = round(at - (record.recovered_at or at), 4)
        self._replace(msgspec.structs.replace(record, phases={**record.phases, "firstToken": seconds}))
        return True

    def _replace(self, record: FaultRecord) -> None:
        self._records = [record if one.id == record.id else one for one in self._records]
