"""What recovery remembers of a group (pure). All of it lives in the custom resource's status: operators come and go.

What is in it is written before it is acted upon, so a step that a dying operator left half done is finished by the next
one, and no step is taken twice or uncounted.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lockstep_operator.types.timestamps import format_rfc3339, parse_rfc3339


class Rung(enum.StrEnum):
    """The operator's steps of the ladder, the cheapest first."""

    RECYCLE_POD = "RecyclePod"
    RECYCLE_GROUP = "RecycleGroup"
    MOVE_AWAY = "MoveAway"


_SPENT = {Rung.RECYCLE_POD: "recyclePod", Rung.RECYCLE_GROUP: "recycleGroup", Rung.MOVE_AWAY: "moveAway"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryAction:
    """One step, from its decision until it is proved. Times are unix seconds."""

    rung: Rung
    trigger: str  # what it answers; the same is not answered twice
    fault: str
    rank: int | None  # the suspect
    reason: str
    pods: tuple[str, ...]  # UIDs that must go
    since: float
    noticed: float  # when the fault was
    incarnation: str = ""  # of the leader's supervisor then
    dry_run: bool = False  # in mode Observe
    healed: bool = False  # the group has served since


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryState:
    plan: RecoveryAction | None = None
    attempts_used: Mapping[Rung, int] = field(default_factory=dict)
    failures: int = 0  # steps in a row that have not been proved
    next_try: float | None = None  # not before
    healthy_since: float | None = None
    stalled: bool = False  # the budget is spent
    node_fault_counts: Mapping[str, int] = field(default_factory=dict)  # node → faults that were held against it
    avoided: Mapping[str, float] = field(default_factory=dict)  # node → until when


def to_status(memory: RecoveryState) -> dict[str, Any] | None:
    """As `status.groups[].recovery`; None when there is nothing to remember."""
    if memory == RecoveryState():
        return None
    nodes = [
        *memory.node_fault_counts,
        *sorted({*memory.avoided} - {*memory.node_fault_counts}),
    ]  # the newest suspect last
    block = {
        **(_plan_block(memory.plan) if memory.plan else {}),
        "spent": {_SPENT[rung]: memory.attempts_used.get(rung, 0) for rung in Rung},
        "failures": memory.failures,
        "nextTryTime": _text(memory.next_try),
        "healthySince": _text(memory.healthy_since),
        "stalled": memory.stalled,
        "nodes": [
            {
                "name": node,
                "faults": memory.node_fault_counts.get(node, 0),
                "avoidedUntil": _text(memory.avoided.get(node)),
            }
            for node in nodes
        ],
    }
    return {name: value for name, value in block.items() if value is not None}


def from_status(block: Mapping[str, Any] | None) -> RecoveryState:
    if not block:
        return RecoveryState()
    attempts_used, nodes = block.get("spent") or {}, block.get("nodes") or []
    return RecoveryState(
        plan=_plan(block) if "rung" in block else None,
        attempts_used={rung: attempts_used[name] for rung, name in _SPENT.items() if attempts_used.get(name)},
        failures=block.get("failures", 0),
        next_try=_unix(block, "nextTryTime"),
        healthy_since=_unix(block, "healthySince"),
        stalled=block.get("stalled", False),
        node_fault_counts={node["name"]: node["faults"] for node in nodes if node.get("faults")},
        avoided={node["name"]: parse_rfc3339(node["avoidedUntil"]) for node in nodes if node.get("avoidedUntil")},
    )


def _plan_block(plan: RecoveryAction) -> dict[str, Any]:
    return {
        "rung": str(plan.rung),
        "trigger": plan.trigger,
        "fault": plan.fault,
        "suspectRank": plan.rank,
        "message": plan.reason,
        "pods": list(plan.pods),
        "time": format_rfc3339(plan.since),
        "faultTime": format_rfc3339(plan.noticed),
        "incarnation": plan.incarnation,
        "onlySaid": plan.dry_run,
        "healed": plan.healed,
    }


def _plan(block: Mapping[str, Any]) -> RecoveryAction:
    return RecoveryAction(
        rung=Rung(block["rung"]),
        trigger=block["trigger"],
        fault=block["fault"],
        rank=block.get("suspectRank"),
        reason=block["message"],
        pods=tuple(block["pods"]),
        since=parse_rfc3339(block["time"]),
        noticed=parse_rfc3339(block["faultTime"]),
        incarnation=block["incarnation"],
        dry_run=block["onlySaid"],
        healed=block["healed"],
    )


def _text(seconds: float | None) -> str | None:
    return None if seconds is None else format_rfc3339(seconds)


def _unix(block: Mapping[str, Any], name: str) -> float | None:
    return parse_rfc3339(block[name]) if name in block else None
