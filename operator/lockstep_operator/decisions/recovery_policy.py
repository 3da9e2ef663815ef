"""The operator's part of the ladder (pure): what to do about a group that can't heal itself, and why.

The operator's rungs are RecyclePod (the suspect's pod; the other ranks keep their weights), RecycleGroup (all pods) and
MoveAway (all pods, away from the node that keeps failing). A rung that fails, or whose budget is spent, leads to the
next; when none is left the group is Stalled, and is tried again ever more seldom. Each attempt waits longer than the
one before, until the group has served for a while.

Everything else that keeps a group from serving mends itself or needs a person: it is waited for, with a sentence.

A step is decided in one pass, which only writes it to the status, and taken in the next: see `memory`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

from lockstep_operator.decisions.fault_detection import LOADING, DetectedFault, detect_fault, same_fault
from lockstep_operator.groups.group import Group
from lockstep_operator.groups.pod_issues import PodIssue
from lockstep_operator.types.observed import GroupReport, Pod
from lockstep_operator.types.recovery_state import RecoveryAction, RecoveryState, Rung
from lockstep_operator.types.spec import Recovery
from lockstep_operator.types.timestamps import format_rfc3339
from lockstep_runtime.protocol.status import GroupState, GroupStatus

PROVED_SECONDS: Final = 60.0  # a repair that holds for so long has worked
PATIENCE_SECONDS: Final = 120.0  # for a group whose pods run again to say something new
UNPLACED_SECONDS: Final = 30.0  # a pod that finds no other node gets the old one back
SUSPECTED_NODES: Final = 16  # so many are remembered, the newest: nodes come and go
FAILING_FAULTS: Final = 2  # so many faults make a node one that keeps failing
LADDERS: Final = {
    "Ladder": (Rung.RECYCLE_POD, Rung.RECYCLE_GROUP, Rung.MOVE_AWAY),
    "RecyclePods": (Rung.RECYCLE_GROUP, Rung.MOVE_AWAY),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryInput:
    """A group as recovery sees it. `memory` is what the status holds: only that may be acted upon."""

    seed: str  # of the jitter: two operators must draw the same
    group: Group
    memory: RecoveryState
    report: GroupReport | None = None  # heard by this operator, never what the status remembers
    trouble: PodIssue | None = None
    moving: str = ""  # why its pods are being replaced anyway
    recovering_since: float | None = None  # that it tries to serve again, as the status remembers it

    @property
    def status(self) -> GroupStatus | None:
        return self.report.status if self.report and self.report.unreachable_since is None else None

    @property
    def unschedulable(self) -> bool:
        """A pod finds no node."""
        return self.trouble is not None and self.trouble.reason == "Unschedulable"

    @property
    def healthy(self) -> bool | None:
        """None: not known, because nobody has heard of it yet."""
        if not self.group.ready:
            return False
        return None if self.status is None else self.status.state is GroupState.READY


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryDecision:
    """`memory` is to be written, `targets` are pods to delete now, `again` is in how many seconds to look once more."""

    memory: RecoveryState
    reason: str = ""
    targets: tuple[Pod, ...] = ()
    requeue_after: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """A group that needs a step."""

    policy: Recovery
    group: Group
    trigger: DetectedFault
    now: float

    @property
    def node(self) -> str:
        """That the fault is held against; empty when the suspect isn't known and the pods are on several."""
        if self.trigger.pod:
            return self.trigger.pod.node
        nodes = {pod.node for pod in self.group.pods}
        return nodes.pop() if len(nodes) == 1 else ""


