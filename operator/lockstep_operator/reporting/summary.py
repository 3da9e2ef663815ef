"""The status of a model after a pass (pure), group by group and of all together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from msgspec.structs import replace

from lockstep_operator.decisions.planner import Decision
from lockstep_operator.groups import group_view
from lockstep_operator.reporting import recovery_log
from lockstep_operator.reporting.assessment import GroupAssessment
from lockstep_operator.reporting.conditions import Conditions, dated
from lockstep_operator.reporting.recovery_log import Repair
from lockstep_operator.reporting.savings import start_seconds
from lockstep_operator.types.model_status import GroupSummary, LastFault, ModelStatus, RankSummary, StepLatency
from lockstep_operator.types.names import MODEL_LABEL, POD_INDEX_LABEL
from lockstep_operator.types.spec import Model
from lockstep_runtime.protocol.status import API_PORT, GroupState, GroupStatus, Latency, RankState, RankStatus

LISTED_RANKS: Final = 256  # of all groups; beyond it only those that are worth a look are listed
MESSAGE_LIMIT: Final = 1000  # characters of what groups and ranks report


def summarize(
    model: Model,
    decision: Decision,
    groups: Sequence[GroupAssessment],
    by_operator: Sequence[Repair],
    values: Conditions,
    before: ModelStatus,
    now: float,
) -> ModelStatus:
    """`by_operator` are repairs of this pass. `now` is unix seconds."""
    reported = [one.status for one in groups if one.status]
    return ModelStatus(
        observed_generation=model.generation,
        conditions=dated(values, model.generation, before, now),
        replicas=sum(group.exists for group in (*(one.group for one in groups), *decision.excess)),
        ready_replicas=sum(one.group.ready for one in groups),
        updated_replicas=sum(bool(decision.revision) and one.group.ready_at(decision.revision) for one in groups),
        selector=f"{MODEL_LABEL}={model.name},{POD_INDEX_LABEL}=0",
        revision=decision.revision or before.revision,
        model=decision.pin,
        url=f"http://{model.name}.{model.namespace}.svc:{API_PORT}",
        ready_groups=f"{sum(one.accepts for one in groups)}/{len(groups)}",
        surge=decision.surge,
        runtime=decision.runtime,
        rollback=decision.rollback,
        ranks=f"{_ready_ranks(groups)}/{model.tensor_parallel_size * len(groups)}",
        step_latency=_slowest(reported),
        recoveries=_recoveries(before, groups, by_operator),
        last_fault=_last_fault(before.last_fault, reported),
        last_recovery=recovery_log.last_recovery(before.last_recovery, groups, by_operator),
        groups=tuple(_group(one, model, now) for one in groups),
    )


def _ready_ranks(groups: Sequence[GroupAssessment]) -> str:
    """Unknown, when a group serves and nobody has heard it say so."""
    if any(one.status is None and one.group.ready for one in groups):
        return "?"
    return str(sum(group_view.ready_ranks(one.status) for one in groups if one.status))


def _group(one: GroupAssessment, model: Model, now: float) -> GroupSummary:
    group, last, status = one.group, one.facts.last, one.status
    unknown = "Unknown" if one.facts.view.unreachable_reason else "Starting"
    summary = GroupSummary(
        start_seconds=start_seconds(one),
        group=group.index,
        ready=group.ready,
        state=str(status.state) if status else unknown,
        message=_message(one)[:MESSAGE_LIMIT],
        revision=group.revision,
        leader=group.leader.name if group.leader else None,
        leader_uid=group.leader.uid if group.leader else None,
        recovery=one.recovery,
        waiting=one.waiting,
        pod_problem=one.facts.process_failure,
        # Counters continue when the same process reports again.
        incarnation=last.incarnation,
        recoveries=last.recoveries,
        last_fault_id=last.last_fault_id,
        last_repair_id=last.last_repair_id,
    )
    return _reported(summary, last, status, model, now) if status else summary


def _reported(summary: GroupSummary, last: GroupSummary, status: GroupStatus, model: Model, now: float) -> GroupSummary:
    """With what the group itself reports."""
    last_fault_id, last_repair_id = recovery_log.last_ids(last, status, now)
    return replace(
        summary,
        epoch=status.epoch,
        incarnation=status.incarnation,
        recoveries=status.recoveries,
        last_fault_id=last_fault_id,
        last_repair_id=last_repair_id,
        step_latency=_latency(status.step_latency),
        last_step_time=status.last_step_at,
        ready_ranks=group_view.ready_ranks(status),
        ranks=tuple(_rank(rank) for rank in _listed(model, status)),
    )


def _listed(model: Model, status: GroupStatus) -> list[RankStatus]:
    """All ranks of a model with few; else those that are worth a look, the others are counted in `readyRanks`."""
    ranks = sorted(status.ranks, key=lambda rank: rank.rank)
    if model.ranks <= LISTED_RANKS:
        return ranks
    return [rank for rank in ranks if rank.state is not RankState.READY or rank.message][:LISTED_RANKS]


def _message(one: GroupAssessment) -> str:
    """Never our own sentence about the group's report: this is read back as its report after a restart."""
    if one.facts.issue:
        return one.facts.issue.message
    if one.status and one.status.state is not GroupState.LOADING:
        return one.status.message
    return "" if one.group.ready else one.blocker.message


def _rank(rank: RankStatus) -> RankSummary:
    return RankSummary(
        rank=rank.rank,
        pod=rank.pod,
        node=rank.node,
        state=str(rank.state),
        epoch=rank.epoch,
        respawns=rank.respawns,
        step_latency=_latency(rank.step_latency),
        last_step_time=rank.last_step_at,
        message=rank.message[:MESSAGE_LIMIT] or None,
    )


def _recoveries(before: ModelStatus, groups: Sequence[GroupAssessment], by_operator: Sequence[Repair]) -> int:
    """Over all groups and for ever: a removed group's count stays."""
    own = sum(recovery_log.recoveries_since(one.facts.last, one.status) for one in groups if one.status)
    return before.recoveries + own + sum(not repair.counted for repair in by_operator)


def _last_fault(known: LastFault | None, reported: Sequence[GroupStatus]) -> LastFault | None:
    faults = [(fault.at, status.group, fault) for status in reported for fault in status.faults]
    at, group, fault = max(faults, key=lambda item: item[:2], default=(0.0, 0, None))
    if fault is None or (known and known.time > at):
        return known
    return LastFault(
        fault=str(fault.fault),
        group=group,
        rank=fault.rank,
        message=fault.message[:MESSAGE_LIMIT],
        time=fault.at,
        rung=fault.rung or None,
        recovered_time=fault.recovered_at,
    )


def _slowest(reported: Sequence[GroupStatus]) -> StepLatency | None:
    latencies = [status.step_latency for status in reported]
    return _latency(
        Latency(
            p50_ms=max((one.p50_ms for one in latencies if one.p50_ms is not None), default=None),
            p99_ms=max((one.p99_ms for one in latencies if one.p99_ms is not None), default=None),
        )
    )


def _latency(latency: Latency) -> StepLatency | None:
    return StepLatency(p50=latency.p50_ms, p99=latency.p99_ms) if latency != Latency() else None
