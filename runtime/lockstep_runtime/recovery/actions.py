"""Actions on a group, decided by the coordinator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lockstep_runtime.protocol import bus
from lockstep_runtime.protocol.step import SequenceSlice
from lockstep_runtime.recovery.diagnosis import Evidence
from lockstep_runtime.recovery.events import Answer
from lockstep_runtime.recovery.log_trail import TrailPhase
from lockstep_runtime.recovery.policy import Recovery
from lockstep_runtime.recovery.watchdog import Deadline


@dataclass(frozen=True, slots=True)
class BeginEpoch:
    """What was known against the epoch before, and what was asked in it, is void."""

    epoch: int


@dataclass(frozen=True, slots=True)
class SendAbort:
    rank: int
    epoch: int


@dataclass(frozen=True, slots=True)
class CloseConnection:
    """Of the process that the rank had."""

    rank: int


@dataclass(frozen=True, slots=True)
class Kill:
    """`reload`: as in `bus.KillWorker`."""

    rank: int
    incarnation: str
    reason: str
    reload: bool


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask these ranks, or all, under a deadline; answered by `CallDone` or `GroupFault`."""

    message: bus.Rendezvous | bus.Join | bus.Scrub
    answer: type[Answer]
    deadline: Deadline
    ranks: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class AllocateCaches:
    """The same, for caches of so many blocks and state slots; `check` what the requests in flight have there."""

    epoch: int
    blocks: int
    state_slots: int
    check: bool
    deadline: Deadline


@dataclass(frozen=True, slots=True)
class RunStep:
    """The same, for a step that nobody asked for."""

    slices: tuple[SequenceSlice, ...]


@dataclass(frozen=True, slots=True)
class Accuse:
    """There is evidence against this epoch: whatever is under way fails."""

    evidence: Evidence


@dataclass(frozen=True, slots=True)
class ProcessesChanged:
    """New processes have joined: their first steps take longer."""


@dataclass(frozen=True, slots=True)
class Resume:
    """Serve. `blocks` and `state_slots` for requests; `kept`: the caches hold what the sequences have computed.

    `phases` are seconds; `respawned`: with any new process; `first`: for the first time.
    """

    epoch: int
    blocks: int
    block_size: int
    state_slots: int
    kept: bool
    phases: Mapping[str, float]
    respawned: bool
    first: bool


@dataclass(frozen=True, slots=True)
class ReportFault:
    """`epoch`: in which it came. `recorded`: in the status, not in the log alone."""

    cause: Evidence
    evidence: tuple[Evidence, ...]
    decision: Recovery
    epoch: int
    recorded: bool


@dataclass(frozen=True, slots=True)
class ReportDeparture:
    """The group waits for a pod's successor; that is no fault."""

    message: str
    epoch: int


@dataclass(frozen=True, slots=True)
class NameCulprit:
    """The open fault turns out to be this rank's, whose process was killed for it."""

    rank: int
    message: str


@dataclass(frozen=True, slots=True)
class RefineFault:
    """How a lost rank's process ended: a better message than that of its loss."""

    before: str
    message: str


@dataclass(frozen=True, slots=True)
class AttributeNaN:
    """It stood in this rank's cache."""

    rank: int


@dataclass(frozen=True, slots=True)
class PhaseOver:
    """A line of the log trail."""

    phase: TrailPhase
    seconds: float
    message: str


@dataclass(frozen=True, slots=True)
class Log:
    """`phase`: a line of the log trail; `quiet`: nothing is wrong; `rank`: whom it is about."""

    message: str
    phase: TrailPhase | None = None
    quiet: bool = False
    rank: int | None = None


@dataclass(frozen=True, slots=True)
class StatusChanged:
    """By time alone."""


@dataclass(frozen=True, slots=True)
class DeclarePoisoned:
    reason: str


Action = (
    BeginEpoch | SendAbort | CloseConnection | Kill | Ask | AllocateCaches | RunStep | Accuse | ProcessesChanged
    | Resume | ReportFault | ReportDeparture | NameCulprit | RefineFault | AttributeNaN | PhaseOver | Log
    | StatusChanged | DeclarePoisoned
)  # fmt: skip
