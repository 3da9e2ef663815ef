"""What recovery remembers of a group. All of it lives in the custom resource's status: operators come and go.

What is in it is written before it is acted upon, so a step that a dying operator left half done is finished by the next
one, and no step is taken twice or uncounted.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from lockstep_operator.types.documents import camel, write
from lockstep_operator.types.timestamps import format_rfc3339, parse_rfc3339

_ACTION: Final = {
    "rank": "suspectRank",
    "reason": "message",
    "since": "time",
    "noticed": "faultTime",
    "dry_run": "onlySaid",
}
_STATE: Final = {"attempts_used": "spent", "next_try": "nextTryTime"}


class Rung(enum.StrEnum):
    """The operator's steps of the ladder, the cheapest first."""

    RECYCLE_POD = "RecyclePod"
    RECYCLE_GROUP = "RecycleGroup"
    MOVE_AWAY = "MoveAway"

    @property
    def field(self) -> str:
        """Its name in the status' count of attempts."""
        return self[0].lower() + self[1:]


class RecoveryAction(msgspec.Struct, frozen=True, kw_only=True, rename=lambda name: _ACTION.get(name, name)):
    """One step, from its decision until it is proved. Times are unix seconds."""

    rung: Rung
    trigger: str  # the fault that it answers; the same is not answered twice
    fault: str
    rank: int | None = None  # the suspect
    reason: str
    pods: tuple[str, ...]  # UIDs that must go
    since: float
    noticed: float  # when the fault was
    incarnation: str = ""  # of the leader's supervisor then
    dry_run: bool = False  # in mode Observe: nothing is done
    healed: bool = False  # the group has served since


class RecoveryState(msgspec.Struct, frozen=True, kw_only=True, rename=lambda name: _STATE.get(name, camel(name))):
    action: RecoveryAction | None = None
    attempts_used: Mapping[Rung, int] = {}
    failures: int = 0  # steps in a row that have not been proved
    next_try: float | None = None  # not before
    healthy_since: float | None = None
    stalled: bool = False  # the budget is spent
    node_fault_counts: Mapping[str, int] = {}  # faults that were held against each node, the newest last
    avoided: Mapping[str, float] = {}  # node → until when


def to_status(state: RecoveryState) -> dict[str, Any] | None:
    """As `status.groups[].recovery`; None when there is nothing to remember."""
    return flat(write(state)) if state != RecoveryState() else None


def flat(document: Mapping[str, Any]) -> dict[str, Any]:
    """A written state as the status holds it: the action's fields beside the others, nodes in one list."""
    faults, avoided = document["nodeFaultCounts"], document["avoided"]
    nodes = [
        {"name": node, "faults": faults.get(node, 0)}
        | ({"avoidedUntil": format_rfc3339(avoided[node])} if node in avoided else {})
        for node in [*faults, *sorted({*avoided} - {*faults})]
    ]
    spent = {rung.field: document["spent"].get(rung, 0) for rung in Rung}
    rest = {name: document[name] for name in document.keys() - {"action", "nodeFaultCounts", "avoided"}}
    return {**document.get("action", {}), **rest, "spent": spent, "nodes": nodes}


def nested(block: Mapping[str, Any]) -> dict[str, Any]:
    """The other way."""
    spent, nodes = block.get("spent") or {}, block.get("nodes") or []
    return {
        **block,
        "action": block if "rung" in block else None,
        "spent": {str(rung): spent[rung.field] for rung in Rung if spent.get(rung.field)},
        "nodeFaultCounts": {node["name"]: node["faults"] for node in nodes if node.get("faults")},
        "avoided": {node["name"]: parse_rfc3339(node["avoidedUntil"]) for node in nodes if node.get("avoidedUntil")},
    }