def decide(policy: Recovery, situation: RecoveryInput, now: float) -> RecoveryDecision:
    """The next move for one group. `now` is unix seconds; whole ones are remembered."""
    now = math.floor(now)
    memory = _update_budget(policy, situation, now)
    if not policy.observe and (targets := _targets(situation)):
        return RecoveryDecision(memory=memory, reason=_under_way(situation, memory), targets=targets)
    if unplaced := _unplaced(situation, memory, now):
        memory = _return_nodes(policy, memory, unplaced, now)
        return RecoveryDecision(memory=memory, reason=_under_way(situation, memory), requeue_after=0.0)
    crashing = situation.trouble.pod if situation.trouble and situation.trouble.heals else None
    trigger = detect_fault(situation.group, situation.report, now, crashing, situation.recovering_since)
    if trigger is None:
        return RecoveryDecision(memory=memory, reason=_under_way(situation, memory))
    case = _Case(policy=policy, group=situation.group, trigger=trigger, now=now)
    wait = _wait(case, situation, memory)
    if wait:
        return wait
    return _dry_run(case, memory) if policy.observe else _next_step(case, situation, memory)


# --- health and budgets ---


def _update_budget(policy: Recovery, situation: RecoveryInput, now: float) -> RecoveryState:
    """What health, illness and time make of the memory."""
    memory = situation.memory
    # A pod that finds no node was made to keep away from these, and does so for good: see `_unplaced`.
    avoided = {node: until for node, until in memory.avoided.items() if until > now or situation.unschedulable}
    memory = memory if len(avoided) == len(memory.avoided) else replace(memory, avoided=avoided)
    if memory == RecoveryState():
        return memory
    if situation.healthy and memory.healthy_since is None:
        plan = replace(memory.plan, healed=True, pods=()) if memory.plan else None
        return replace(memory, healthy_since=now, plan=plan)
    if situation.healthy is False and memory.healthy_since is not None:
        return _on_unhealthy(policy, memory, now)
    return _steady(policy, memory, now)


def _steady(policy: Recovery, memory: RecoveryState, now: float) -> RecoveryState:
    healthy = 0.0 if memory.healthy_since is None else now - memory.healthy_since
    if healthy >= max(policy.window, PROVED_SECONDS):
        return RecoveryState(avoided=memory.avoided, healthy_since=memory.healthy_since if memory.avoided else None)
    if healthy >= PROVED_SECONDS:
        return replace(memory, plan=None, failures=0, next_try=None, stalled=False)
    return memory


def _on_unhealthy(policy: Recovery, memory: RecoveryState, now: float) -> RecoveryState:
    """Healthy time has earned attempts back; a repair that didn't hold for long has failed."""
    healthy = max(0.0, now - (memory.healthy_since or now))  # another node's clock may have been ahead
    earned = int(healthy * policy.attempts / policy.window)
    memory = _steady(policy, memory, now)
    attempts_used = {rung: count - earned for rung, count in memory.attempts_used.items() if count > earned}
    return replace(memory, attempts_used=attempts_used, healthy_since=None)


# --- what a decided step still has to do ---


def _targets(situation: RecoveryInput) -> tuple[Pod, ...]:
    """Pods of the written plan that are still to go, once their successors will be made right."""
    plan = situation.memory.plan
    if plan is None or plan.dry_run or situation.healthy is not False or not situation.group.settled:
        return ()
    return tuple(pod for pod in situation.group.pods if pod.uid in plan.pods and pod.deleting is None)


def _unplaced(situation: RecoveryInput, memory: RecoveryState, now: float) -> tuple[str, ...]:
    """UIDs of pods that find no node while one is avoided."""
    if not memory.avoided or not situation.unschedulable:
        return ()
    pending = [pod for pod in situation.group.pods if pod.phase == "Pending" and pod.deleting is None]
    return tuple(pod.uid for pod in pending) if any(now - p.created > UNPLACED_SECONDS for p in pending) else ()


