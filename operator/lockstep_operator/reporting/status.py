"""The status of a model (pure), and whether it is worth writing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import msgspec

from lockstep_operator.decisions.planner import Decision
from lockstep_operator.groups import process_failures, waiting
from lockstep_operator.groups.group import Group
from lockstep_operator.groups.group_view import block_of, resolve_view
from lockstep_operator.groups.pod_issues import find_issue
from lockstep_operator.groups.process_failures import newest_failure
from lockstep_operator.reporting import recovery_log
from lockstep_operator.reporting.conditions import (
    ConditionValue,
    GroupAssessment,
    Obstacle,
    conditions,
    explain,
    render,
    serves,
)
from lockstep_operator.reporting.recovery_log import Repair
from lockstep_operator.types.names import MODEL_LABEL, POD_INDEX_LABEL
from lockstep_operator.types.observed import Observed
from lockstep_operator.types.recovery_state import RecoveryState, from_status, to_status
from lockstep_operator.types.spec import Model
from lockstep_operator.types.timestamps import format_rfc3339, parse_rfc3339
from lockstep_runtime.protocol.status import FaultRecord, GroupState, GroupStatus, Latency, RankState, RankStatus

Status = dict[str, Any]
LISTED_RANKS: Final = 256  # of all groups; beyond it only those that are worth a look are listed
SIZE_LIMIT: Final = 200 * 1024  # bytes, before details are left out
MESSAGE_LIMIT: Final = 1000  # characters of what groups and ranks say
_COUNTERS: Final = ("incarnation", "recoveries", "lastFaultID", "lastRepairID")
_VOLATILE: Final = frozenset({"stepLatency", "lastStepTime"})
_DETAILS: Final = frozenset({"ranks", "leader", *_VOLATILE})
_ESSENTIAL: Final = (
    "observedGeneration",
    "conditions",
    "replicas",
    "readyReplicas",
    "selector",
    "revision",
    "recoveries",
)


def views_of(model: Model, decision: Decision, observed: Observed, now: float) -> tuple[GroupAssessment, ...]:
    return tuple(_view(model, decision, observed, group, now) for group in decision.groups)


def _view(model: Model, decision: Decision, observed: Observed, group: Group, now: float) -> GroupAssessment:
    block, voice = block_of(observed.status, group.index), resolve_view(group, observed, model, now)
    view = GroupAssessment(
        group=group,
        voice=voice,
        trouble=find_issue(group, observed.warnings, now),
        verdict=decision.verdicts.get(group.index),
        complaint=newest_failure(group, voice.status, process_failures.from_status(block.get("podProblem")), now),
    )
    reason = "" if serves(view) else explain(view, model.tensor_parallel_size).reason
    before, deadline = waiting.from_status(block.get("waiting")), model.progress_deadline
    waits = waiting.waiting_for(reason, group, before, deadline, now)
    return replace(view, waiting=waits, overdue=waits is not None and now - waits.since >= deadline)


def memories_of(decision: Decision, observed: Observed) -> dict[int, RecoveryState]:
    """What recovery remembers of each group after this pass: what it did before, where nothing was decided."""
    return {
        group.index: decision.verdicts[group.index].memory
        if group.index in decision.verdicts
        else from_status(block_of(observed.status, group.index).get("recovery"))
        for group in decision.groups
    }


def build(model: Model, observed: Observed, decision: Decision, obstacle: Obstacle | None, now: float) -> Status:
    """The whole status. `obstacle` keeps the operator from doing what the spec asks; `now` is unix seconds."""
    old, views = observed.status, views_of(model, decision, observed, now)
    findings = conditions(model, decision, views, obstacle, old)
    said = [view.voice.status for view in views if view.voice.status]
    memories = memories_of(decision, observed)
    by_operator = list(recovery_log.operator_repairs(old, said, memories, now))
    ready_ranks = sum(rank.state is RankState.READY for status in said for rank in status.ranks)
    status: Status = {
        "observedGeneration": model.generation,
        "conditions": render(findings, model.generation, old.get("conditions") or [], now),
        "replicas": sum(group.exists for group in (*decision.groups, *decision.excess)),
        "readyReplicas": sum(group.ready for group in decision.groups),
        "updatedReplicas": sum(
            bool(decision.revision) and group.ready_at(decision.revision) for group in decision.groups
        ),
        "selector": f"{MODEL_LABEL}={model.name},{POD_INDEX_LABEL}=0",
        "revision": decision.revision or old.get("revision", ""),
        "ranks": f"{ready_ranks}/{model.ranks}",
        "stepLatency": _latency(_slowest([status.step_latency for status in said])),
        "recoveries": _recoveries(old, said, by_operator),
        "lastFault": _last_fault(old, said),
        "lastRecovery": recovery_log.last_recovery(old, said, by_operator),
        "groups": [_group(view, model, old, memories[view.group.index], now) for view in views],
    }
    return compact(_without_none(status))


def halted(generation: int, old: Mapping[str, Any], reason: str, message: str, now: float) -> Status:
    """For a model that the operator can't work on: the rest stays as it was, and so do the pods."""
    findings = {
        "Ready": ConditionValue("False", reason, message),
        "Reconciling": ConditionValue("False", reason, "nothing is done until that is mended"),
        "Stalled": ConditionValue("True", reason, message),
    }
    kept = [condition for condition in old.get("conditions") or [] if condition["type"] not in findings]
    rendered = render(findings, generation, old.get("conditions") or [], now)
    return {**old, "observedGeneration": generation, "conditions": [*rendered, *kept]}


