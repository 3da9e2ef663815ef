"""`kubectl lockstep status`: what each model's status says, what is wrong, and what to do about it (pure)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from lockstep_operator.plugin.advice import advice
from lockstep_operator.types.model_status import GroupSummary, ModelStatus, RankSummary, StepLatency, parse
from lockstep_operator.types.observed import Object
from lockstep_operator.types.reasons import ConditionType, Reason
from lockstep_operator.types.timestamps import format_rfc3339

_WELL: Final = frozenset({Reason.READY, Reason.SCALED_TO_ZERO})


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Something wrong, in the words of who found it, and what to do."""

    where: str  # condition or group
    reason: str
    message: str
    todo: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelReport:
    namespace: str
    name: str
    ready: bool
    available: bool
    reason: str
    message: str
    ready_groups: int
    replicas: int
    ranks: str
    problems: Sequence[Problem]
    status: ModelStatus

    def document(self) -> dict[str, Any]:
        """For programs: what is said, without what the status has anyway."""
        found = {name: getattr(self, name) for name in self.__slots__ if name not in ("problems", "status")}
        groups = [
            {"group": one.group, "ready": one.ready, "state": one.state, "message": one.message}
            for one in self.status.groups
        ]
        return found | {"problems": [asdict(one) for one in self.problems], "groups": groups}


def report(resource: Object) -> ModelReport:
    """Of a model as the API server has it. What the operator has not looked at yet is not ready."""
    metadata, wanted = resource["metadata"], resource.get("spec") or {}
    status = parse(resource.get("status"))
    ready = status.condition(ConditionType.READY)
    current = ready is not None and ready.observed_generation == metadata.get("generation", 1)
    stale = "the operator has not looked at this spec yet: does it run?"
    return ModelReport(
        namespace=metadata["namespace"],
        name=metadata["name"],
        ready=current and status.is_true(ConditionType.READY),
        available=status.is_true(ConditionType.AVAILABLE),
        reason=ready.reason if ready and current else "NotSeen",
        message=ready.message if ready and current else stale,
        ready_groups=status.ready_replicas,
        replicas=wanted.get("replicas", 1),
        ranks=status.ranks,
        problems=[*_problems(status)],
        status=status,
    )


def _problems(status: ModelStatus) -> Iterator[Problem]:
    """Each sentence once: the conditions', worst first, then the groups' own."""
    said: set[str] = set()
    for kind in (ConditionType.STALLED, ConditionType.POISONED, ConditionType.READY, ConditionType.MODEL_LOADED):
        found = status.condition(kind)
        wrong = "True" if kind in (ConditionType.STALLED, ConditionType.POISONED) else "False"
        if found and found.status == wrong and found.reason not in _WELL and found.message not in said:
            said.add(found.message)
            yield Problem(where=kind, reason=found.reason, message=found.message, todo=advice(found.reason))
    for group in status.groups:
        if group.message and not group.ready and group.message not in said:
            said.add(group.message)
            reason = group.pod_problem.reason if group.pod_problem else group.state
            yield Problem(where=f"group {group.group}", reason=reason, message=group.message, todo=advice(reason))


def overview(reports: Sequence[ModelReport]) -> str:
    """One line for each model."""
    head = ("MODEL", "GROUPS", "RANKS", "READY", "AVAILABLE", "REASON", "MESSAGE")
    return table([head, *map(_line, reports)])


def _line(one: ModelReport) -> tuple[str, ...]:
    groups = f"{one.ready_groups}/{one.replicas}"
    return (one.name, groups, one.ranks, _word(one.ready), _word(one.available), one.reason, one.message)


def detail(one: ModelReport, size: int) -> str:
    """Of one model: its groups and ranks, what is wrong, the newest fault. `size` is tensorParallelSize."""
    lines = [f"{one.namespace}/{one.name}: {one.reason}: {one.message}"]
    for problem in one.problems:
        if problem.message != one.message:
            lines.append(f"  {problem.where}: {problem.reason}: {problem.message}")
        if problem.todo:
            lines.append(f"  {problem.reason}: what to do: {problem.todo}")
    if one.status.groups:
        lines += ["", table([_HEAD, *(row for group in one.status.groups for row in _rows(group, size))])]
    return "\n".join([*lines, *_history(one.status), *_receipts(one.status)])


_HEAD: Final = ("GROUP", "RANK", "STATE", "POD", "NODE", "STEP P50", "STEP P99", "RESPAWNS", "EPOCH")


def _rows(group: GroupSummary, size: int) -> Iterator[tuple[str, ...]]:
    number, ready = str(group.group), f"{group.ready_ranks or 0}/{size} ranks"
    epoch = "" if group.epoch is None else str(group.epoch)
    yield (number, ready, group.state, group.leader or "", "", *_latency(group.step_latency), "", epoch)
    for rank in group.ranks or ():
        yield _rank(number, rank)


def _rank(group: str, rank: RankSummary) -> tuple[str, ...]:
    latency = _latency(rank.step_latency)
    return (group, str(rank.rank), rank.state, rank.pod, rank.node, *latency, str(rank.respawns), str(rank.epoch))


def _latency(latency: StepLatency | None) -> tuple[str, str]:
    values = (latency.p50, latency.p99) if latency else (None, None)
    p50, p99 = ("" if value is None else f"{value:.1f}ms" for value in values)
    return p50, p99


def _history(status: ModelStatus) -> Iterator[str]:
    fault = status.last_fault
    if fault is None:
        return
    who = f"group {fault.group}" + ("" if fault.rank is None else f" rank {fault.rank}")
    end = f"repaired by {fault.rung}" if fault.recovered_time else "not repaired yet"
    yield ""
    yield f"newest fault: {fault.fault} of {who}, {format_rfc3339(fault.time)}, {end}; repaired: {status.recoveries}"
    yield f"  {fault.message}"
    if todo := advice(fault.fault):
        yield f"  if it recurs: {todo}"


def _receipts(status: ModelStatus) -> Iterator[str]:
    saved = status.savings
    if saved:
        kept = f"{saved.faults} faults, {saved.requests} requests kept, {saved.paused_seconds:.1f} s of pauses"
        cost = f"{saved.restart_seconds:.0f} s ({saved.restarts_measured} measured)"
        yield f"healed in place so far: {kept}; restarts would have cost {cost}"


def _word(value: bool) -> str:
    return "True" if value else "False"


def table(rows: Iterable[Sequence[str]]) -> str:
    """Columns as kubectl aligns them."""
    kept = [[*row] for row in rows]
    widths = [max(len(row[column]) for row in kept) for column in range(len(kept[0]))]
    return "\n".join(
        "   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in kept
    )
