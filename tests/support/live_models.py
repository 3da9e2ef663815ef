"""Statuses, reports and faults for the live page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lockstep_operator.types.model_status import Condition, GroupSummary, ModelStatus
from lockstep_operator.types.names import ModelKey
from lockstep_runtime.protocol.status import (
    Fault,
    FaultRecord,
    GroupState,
    GroupStatus,
    Latency,
    RankState,
    RankStatus,
)

KEY = ModelKey("team", "chat")
HEALED = {"detect": 1.92, "abort": 0.031, "respawn": 0.072, "rebuild": 0.019, "verify": 0.015}


def status_of(groups: int = 1, *, message: str = "", stalled: bool = False, **fields: Any) -> ModelStatus:
    """With a message the model is not Ready."""
    ready = Condition(
        type="Ready", status="False" if message else "True", reason="Because", message=message, last_transition_time=0.0
    )
    stuck = Condition(type="Stalled", status=str(stalled), reason="Because", message=message, last_transition_time=0.0)
    return ModelStatus(
        conditions=(ready, stuck),
        ranks=f"{2 * groups}/{2 * groups}",
        ready_replicas=groups,
        groups=tuple(GroupSummary(group=group, ready=True, state="Ready") for group in range(groups)),
        **fields,
    )


def report_of(
    group: int = 0,
    *faults: FaultRecord,
    revision: int = 1,
    size: int = 2,
    absent: Sequence[int] = (),
    state: GroupState = GroupState.READY,
    **fields: Any,
) -> GroupStatus:
    ranks = [
        RankStatus(
            rank=rank, pod_index=rank, state=RankState.ABSENT if rank in absent else RankState.READY,
            pod=f"chat-{group}-{rank}", node=f"node-{rank}", step_latency=Latency(p50_ms=8.0, p99_ms=23.0),
        )
        for rank in range(size)
    ]  # fmt: skip
    defaults: dict[str, Any] = {
        "model": "chat", "incarnation": "i", "ranks": ranks, "step_latency": Latency(p50_ms=8.2, p99_ms=23.4),
    }  # fmt: skip
    return GroupStatus(group=group, revision=revision, state=state, faults=list(faults), **defaults | fields)


def hang(at: float, *, number: int = 1, rank: int = 1, healed: bool = False, message: str = "") -> FaultRecord:
    return FaultRecord(
        id=number,
        fault=Fault.HANG,
        rank=rank,
        message=message or f"rank {rank} stopped before embed_tokens, rank 0 waited 1.9 s",
        at=at,
        epoch=1,
        rung="Respawn",
        phases=HEALED if healed else {"detect": 1.92},
        recovered_at=at + 0.137 if healed else None,
        requests_resumed=3 if healed else 0,
    )
