"""What the live page shows of a model, of its groups and ranks, and of a fault (pure).

Everything is a number or a text; the page never takes a text for markup. Times are unix seconds, latencies
milliseconds, phases seconds.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from typing import Final

import msgspec

from lockstep_operator.types.model_status import GroupSummary, LastRecovery, ModelStatus, RankSummary, StepLatency
from lockstep_operator.types.names import ModelKey
from lockstep_operator.types.observed import GroupReport
from lockstep_operator.types.reasons import ConditionType
from lockstep_operator.types.recovery_state import Rung
from lockstep_runtime.protocol.status import FaultRecord, GroupState, GroupStatus, RankState, RankStatus

GROUPS_SHOWN: Final = 8  # of a model, those with trouble first
RANKS_SHOWN: Final = 32  # of a group, likewise
TEXT_LIMIT: Final = 400  # characters
_BROKEN: Final = frozenset({GroupState.RECOVERING, GroupState.POISONED})
UNKNOWN: Final = "Unknown"  # a group that doesn't answer the operator


class Mood(enum.StrEnum):
    READY = "ready"
    HEALING = "healing"  # a group of it is being repaired
    MOVING = "moving"  # it starts, loads, rolls: it passes by itself
    STALLED = "stalled"  # a person is needed


class _Card(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """Part of the page."""


class RankCard(_Card, frozen=True, kw_only=True):
    rank: int
    state: str
    pod: str = ""
    node: str = ""
    p50: float | None = None
    p99: float | None = None
    respawns: int = 0
    message: str = ""
    suspect: bool = False  # of a fault that is not repaired yet


class GroupCard(_Card, frozen=True, kw_only=True):
    group: int
    state: str
    ready: bool = False
    message: str = ""
    running: int = 0
    waiting: int = 0
    last_step: float | None = None
    p50: float | None = None
    p99: float | None = None
    size: int = 0  # its ranks, shown or not
    ranks: list[RankCard] = []


class ModelCard(_Card, frozen=True, kw_only=True):
    id: str
    namespace: str
    name: str
    mood: Mood
    reason: str = ""
    message: str = ""
    ranks: str = ""  # how many of how many are ready
    ready_groups: int = 0
    size: int = 0  # its groups, shown or not
    recoveries: int = 0
    groups: list[GroupCard] = []


class FaultCard(_Card, frozen=True, kw_only=True):
    id: str
    model: str  # the id of its card
    group: int
    fault: str
    at: float
    rank: int | None = None
    message: str = ""
    rung: str = ""
    recovered_at: float | None = None
    phases: Mapping[str, float] = {}
    resumed: int = 0


def identity(key: ModelKey) -> str:
    return f"{key.namespace}/{key.name}"


def mood(status: ModelStatus, reports: Mapping[int, GroupReport]) -> Mood:
    """By the groups' own words first, which are newer than the status."""
    if any(report.status and report.status.state in _BROKEN for report in reports.values()):
        return Mood.STALLED if status.is_true(ConditionType.STALLED) else Mood.HEALING
    if status.is_true(ConditionType.READY):
        return Mood.READY
    return Mood.STALLED if status.is_true(ConditionType.STALLED) else Mood.MOVING


def model_card(key: ModelKey, status: ModelStatus, reports: Mapping[int, GroupReport]) -> ModelCard:
    obstacle = None if status.is_true(ConditionType.READY) else status.condition(ConditionType.READY)
    groups = [_group(summary, reports.get(summary.group)) for summary in status.groups]
    shown = sorted(groups, key=lambda one: (one.state == GroupState.READY, one.group))[:GROUPS_SHOWN]
    return ModelCard(
        id=identity(key),
        namespace=key.namespace,
        name=key.name,
        mood=mood(status, reports),
        reason=obstacle.reason if obstacle else "",
        message=_text(obstacle.message) if obstacle else "",
        ranks=status.ranks,
        ready_groups=status.ready_replicas,
        size=len(groups),
        recoveries=status.recoveries,
        groups=sorted(shown, key=lambda one: one.group),
    )


