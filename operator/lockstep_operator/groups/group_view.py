"""What each group reports, or reported last (pure).

After a restart the operator has not asked anybody yet. As long as a group's first pod is the one that the status names,
its last report still holds: otherwise every restart would make every status flicker.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from lockstep_operator.groups.group import Group
from lockstep_operator.types.model_status import GroupSummary, RankSummary, StepLatency
from lockstep_operator.types.names import UPDATE_ANNOTATION, operator_token_name
from lockstep_operator.types.observed import GroupReport, Pod
from lockstep_operator.types.spec import Model
from lockstep_runtime.protocol.status import FaultRecord, GroupState, GroupStatus, Latency, RankState, RankStatus

UNREACHABLE_SECONDS: Final = 30.0  # a group that can't be asked for so long is unknown
REFUSED_SECONDS: Final = 180.0  # the kubelet brings another token to its pods within two minutes


@dataclass(frozen=True, slots=True)
class GroupView:
    """A group's own report; without one `unreachable_reason` says why; it is empty before the first poll."""

    status: GroupStatus | None = None
    unreachable_reason: str = ""


def resolve_view(group: Group, report: GroupReport | None, last: GroupSummary, model: Model, now: float) -> GroupView:
    leader = group.leader
    if leader is None:
        return GroupView()
    if report and report.unreachable_since is not None:
        patience = REFUSED_SECONDS if report.refused else UNREACHABLE_SECONDS
        if now - report.unreachable_since > patience:
            return GroupView(None, _why_unknown(leader, report, model))
    if report and report.status:
        return GroupView(report.status)
    return GroupView(_from_last_status(last, model) if last.leader_uid == leader.uid else None)


def _why_unknown(leader: Pod, report: GroupReport, model: Model) -> str:
    if not report.refused:
        return f"pod {leader.name} doesn't answer the operator: {report.error}"
    if leader.tokens_id:
        secret = operator_token_name(model.name, leader.tokens_id)
        return f"pod {leader.name} doesn't take the operator's token, as if Secret {secret} were another's"
    ask = f"kubectl annotate --overwrite tpm {model.name} {UPDATE_ANNOTATION}=$(date -u +%FT%TZ)"
    return f"pod {leader.name} was made by an older operator, whose tokens this one can't know: {ask} replaces it"


def newest_fault(status: GroupStatus | None) -> FaultRecord | None:
    return max(status.faults if status else (), key=lambda fault: fault.id, default=None)


def first_rank(status: GroupStatus, *states: RankState) -> int | None:
    """The lowest rank in one of these states."""
    return min((rank.rank for rank in status.ranks if rank.state in states), default=None)


def failed_ranks(status: GroupStatus) -> list[RankStatus]:
    return [rank for rank in status.ranks if rank.state is RankState.FAILED]


def failed_to_load(status: GroupStatus) -> bool:
    return status.state is GroupState.FAILED or bool(failed_ranks(status))


def loaded(status: GroupStatus, size: int) -> bool:
    """Whether every rank has its weights."""
    return sum(rank.state in (RankState.LOADED, RankState.READY) for rank in status.ranks) == size


def ready_ranks(status: GroupStatus) -> int:
    return sum(rank.state is RankState.READY for rank in status.ranks)


def progress(status: GroupStatus) -> int:
    """Per cent of the weights that are read, in steps of ten: finer ones would each be written to the status."""
    done = sum(rank.load_bytes_done for rank in status.ranks)
    total = sum(rank.load_bytes_total for rank in status.ranks)
    return int(10 * done / total) * 10 if total else 0


def _from_last_status(last: GroupSummary, model: Model) -> GroupStatus | None:
    if last.epoch is None:  # the group had not reported
        return None
    return GroupStatus(
        model="",
        group=last.group,
        incarnation=last.incarnation or "",
        spec_revision=last.revision,
        epoch=last.epoch,
        state=GroupState(last.state) if last.state in list(GroupState) else GroupState.STARTING,
        message=last.message,
        ranks=_ranks_from_last_status(last, last.epoch, model),
        step_latency=_latency(last.step_latency),
        last_step_at=last.last_step_time,
        recoveries=last.recoveries or 0,
    )


def _ranks_from_last_status(last: GroupSummary, epoch: int, model: Model) -> list[RankStatus]:
    """Those that are listed, and those that were only counted, because there are so many and they are well."""
    listed = {rank.rank: rank for rank in last.ranks or ()}
    counted = (last.ready_ranks or 0) - sum(rank.state == RankState.READY for rank in listed.values())
    unlisted = [rank for rank in range(model.tensor_parallel_size) if rank not in listed][: max(0, counted)]
    well = {rank: RankSummary(rank=rank, state=RankState.READY, epoch=epoch) for rank in unlisted}
    return [_rank_from_last_status(rank, model) for _, rank in sorted((listed | well).items())]


def _rank_from_last_status(rank: RankSummary, model: Model) -> RankStatus:
    return RankStatus(
        rank=rank.rank,
        pod_index=rank.rank // model.ranks_per_pod,
        state=RankState(rank.state),
        pod=rank.pod,
        node=rank.node,
        epoch=rank.epoch,
        respawns=rank.respawns,
        message=rank.message or "",
        step_latency=_latency(rank.step_latency),
        last_step_at=rank.last_step_time,
    )


def _latency(latency: StepLatency | None) -> Latency:
    return Latency(p50_ms=latency.p50, p99_ms=latency.p99) if latency else Latency()