def _return_nodes(policy: Recovery, memory: RecoveryState, unplaced: tuple[str, ...], now: float) -> RecoveryState:
    """There is nowhere to move to: the rung's whole budget counts as spent."""
    reason = f"no other node can take the pods, so {', '.join(sorted(memory.avoided))} is used again"
    blank = RecoveryAction(
        rung=Rung.MOVE_AWAY, trigger="", fault="", rank=None, reason="", pods=(), since=now, noticed=now
    )
    plan = replace(memory.plan or blank, rung=Rung.MOVE_AWAY, reason=reason, pods=unplaced, since=now)
    return replace(
        memory, plan=plan, avoided={}, attempts_used={**memory.attempts_used, Rung.MOVE_AWAY: policy.attempts}
    )


def _under_way(situation: RecoveryInput, memory: RecoveryState) -> str:
    plan = memory.plan
    return plan.reason if plan and not plan.healed and not plan.dry_run and not situation.healthy else ""


# --- what is waited for ---


def _wait(case: _Case, situation: RecoveryInput, memory: RecoveryState) -> RecoveryDecision | None:
    plan = memory.plan
    if situation.moving:
        return RecoveryDecision(memory=memory, reason=situation.moving)
    if situation.trouble and not situation.trouble.heals:
        words = f"{situation.trouble.message}; that comes first, replacing pods wouldn't mend it"
        return RecoveryDecision(memory=memory, reason=words)
    if coming := " and ".join(_coming(case.group)):
        return RecoveryDecision(memory=memory, reason=_under_way(situation, memory) or f"waits until {coming}")
    if plan is None or plan.dry_run is not case.policy.observe or not same_fault(plan.trigger, case.trigger.key):
        return None
    if plan.dry_run:
        return RecoveryDecision(memory=memory, reason=plan.reason)
    if situation.status and any(rank.state in LOADING for rank in situation.status.ranks):
        return RecoveryDecision(memory=memory, reason=plan.reason)
    began = max([plan.since, *(pod.created for pod in case.group.pods)])
    left = began + PATIENCE_SECONDS - case.now
    return RecoveryDecision(memory=memory, reason=plan.reason, requeue_after=left) if left > 0 else None


def _coming(group: Group) -> Iterator[str]:
    """What the StatefulSet controller and the kubelet are about to do by themselves."""
    if len(group.pods) < group.wanted or not group.exists:
        yield "its missing pods are made anew"
    for pod in group.pods:
        if pod.deleting is not None:
            yield f"pod {pod.name} has ended"
        elif pod.phase != "Running":
            yield f"pod {pod.name} runs"


# --- the next step ---


def _next_step(case: _Case, situation: RecoveryInput, memory: RecoveryState) -> RecoveryDecision:
    rung, policy, now = _choose(case, memory), case.policy, case.now
    memory = replace(memory, stalled=rung is None)
    if memory.next_try is not None and now < memory.next_try:
        return RecoveryDecision(memory=memory, reason=_waiting(case, memory), requeue_after=memory.next_try - now)
    taken, failures = rung or Rung.RECYCLE_GROUP, memory.failures + 1
    plan = _plan(case, taken, memory, situation.status.incarnation if situation.status else "")
    blamed = {case.node: memory.node_fault_counts.get(case.node, 0) + 1} if case.node else {}
    planned = replace(
        memory,
        plan=plan,
        attempts_used={**memory.attempts_used, rung: memory.attempts_used.get(rung, 0) + 1}
        if rung
        else memory.attempts_used,
        failures=failures,
        next_try=now + _delay(policy, failures, situation.seed),
        node_fault_counts=_newest_nodes(
            {**{node: n for node, n in memory.node_fault_counts.items() if node not in blamed}, **blamed}
        ),
        avoided={**memory.avoided, case.node: now + policy.window} if taken is Rung.MOVE_AWAY else memory.avoided,
    )
    return RecoveryDecision(memory=planned, reason=plan.reason, requeue_after=0.0)


def _newest_nodes(node_fault_counts: dict[str, int]) -> dict[str, int]:
    return dict([*node_fault_counts.items()][-SUSPECTED_NODES:])


