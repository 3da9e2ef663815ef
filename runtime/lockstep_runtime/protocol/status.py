"""The group's status and the pods' ports: all that the operator knows of the runtime.

`GET /status?after=<revision>` on a supervisor's port gives a `GroupStatus` as JSON.
"""

from __future__ import annotations

import enum
from typing import Final

import msgspec

API_PORT: Final = 8000
BUS_PORT: Final = 7400
STATUS_PORT: Final = 7401


class Fault(enum.StrEnum):
    """The seven ways a step fails: one vocabulary for code, logs, status, metrics and docs."""

    STEP_FAILED = "StepFailed"
    HANG = "Hang"
    RANK_LOST = "RankLost"
    CONTEXT_FAULT = "ContextFault"
    DESYNC = "Desync"
    CORRUPTION = "Corruption"
    NON_FINITE = "NonFinite"


class RankState(enum.StrEnum):
    """Where one rank stands."""

    ABSENT = "Absent"  # no process has reported yet, or it is gone
    STARTING = "Starting"  # its process runs and has not begun to load
    LOADING = "Loading"  # reading its slice of the weights
    LOADED = "Loaded"  # weights in place, not (or no longer) part of a communicator
    READY = "Ready"  # joined the communicator of the group's epoch
    FAILED = "Failed"  # could not load; `RankStatus.message` has its own words


class GroupState(enum.StrEnum):
    """Where the group stands, as its engine sees it."""

    STARTING = "Starting"  # waiting for its ranks
    LOADING = "Loading"
    READY = "Ready"
    RECOVERING = "Recovering"  # a rank failed; requests wait and will be resumed
    FAILED = "Failed"  # the model can't be loaded; it is tried again
    DRAINING = "Draining"
    POISONED = "Poisoned"  # can't serve and can't heal itself


class PodProblemReason(enum.StrEnum):
    OUT_OF_MEMORY = "OutOfMemory"  # the kernel killed a process of the pod for want of memory
    SPAWN_FAILED = "SpawnFailed"  # the kernel refused to start a process


class PodProblem(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What keeps a pod's processes from starting or running; reported until a minute after its last occurrence."""

    pod_index: int
    reason: PodProblemReason
    message: str  # a sentence: which process, the limit and what was used
    at: float  # unix seconds, of the last time


class Latency(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Step latency over the last steps, in milliseconds; None before the first."""

    p50_ms: float | None = None
    p99_ms: float | None = None


class RankStatus(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    rank: int
    pod_index: int
    state: RankState = RankState.ABSENT
    pod: str = ""
    node: str = ""
    pid: int = 0
    incarnation: str = ""
    epoch: int = 0
    respawns: int = 0
    last_step: int = -1
    last_step_at: float | None = None  # unix seconds
    step_latency: Latency = Latency()
    memory_bytes: int = 0
    load_bytes_done: int = 0
    load_bytes_total: int = 0
    message: str = ""


class FaultRecord(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One fault and what became of it. `id` rises by one with every fault of the group and never repeats."""

    id: int
    fault: Fault
    rank: int | None
    message: str
    at: float  # unix seconds, when noticed
    epoch: int  # before the repair
    rung: str = ""  # Drop, Rebuild, Respawn; empty while under way
    recovered_at: float | None = None
    phases: dict[str, float] = {}  # seconds of: detect, abort, respawn, rebuild, verify, firstToken
    requests_resumed: int = 0


class Download(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """How far a pod's download of the model is. `percent` and `rate` (bytes per second) change in few steps, so that a
    sentence made of them and of `total` may be written down."""

    done: int  # bytes
    total: int
    percent: int = 0
    rate: float = 0.0  # 0: not known yet


class GroupStatus(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A group's report on itself. `revision` rises with every change; equal revisions are equal statuses."""

    model: str
    group: int
    incarnation: str  # of the supervisor that serves this: a new one starts counting revisions anew
    revision: int = 0
    spec_revision: str = ""  # the rollout revision that its pods were made for
    epoch: int = 0
    state: GroupState = GroupState.STARTING
    message: str = ""  # a sentence a person can act on
    since: float = 0.0  # unix seconds, when `state` began
    # Whether requests are taken: while the group serves, and for a bounded time while it recovers (they wait). The
    # readiness of the leader pod. None: a runtime older than this field.
    accepting: bool | None = None
    # Whether the operator has it take no requests (`PUT /fence`): a person looks at it.
    fenced: bool = False
    # Of a group that is `Failed`: whether it may pass by itself (a hub that is away, memory, a disk). None: a runtime
    # older than this field.
    may_pass: bool | None = None
    ranks: list[RankStatus] = []
    step_latency: Latency = Latency()
    last_step_at: float | None = None
    requests_running: int = 0
    requests_waiting: int = 0
    recoveries: int = 0
    faults: list[FaultRecord] = []  # the newest 32
    commit: str = ""  # of the hub's model that all ranks load; empty: not known yet, or not from a hub
    download: Download | None = None  # the slowest pod's, while there is one
    pod_problems: list[PodProblem] = []  # at most two for each pod
