"""What recovery remembers of a group (pure). All of it lives in the custom resource's status: operators come and go.

What is in it is written before it is acted upon, so a step that a dying operator left half done is finished by the next
one, and no step is taken twice or uncounted.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lockstep_operator.moment import text, unix


class Rung(enum.StrEnum):
    """The operator's steps of the ladder, the cheapest first."""

    RECYCLE_POD = "RecyclePod"
    RECYCLE_GROUP = "RecycleGroup"
    MOVE_AWAY = "MoveAway"


_SPENT = {Rung.RECYCLE_POD: "recyclePod", Rung.RECYCLE_GROUP: "recycleGroup", Rung.MOVE_AWAY: "moveAway"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
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
    only_said: bool = False  # in mode Observe
    healed: bool = False  # the group has served since


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    plan: Plan | None = None
    spent: Mapping[Rung, int] = field(default_factory=dict)
    failures: int = 0  # steps in a row that have not been proved
    next_try: float | None = None  # not before
    healthy_since: float | None = None
    stalled: bool = False  # the budget is spent
    suspects: Mapping[str, int] = field(default_factory=dict)  # node → faults that were held against it
    avoided: Mapping[str, float] = field(default_factory=dict)  # node → until when


def to_status(memory: Memory) -> dict[str, Any] | None:
    """As `status.groups[].recovery`; None when there is nothing to remember."""
    if memory == Memory():
        return None
    nodes = [*memory.suspects, *sorted({*memory.avoided} - {*memory.suspects})]  # the newest suspect last
    block = {
        **(_plan_block(memory.plan) if memory.plan else {}),
        "spent": {_SPENT[rung]: memory.spent.get(rung, 0) for rung in Rung},
        "failures": memory.failures,
        "nextTryTime": _text(memory.next_try),
        "healthySince": _text(memory.healthy_since),
        "stalled": memory.stalled,
        "nodes": [
            {"name": node, "faults": memory.suspects.get(node, 0), "avoidedUntil": _text(memory.avoided.get(node))}
            for node in nodes
        ],
    }
    return {name: value for name, value in block.items() if value is not None}


def from_status(block: Mapping[str, Any] | None) -> Memory:
    if not block:
        return Memory()
    spent, nodes = block.get("spent") or {}, block.get("nodes") or []
    return Memory(
        plan=_plan(block) if "rung" in block else None,
        spent={rung: spent[name] for rung, name in _SPENT.items() if spent.get(name)},
        failures=block.get("failures", 0),
        next_try=_unix(block, "nextTryTime"),
        healthy_since=_unix(block, "healthySince"),
        stalled=block.get("stalled", False),
        suspects={node["name"]: node["faults"] for node in nodes if node.get("faults")},
        avoided={node["name"]: unix(node["avoidedUntil"]) for node in nodes if node.get("avoidedUntil")},
    )


def _plan_block(plan: Plan) -> dict[str, Any]:
    return {
        "rung": str(plan.rung),
        "trigger": plan.trigger,
        "fault": plan.fault,
        "suspectRank": plan.rank,
        "message": plan.reason,
        "pods": list(plan.pods),
        "time": text(plan.since),
        "faultTime": text(plan.noticed),
        "incarnation": plan.incarnation,
        "onlySaid": plan.only_said,
        "healed": plan.healed,
    }


def _plan(block: Mapping[str, Any]) -> Plan:
    return Plan(
        rung=Rung(block["rung"]),
        trigger=block["trigger"],
        fault=block["fault"],
        rank=block.get("suspectRank"),
        reason=block["message"],
        pods=tuple(block["pods"]),
        since=unix(block["time"]),
        noticed=unix(block["faultTime"]),
        incarnation=block["incarnation"],
        only_said=block["onlySaid"],
        healed=block["healed"],
    )


def _text(seconds: float | None) -> str | None:
    return None if seconds is None else text(seconds)


def _unix(block: Mapping[str, Any], name: str) -> float | None:
    return unix(block[name]) if name in block else None
