"""What each group says of itself, or said last (pure).

After a restart the operator has not asked anybody yet. As long as a group's first pod is the one that the status tells
of, its last words still hold: otherwise every restart would make every status flicker.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from lockstep_operator.groups.group import Group
from lockstep_operator.types.observed import Observed
from lockstep_operator.types.spec import Model
from lockstep_operator.types.timestamps import parse_rfc3339
from lockstep_runtime.protocol.status import GroupState, GroupStatus, Latency, RankState, RankStatus

UNREACHABLE_SECONDS: Final = 30.0  # a group that can't be asked for so long is unknown


@dataclass(frozen=True, slots=True)
class GroupView:
    """A group's own words; `silence` says why there are none, or is empty when it hasn't been asked yet."""

    status: GroupStatus | None
    unreachable_reason: str = ""


def resolve_view(group: Group, observed: Observed, model: Model, now: float) -> GroupView:
    leader = group.leader
    if leader is None:
        return GroupView(None)
    report = observed.reports.get(group.index)
    if report and report.unreachable_since is not None and now - report.unreachable_since > UNREACHABLE_SECONDS:
        return GroupView(None, f"pod {leader.name} doesn't answer the operator: {report.error}")
    if report and report.status:
        return GroupView(report.status)
    block = block_of(observed.status, group.index)
    return (
        GroupView(_from_last_status(block, model))
        if block.get("leaderUID") == leader.uid and "epoch" in block
        else GroupView(None)
    )


def block_of(status: Mapping[str, Any], group: int) -> Mapping[str, Any]:
    """What the custom resource's status says of the group; empty if nothing."""
    return next((block for block in status.get("groups") or [] if block["group"] == group), {})


def failed_ranks(status: GroupStatus) -> list[RankStatus]:
    return [rank for rank in status.ranks if rank.state is RankState.FAILED]


def loaded(status: GroupStatus, size: int) -> bool:
    """Whether every rank has its weights."""
    return sum(rank.state in (RankState.LOADED, RankState.READY) for rank in status.ranks) == size


def progress(status: GroupStatus) -> int:
    """Per cent of the weights that are read, in steps of ten: finer ones would each be written to the status."""
    done = sum(rank.load_bytes_done for rank in status.ranks)
    total = sum(rank.load_bytes_total for rank in status.ranks)
    return int(10 * done / total) * 10 if total else 0


def _from_last_status(block: Mapping[str, Any], model: Model) -> GroupStatus:
    state = block.get("state", "")
    return GroupStatus(
        model="",
        group=block["group"],
        incarnation=block.get("incarnation", ""),
        spec_revision=block.get("revision", ""),
        epoch=block["epoch"],
        state=GroupState(state) if state in list(GroupState) else GroupState.STARTING,
        message=block.get("message", ""),
        ranks=_ranks_from_last_status(block, model),
        step_latency=_latency_from_last_status(block),
        last_step_at=_time(block),
        recoveries=block.get("recoveries", 0),
    )


def _ranks_from_last_status(block: Mapping[str, Any], model: Model) -> list[RankStatus]:
    """Those that are listed, and those that were only counted, because there are so many and they are well."""
    listed = {rank["rank"]: _rank_from_last_status(rank, model) for rank in block.get("ranks") or []}
    counted = block.get("readyRanks", 0) - sum(rank.state is RankState.READY for rank in listed.values())
    unlisted = [rank for rank in range(model.tensor_parallel_size) if rank not in listed][: max(0, counted)]
    well = {
        rank: _rank_from_last_status({"rank": rank, "state": "Ready", "epoch": block["epoch"]}, model)
        for rank in unlisted
    }
    return [rank for _, rank in sorted((listed | well).items())]


def _rank_from_last_status(rank: Mapping[str, Any], model: Model) -> RankStatus:
    return RankStatus(
        rank=rank["rank"],
        pod_index=rank["rank"] // model.ranks_per_pod,
        state=RankState(rank.get("state", "Absent")),
        pod=rank.get("pod", ""),
        node=rank.get("node", ""),
        epoch=rank.get("epoch", 0),
        respawns=rank.get("respawns", 0),
        message=rank.get("message", ""),
        step_latency=_latency_from_last_status(rank),
        last_step_at=_time(rank),
    )


def _latency_from_last_status(block: Mapping[str, Any]) -> Latency:
    latency = block.get("stepLatency") or {}
    return Latency(p50_ms=_milliseconds(latency.get("p50")), p99_ms=_milliseconds(latency.get("p99")))


def _milliseconds(text: str | None) -> float | None:
    return float(text.removesuffix("ms")) if text else None


def _time(block: Mapping[str, Any]) -> float | None:
    return parse_rfc3339(block["lastStepTime"]) if "lastStepTime" in block else None