def _choose(case: _Case, memory: RecoveryState) -> Rung | None:
    """The cheapest rung that can help and has budget left: above the one that has just failed, if one has."""
    left = [
        rung
        for rung in LADDERS[case.policy.strategy or "Ladder"]
        if _fits(case, memory, rung) and memory.attempts_used.get(rung, 0) < case.policy.attempts
    ]
    failed = memory.plan.rung if memory.plan and not memory.plan.dry_run else None
    if failed is None:
        return left[0] if left else None
    order = list(Rung)
    above = [rung for rung in left if order.index(rung) > order.index(failed)]
    requeue_after = [rung for rung in left if rung is not Rung.RECYCLE_POD]
    return next(iter([*above, *requeue_after]), None)


def _fits(case: _Case, memory: RecoveryState, rung: Rung) -> bool:
    match rung:
        case Rung.RECYCLE_POD:
            return case.trigger.pod is not None and len(case.group.pods) > 1
        case Rung.MOVE_AWAY:
            faults = memory.node_fault_counts.get(case.node, 0) + 1
            return bool(case.node) and faults >= FAILING_FAULTS and case.node not in memory.avoided
        case _:
            return True


def _plan(case: _Case, rung: Rung, memory: RecoveryState, incarnation: str = "") -> RecoveryAction:
    only_suspect = rung is Rung.RECYCLE_POD and case.trigger.pod is not None
    going = [pod for pod in case.group.pods if not only_suspect or pod == case.trigger.pod]
    return RecoveryAction(
        rung=rung,
        trigger=case.trigger.key,
        fault=case.trigger.fault,
        rank=case.trigger.rank,
        reason=f"{_cause(case)}: {'a late try: ' if memory.stalled else ''}{_remedy(case, rung)}",
        pods=tuple(pod.uid for pod in going),
        since=case.now,
        noticed=math.floor(min(case.trigger.noticed, case.now)),
        incarnation=incarnation,
    )


def _dry_run(case: _Case, memory: RecoveryState) -> RecoveryDecision:
    """What would be done, with nothing counted."""
    plan = _plan(case, _choose(case, memory) or Rung.RECYCLE_GROUP, memory)
    words = f"{plan.reason} (not done, because recovery.mode is Observe)"
    plan = replace(plan, reason=words, pods=(), dry_run=True)
    return RecoveryDecision(memory=replace(memory, plan=plan), reason=words)


def _delay(policy: Recovery, failures: int, seed: str) -> float:
    """Doubling, with jitter so that groups that fail together don't come back together; whole seconds."""
    fraction = int.from_bytes(hashlib.sha256(f"{seed}/{failures}".encode()).digest()[:4]) / 2**32
    most = min(policy.most, policy.initial * 2 ** min(failures - 1, 30))
    return float(math.ceil(most * (0.8 + 0.2 * fraction)))


# --- sentences ---


def _cause(case: _Case) -> str:
    trigger = case.trigger
    who = f" of rank {trigger.rank}" if trigger.rank is not None else ""
    return f"group {case.group.index} can't heal {trigger.fault}{who} ({trigger.message})"


def _remedy(case: _Case, rung: Rung) -> str:
    match rung:
        case Rung.RECYCLE_POD:
            return f"pod {case.trigger.pod.name if case.trigger.pod else ''} is replaced, the others keep their weights"
        case Rung.RECYCLE_GROUP:
            return "all its pods are replaced"
        case Rung.MOVE_AWAY:
            until = format_rfc3339(case.now + case.policy.window)
            return f"all its pods are replaced and kept away from node {case.node}, which keeps failing, until {until}"


def _waiting(case: _Case, memory: RecoveryState) -> str:
    trigger, next_try = case.trigger, format_rfc3339(memory.next_try or case.now)
    if memory.stalled:
        return (
            f"nothing has helped against {trigger.fault} ({trigger.message}) and the budget of {case.policy.attempts} "
            f"attempts for each rung is spent: the next try is at {next_try}, later ones ever more seldom"
        )
    return f"the last repair did not hold ({trigger.fault}: {trigger.message}): the next is at {next_try}"
