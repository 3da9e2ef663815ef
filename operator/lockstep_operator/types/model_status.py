"""The status of a TensorParallelModel as frozen types: parsed once per pass, and rendered when it is written."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from lockstep_operator.types.documents import camel, read, write
from lockstep_operator.types.recovery_state import RecoveryState, nested, to_status


class Part(msgspec.Struct, frozen=True, kw_only=True, rename=camel):
    """Of the status. Times are unix seconds."""


class Condition(Part, frozen=True, kw_only=True):
    type: str
    status: str
    reason: str
    message: str
    observed_generation: int | None = None
    last_transition_time: float


class StepLatency(Part, frozen=True, kw_only=True):
    """In milliseconds."""

    p50: float | None = None
    p99: float | None = None


class LastFault(Part, frozen=True, kw_only=True):
    fault: str
    group: int
    rank: int | None = None
    message: str
    time: float
    rung: str | None = None
    recovered_time: float | None = None


class LastRecovery(Part, frozen=True, kw_only=True):
    """`phases` in seconds."""

    fault: str
    group: int
    suspect_rank: int | None = None
    rung: str
    phases: Mapping[str, float] = {}
    requests_resumed: int = 0
    finished_at: float


class RankSummary(Part, frozen=True, kw_only=True):
    rank: int
    pod: str = ""
    node: str = ""
    state: str = "Absent"
    epoch: int = 0
    respawns: int = 0
    step_latency: StepLatency | None = None
    last_step_time: float | None = None
    message: str | None = None


class Waiting(msgspec.Struct, frozen=True):
    """What a group waits for, since when, and the revision of the pods that the wait began with."""

    reason: str
    since: float
    revision: str = ""


class ProcessFailure(msgspec.Struct, frozen=True):
    """Something within a pod that couldn't run, or was killed: `status.groups[].podProblem`."""

    reason: str
    message: str
    time: float


class GroupSummary(Part, frozen=True, kw_only=True):
    """One of `status.groups`; what the group has not reported is None."""

    group: int
    ready: bool = False
    state: str = ""
    message: str = ""
    revision: str = ""
    leader: str | None = None
    leader_uid: str | None = None
    recovery: RecoveryState = RecoveryState()
    waiting: Waiting | None = None
    pod_problem: ProcessFailure | None = None
    epoch: int | None = None
    incarnation: str | None = None
    recoveries: int | None = None
    last_fault_id: int | None = None
    last_repair_id: int | None = None
    step_latency: StepLatency | None = None
    last_step_time: float | None = None
    ready_ranks: int | None = None
    start_seconds: float | None = None
    ranks: tuple[RankSummary, ...] | None = None


class Savings(Part, frozen=True, kw_only=True):
    """What groups repaired by themselves since the model was made. It only rises."""

    faults: int = 0
    requests: int = 0  # that went on
    paused_seconds: float = 0.0
    restart_seconds: float = 0.0  # that starting the group had taken, once for each of `restarts_measured` faults
    restarts_measured: int = 0


class NodeFaults(Part, frozen=True, kw_only=True):
    """What is held against a node. `fault` and `time` are the newest one's."""

    name: str
    faults: int
    fault: str
    time: float


class PinnedModel(Part, frozen=True, kw_only=True):
    """What the hub's model was resolved to, and what was resolved: of another spec it says nothing."""

    source: str
    repo: str
    revision: str
    resolve_revision_at: float | None = None
    commit: str


class SurgeReason(enum.StrEnum):
    ROLLOUT = "Rollout"
    EVACUATION = "Evacuation"


class SurgeGroup(Part, frozen=True, kw_only=True):
    """A group with an index of `replicas` or more, and why it is wanted."""

    group: int
    reason: SurgeReason


class Runtime(Part, frozen=True, kw_only=True):
    """Which runtime the pods have, or get. `updating`: it is this model's turn to be updated by itself."""

    image: str = ""
    outdated: bool = False
    updating: bool = False


class Tokens(Part, frozen=True, kw_only=True):
    """The Secrets with the model's tokens, as they were made last: of which key of the operator's, and of which
    request."""

    key: str
    id: str
    time: float


class Rollback(Part, frozen=True, kw_only=True):
    """What was asked for, and when it ends: as soon as the spec has another shape."""

    revision: str
    shape: str


class ModelStatus(Part, frozen=True, kw_only=True):
    observed_generation: int | None = None
    conditions: tuple[Condition, ...] = ()
    replicas: int = 0
    ready_replicas: int = 0
    updated_replicas: int = 0
    selector: str = ""
    url: str = ""
    revision: str = ""
    model: PinnedModel | None = None
    ready_groups: str = ""
    surge: tuple[SurgeGroup, ...] = ()
    runtime: Runtime = Runtime()
    rollback: Rollback | None = None
    tokens: Tokens | None = None
    ranks: str = ""
    step_latency: StepLatency | None = None
    recoveries: int = 0
    last_fault: LastFault | None = None
    last_recovery: LastRecovery | None = None
    savings: Savings | None = None
    node_faults: tuple[NodeFaults, ...] | None = None
    groups: tuple[GroupSummary, ...] = ()

    def condition(self, kind: str) -> Condition | None:
        return next((one for one in self.conditions if one.type == kind), None)

    def is_true(self, kind: str) -> bool:
        return any(one.type == kind and one.status == "True" for one in self.conditions)

    def group(self, index: int) -> GroupSummary:
        """An empty one when the status doesn't know the group."""
        if index < len(self.groups) and self.groups[index].group == index:  # as the operator writes them
            return self.groups[index]
        return next((one for one in self.groups if one.group == index), GroupSummary(group=index))


def parse(document: Mapping[str, Any] | None) -> ModelStatus:
    """Raises ValueError and msgspec.ValidationError for what the CRD's schema refuses."""
    groups = [
        {**group, "recovery": nested(group.get("recovery") or {})} for group in (document or {}).get("groups") or []
    ]
    return read({**(document or {}), "groups": groups}, ModelStatus)


def render(status: ModelStatus) -> dict[str, Any]:
    """As the API server takes it."""
    document = write(status)
    for group, block in zip(status.groups, document["groups"], strict=True):
        block.pop("recovery")
        if recovery := to_status(group.recovery):
            block["recovery"] = recovery
    return document


def render_conditions(conditions: Iterable[Condition]) -> list[dict[str, Any]]:
    return [write(condition) for condition in conditions]
