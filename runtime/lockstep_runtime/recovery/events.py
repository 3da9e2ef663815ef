"""What happens to a group: what the coordinator hears."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lockstep_runtime.protocol import bus
from lockstep_runtime.recovery.diagnosis import Evidence

Answer = bus.RendezvousOpened | bus.Joined | bus.CacheAllocated | bus.StepDone | bus.Scrubbed
Report = bus.LoadProgress | bus.Loaded | bus.LoadFailed | bus.Aborted


@dataclass(frozen=True, slots=True)
class RankConnected:
    hello: bus.Hello


@dataclass(frozen=True, slots=True)
class RankDisconnected:
    rank: int


@dataclass(frozen=True, slots=True)
class RankReported:
    """A rank reports its progress."""

    rank: int
    report: Report


@dataclass(frozen=True, slots=True)
class RankExited:
    """A process of the rank has ended; `how` is what its supervisor saw."""

    rank: int
    incarnation: str
    pid: int
    how: str


@dataclass(frozen=True, slots=True)
class RankStopped:
    """A process of the rank was stopped by a signal, and has not gone on since."""

    rank: int
    incarnation: str
    pid: int
    signal: str


@dataclass(frozen=True, slots=True)
class PodConnected:
    """A pod's supervisor is there."""

    pod_index: int
    incarnation: str


@dataclass(frozen=True, slots=True)
class PodDisconnected:
    pod_index: int


@dataclass(frozen=True, slots=True)
class PodReleased:
    """It was asked to end, and may: its ranks' losses are no faults."""

    pod_index: int


@dataclass(frozen=True, slots=True)
class CallDone:
    """Every rank that was asked has answered."""

    answers: Mapping[int, Answer]


@dataclass(frozen=True, slots=True)
class GroupFault:
    """The group can't continue in this epoch: a call failed, or a step of requests.

    `by_request`: a request of the step is the cause. `steps`: steps of requests since the group last resumed.
    `under_way`: seconds that a rank may compute before it sees the abort.
    """

    cause: Evidence
    evidence: tuple[Evidence, ...]
    by_request: bool = False
    steps: int = 0
    under_way: float = 0.0


@dataclass(frozen=True, slots=True)
class ModelRead:
    """The model's configuration is known: requests can be taken."""


Event = (
    RankConnected | RankDisconnected | RankReported | RankExited | RankStopped | PodConnected | PodDisconnected
    | PodReleased | CallDone | GroupFault | ModelRead
)  # fmt: skip