def essential(status: Mapping[str, Any]) -> Status:
    """What an operator that starts anew can't do without: conditions, counts, and what recovery remembers."""
    kept = ("group", "leaderUID", "recovery", *_COUNTERS)
    groups = [{name: group[name] for name in kept if name in group} for group in status.get("groups") or []]
    return {name: status[name] for name in _ESSENTIAL if name in status} | {"groups": groups}


def compact(status: Status) -> Status:
    """The status, with less detail the larger it is: etcd takes no object above 1.5 MiB."""
    for lean in (_without_details, _without_words):
        if len(msgspec.json.encode(status)) <= SIZE_LIMIT:
            break
        status = {**status, "groups": [lean(group, status["revision"]) for group in status["groups"]]}
    return status


def _without_details(group: Mapping[str, Any], revision: str) -> Status:
    """Also without what is so for most groups: the model's revision, and nothing."""
    kept = {
        name: value
        for name, value in group.items()
        if (name not in _DETAILS and value not in ("", 0)) or name == "group"
    }
    if kept.get("revision") == revision:
        del kept["revision"]
    return {name: value[:80] if name == "message" else value for name, value in kept.items()}


def _without_words(group: Mapping[str, Any], revision: str) -> Status:
    del revision
    kept = {name: value for name, value in group.items() if name not in ("message", "podProblem")}
    recovery = kept.get("recovery") or {}
    return kept | ({"recovery": {**recovery, "message": recovery["message"][:80]}} if "message" in recovery else {})


