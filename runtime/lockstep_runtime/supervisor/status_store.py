"""The group's status as this supervisor serves it: the engine's latest report, with a rising revision."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from dataclasses import dataclass
from typing import Final

import msgspec

from lockstep_runtime.config import ServeConfig
from lockstep_runtime.protocol.status import (
    Fault,
    FaultRecord,
    GroupState,
    GroupStatus,
    PodProblem,
    RankState,
    RankStatus,
)

LEADER: Final = 0  # the pod's index
BELIEVED_SECONDS: Final = 15.0  # without a word from the engine; it gives signs of life more often
GIVE_UP_AFTER: Final = 6  # engines in a row that ended before they were of use
FAULTS_KEPT: Final = 32
_SEEN: Final = re.compile(r"(?:([0-9a-f]{1,32})/)?([0-9]{1,18})")


@dataclass(frozen=True, slots=True)
class Seen:
    """A status that a reader has: the board's incarnation, empty if it names none, and the revision."""

    incarnation: str
    revision: int

    def is_of(self, status: GroupStatus) -> bool:
        return self.revision == status.revision and self.incarnation in ("", status.incarnation)


def parse_seen(text: str) -> Seen:
    """`<incarnation>/<revision>`, or the revision alone.

    A board that starts anew counts from 1 again, so the revision alone may name a status that its reader has not seen.

    Raises:
        ValueError: it is neither.
    """
    if not (match := _SEEN.fullmatch(text)):
        raise ValueError("after must be a revision: <incarnation>/<whole number>, or the number alone")
    return Seen(match[1] or "", int(match[2]))


class StatusStore:
    """Readers wait for the next revision; the engine's reports and its death are what changes it."""

    def __init__(self, config: ServeConfig) -> None:
        self._heard_at = 0.0  # monotonic
        self._is_fenced, self._freed_at = False, 0.0  # unix seconds
        self._is_overruled = False  # the status is not the engine's last word
        self.incarnation = secrets.token_hex(8)
        self.from_engine: GroupStatus | None = None
        self._changed = asyncio.Event()
        self._own = GroupStatus(
            model=config.model_name,
            group=config.group,
            incarnation=self.incarnation,
            revision=1,
            spec_revision=config.spec_revision,
            message="the engine is starting",
            since=time.time(),
            ranks=[
                RankStatus(rank=rank, pod_index=rank // config.ranks_per_pod)
                for rank in range(config.tensor_parallel_size)
            ],
        )

    @property
    def status(self) -> GroupStatus:
        """As it is served."""
        own = self._own
        if self._is_fenced:
            return msgspec.structs.replace(own, fenced=True, accepting=False, message=f"it is fenced; {own.message}")
        since = max(own.since, self._freed_at)  # what was so behind a fence says nothing of how long it is so
        return own if since == own.since else msgspec.structs.replace(own, since=since)

    @property
    def why_unready(self) -> str:
        """Why the group takes no requests; empty: it does."""
        return "" if self.status.accepting else self.status.message or "its engine is starting"

    def take(self, status: GroupStatus) -> None:
        """Store the engine's report; an unchanged one is a sign of life."""
        self._heard_at = time.monotonic()
        if status != self.from_engine or self._is_overruled:
            self._is_overruled, self.from_engine = False, status
            self._publish(status)

    def check(self, now: float) -> None:
        """A status that nobody stands by any more is not believed; `now` is monotonic."""
        if self._own.accepting and now - self._heard_at > BELIEVED_SECONDS:
            self._is_overruled = True
            message = f"the engine has not reported for {BELIEVED_SECONDS:.0f} s"
            self._publish(msgspec.structs.replace(self._own, accepting=False, message=message))

    def engine_lost(self, how: str, failures: int = 0) -> None:
        """The engine's process has ended, or can't be started; what it knew of the ranks is void until the next one
        speaks. `failures`: how often in a row, before it was of use; then nothing in this pod helps it any more."""
        self._is_overruled = True
        gave_up = failures >= GIVE_UP_AFTER
        message = f"the engine {how}, for the {failures}th time in a row" if gave_up else f"the engine {how}"
        if gave_up:
            state = GroupState.POISONED
            self._record_fault(message)
        else:
            state = GroupState.RECOVERING if self.from_engine is not None else GroupState.STARTING
        ranks = [
            msgspec.structs.replace(rank, state=RankState.ABSENT, message="the engine is gone")
            for rank in self._own.ranks
        ]
        self._publish(
            msgspec.structs.replace(
                self._own,
                state=state,
                accepting=False,
                message=f"{message} and is started again",
                since=self._own.since if state is self._own.state else time.time(),
                ranks=ranks,
            )
        )

    def _record_fault(self, message: str) -> None:
        """Once until it is repaired: the next engine that lives goes on from there."""
        faults = self._own.faults
        if faults and faults[-1].recovered_at is None and faults[-1].rank is None:
            return
        fault = FaultRecord(
            id=faults[-1].id + 1 if faults else 1, fault=Fault.RANK_LOST, rank=None, message=message,
            at=time.time(), epoch=self._own.epoch,
        )  # fmt: skip
        self._own = msgspec.structs.replace(self._own, faults=[*faults, fault][-FAULTS_KEPT:])
        self.from_engine = msgspec.structs.replace(self.from_engine or self._own, faults=self._own.faults)

    def fence(self, *, fenced: bool) -> None:
        """Take no requests, whatever the engine says, until the fence is lifted."""
        if fenced is not self._is_fenced:
            self._is_fenced, self._freed_at = fenced, time.time()
            self._publish(self._own)

    def complain(self, problems: list[PodProblem]) -> None:
        """Set this pod's problems: without an engine nobody else reports them."""
        told = [*problems, *(one for one in self._own.pod_problems if one.pod_index != LEADER)]
        if told != self._own.pod_problems:
            self._publish(msgspec.structs.replace(self._own, pod_problems=told))

    def _publish(self, status: GroupStatus) -> None:
        revision = self._own.revision + 1
        self._own = msgspec.structs.replace(status, incarnation=self.incarnation, revision=revision)
        self._changed.set()
        self._changed = asyncio.Event()

    async def after(self, seen: Seen | None, seconds: float) -> GroupStatus:
        """The status: at once when it is another than the reader's, else when it changes or time is up."""
        changed = self._changed
        if seen is not None and seen.is_of(self.status):
            try:
                async with asyncio.timeout(seconds):
                    await changed.wait()
            except TimeoutError:
                pass
        return self.status