def fault_cards(key: ModelKey, status: ModelStatus, reports: Mapping[int, GroupReport]) -> Iterable[FaultCard]:
    """What the groups report of their faults, and the last repair by the operator itself."""
    for group, report in reports.items():
        if report.status:
            yield from (_fault(key, group, report.status.incarnation, record) for record in report.status.faults)
    if status.last_recovery and status.last_recovery.rung in list(Rung):
        yield _by_operator(key, status.last_recovery)


def _fault(key: ModelKey, group: int, incarnation: str, record: FaultRecord) -> FaultCard:
    return FaultCard(
        id=f"{identity(key)}/{group}/{incarnation}/{record.id}",
        model=identity(key),
        group=group,
        fault=str(record.fault),
        at=record.at,
        rank=record.rank,
        message=_text(record.message),
        rung=record.rung,
        recovered_at=record.recovered_at,
        phases=record.phases,
        resumed=record.requests_resumed,
    )


def _by_operator(key: ModelKey, repair: LastRecovery) -> FaultCard:
    return FaultCard(
        id=f"{identity(key)}/{repair.group}/operator/{repair.finished_at:.0f}",
        model=identity(key),
        group=repair.group,
        fault=repair.fault,
        at=repair.finished_at - sum(repair.phases.values()),
        rank=repair.suspect_rank,
        message="the group could not repair itself",
        rung=repair.rung,
        recovered_at=repair.finished_at,
        phases=repair.phases,
        resumed=repair.requests_resumed,
    )


def _group(summary: GroupSummary, report: GroupReport | None) -> GroupCard:
    """By its newest report; by the model's status, where it has none or can't be asked."""
    if report is None or report.status is None or summary.state == UNKNOWN:
        return GroupCard(
            group=summary.group,
            state=summary.state,
            ready=summary.ready,
            message=_text(summary.message),
            last_step=summary.last_step_time,
            p50=_p50(summary.step_latency),
            p99=_p99(summary.step_latency),
            size=len(summary.ranks or ()),
            ranks=[_known_rank(rank) for rank in (summary.ranks or ())[:RANKS_SHOWN]],
        )
    status = report.status
    suspects = {fault.rank for fault in status.faults if fault.recovered_at is None}
    ranks = sorted(status.ranks, key=lambda one: (one.state is RankState.READY and one.rank not in suspects, one.rank))
    return GroupCard(
        group=summary.group,
        state=str(status.state),
        ready=summary.ready and status.state is GroupState.READY,
        message=_text(_sentence(summary, status)),
        running=status.requests_running,
        waiting=status.requests_waiting,
        last_step=status.last_step_at,
        p50=status.step_latency.p50_ms,
        p99=status.step_latency.p99_ms,
        size=len(ranks),
        ranks=[_rank(one, suspects) for one in sorted(ranks[:RANKS_SHOWN], key=lambda one: one.rank)],
    )


def _sentence(summary: GroupSummary, status: GroupStatus) -> str:
    action = summary.recovery.action
    if action and not action.healed and status.state in _BROKEN:
        return action.reason
    return status.message or summary.message


def _rank(rank: RankStatus, suspects: set[int | None]) -> RankCard:
    return RankCard(
        rank=rank.rank,
        state=str(rank.state),
        pod=rank.pod,
        node=rank.node,
        p50=rank.step_latency.p50_ms,
        p99=rank.step_latency.p99_ms,
        respawns=rank.respawns,
        message=_text(rank.message),
        suspect=rank.rank in suspects,
    )


def _known_rank(rank: RankSummary) -> RankCard:
    return RankCard(
        rank=rank.rank,
        state=rank.state,
        pod=rank.pod,
        node=rank.node,
        p50=_p50(rank.step_latency),
        p99=_p99(rank.step_latency),
        respawns=rank.respawns,
        message=_text(rank.message or ""),
    )


def _p50(latency: StepLatency | None) -> float | None:
    return latency.p50 if latency else None


def _p99(latency: StepLatency | None) -> float | None:
    return latency.p99 if latency else None


def _text(words: str) -> str:
    return words if len(words) <= TEXT_LIMIT else f"{words[:TEXT_LIMIT]}…"