def worth_writing(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Measurements alone are not: a busy model would rewrite its status for ever. The first of each are."""
    return _lasting(new) != _lasting(old) or not _measured(new) <= _measured(old)


def _group(view: GroupAssessment, model: Model, old: Mapping[str, Any], memory: RecoveryState, now: float) -> Status:
    group, said = view.group, view.voice.status
    block: Status = {
        "group": group.index,
        "ready": group.ready,
        "state": str(said.state) if said else ("Unknown" if view.voice.unreachable_reason else "Starting"),
        "message": _words(view, model.tensor_parallel_size)[:MESSAGE_LIMIT],
        "revision": group.revision,
        "leader": group.leader.name if group.leader else None,
        "leaderUID": group.leader.uid if group.leader else None,
        "recovery": to_status(memory),
        "waiting": waiting.to_status(view.waiting),
        "podProblem": process_failures.to_status(view.complaint),
    }
    if said is None:  # counters go on where they were when the same process is heard again
        return block | {name: block_of(old, group.index).get(name) for name in _COUNTERS}
    return block | {
        "epoch": said.epoch,
        "incarnation": said.incarnation,
        "recoveries": said.recoveries,
        "lastFaultID": recovery_log.last_fault_id(old, said),
        "lastRepairID": recovery_log.last_repair_id(old, said, now),
        "stepLatency": _latency(said.step_latency),
        "lastStepTime": _moment(said.last_step_at),
        "readyRanks": sum(rank.state is RankState.READY for rank in said.ranks),
        "ranks": [_rank(rank) for rank in _listed(model, said)],
    }


def _listed(model: Model, said: GroupStatus) -> list[RankStatus]:
    """All ranks of a model with few; else those that are worth a look, the others are counted in `readyRanks`."""
    ranks = sorted(said.ranks, key=lambda rank: rank.rank)
    if model.ranks <= LISTED_RANKS:
        return ranks
    return [rank for rank in ranks if rank.state is not RankState.READY or rank.message][:LISTED_RANKS]


def _words(view: GroupAssessment, size: int) -> str:
    """Never our own sentence about the group's words: those are read back as its words after a restart."""
    said = view.voice.status
    if view.trouble:
        return view.trouble.message
    if said and said.state is not GroupState.LOADING:
        return said.message
    return "" if view.group.ready else explain(view, size).message


def _rank(rank: RankStatus) -> Status:
    return {
        "rank": rank.rank,
        "pod": rank.pod,
        "node": rank.node,
        "state": str(rank.state),
        "epoch": rank.epoch,
        "respawns": rank.respawns,
        "stepLatency": _latency(rank.step_latency),
        "lastStepTime": _moment(rank.last_step_at),
        "message": rank.message[:MESSAGE_LIMIT] or None,
    }


def _recoveries(old: Mapping[str, Any], said: Sequence[GroupStatus], by_operator: Sequence[Repair]) -> int:
    """Over all groups and for ever: a new process counts from 0 again, and a removed group's count stays."""
    total = int(old.get("recoveries", 0)) + sum(not repair.counted for repair in by_operator)
    for status in said:
        block = block_of(old, status.group)
        counted = int(block.get("recoveries", 0)) if block.get("incarnation") == status.incarnation else 0
        total += status.recoveries - counted if status.recoveries >= counted else status.recoveries
    return total


def _last_fault(old: Mapping[str, Any], said: Sequence[GroupStatus]) -> Status | None:
    faults = [(fault.at, status.group, fault) for status in said for fault in status.faults]
    known: Status | None = old.get("lastFault")
    if not faults:
        return known
    at, group, fault = max(faults, key=lambda item: item[:2])
    if known and parse_rfc3339(known["time"]) > at:
        return known
    return _fault(group, fault)


def _fault(group: int, fault: FaultRecord) -> Status:
    return _without_none(
        {
            "fault": str(fault.fault),
            "group": group,
            "rank": fault.rank,
            "message": fault.message[:MESSAGE_LIMIT],
            "time": format_rfc3339(fault.at),
            "rung": fault.rung or None,
            "recoveredTime": _moment(fault.recovered_at),
        }
    )


def _slowest(latencies: Sequence[Latency]) -> Latency:
    return Latency(
        p50_ms=max((latency.p50_ms for latency in latencies if latency.p50_ms is not None), default=None),
        p99_ms=max((latency.p99_ms for latency in latencies if latency.p99_ms is not None), default=None),
    )


def _latency(latency: Latency) -> Status | None:
    parts = {"p50": latency.p50_ms, "p99": latency.p99_ms}
    return {name: f"{value:.1f}ms" for name, value in parts.items() if value is not None} or None


def _moment(seconds: float | None) -> str | None:
    return None if seconds is None else format_rfc3339(seconds)


def _without_none(status: Status) -> Status:
    return {
        name: _bare(value) if isinstance(value, (dict, list)) else value
        for name, value in status.items()
        if value is not None
    }


def _bare(value: Any) -> Any:
    if isinstance(value, dict):
        return _without_none(value)
    return [_bare(item) for item in value] if isinstance(value, list) else value


def _lasting(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _lasting(item) for name, item in value.items() if name not in _VOLATILE}
    return [_lasting(item) for item in value] if isinstance(value, list) else value


def _measured(status: Mapping[str, Any]) -> frozenset[tuple[int | None, int | None]]:
    """Where there are latencies: of the model, of groups, of ranks."""
    groups = status.get("groups") or []
    ranks = [(group["group"], rank["rank"]) for group in groups for rank in group.get("ranks") or [] if _timed(rank)]
    return frozenset(
        [*([(None, None)] if _timed(status) else []), *((g["group"], None) for g in groups if _timed(g)), *ranks]
    )


def _timed(block: Mapping[str, Any]) -> bool:
    return bool(block.get("stepLatency"))
