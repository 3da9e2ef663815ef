"""The operator's part of the ladder (pure): what to do about a group that can't heal itself, and why.

The operator's rungs are RecyclePod (the suspect's pod; the other ranks keep their weights), RecycleGroup (all pods) and
MoveAway (all pods, away from the node that keeps failing). A rung that fails, or whose budget is spent, leads to the
next; when none is left the group is Stalled, and is tried again with growing delays. Each attempt waits longer than
the one before, until the group has served for a while.

Everything else that keeps a group from serving resolves by itself or needs a person: recovery waits, with a reason.

A step is decided in one pass, which only writes it to the status, and taken in the next: see `recovery_state`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from msgspec.structs import replace

from lockstep_operator.decisions.fault_detection import LOADING, detect_fault, same_fault
from lockstep_operator.decisions.recovery_budget import update_budget
from lockstep_operator.decisions.recovery_step import RecoveryStep
from lockstep_operator.groups.group import Group
from lockstep_operator.groups.pod_issues import PodIssue
from lockstep_operator.types.observed import GroupReport, Pod
from lockstep_operator.types.reasons import Reason
from lockstep_operator.types.recovery_state import RecoveryAction, RecoveryState, Rung
from lockstep_operator.types.spec_blocks import RecoverySpec
from lockstep_runtime.protocol.status import GroupState, GroupStatus

PATIENCE_SECONDS: Final = 120.0  # for a group whose pods run again to report something new
UNPLACED_SECONDS: Final = 30.0  # a pod that finds no other node gets the old one back


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryInput:
    """A group as recovery sees it. `state` is what the status holds: only that may be acted upon."""

    seed: str  # of the jitter: two operators must compute the same
    group: Group
    state: RecoveryState
    report: GroupReport | None = None  # to this operator, never what the status remembers
    issue: PodIssue | None = None
    moving: str = ""  # why its pods are being replaced anyway
    suspicion: Mapping[str, int] = field(default_factory=dict)  # faults that all models hold against nodes
    recovering_since: float | None = None  # that it tries to serve again, as the status remembers it

    @property
    def status(self) -> GroupStatus | None:
        return self.report.status if self.report and self.report.unreachable_since is None else None

    @property
    def unschedulable(self) -> bool:
        """A pod can't be placed on a node."""
        return self.issue is not None and self.issue.reason is Reason.UNSCHEDULABLE

    @property
    def healthy(self) -> bool | None:
        """None: not known, because it has not reported yet."""
        if not self.group.ready:
            return False
        return None if self.status is None else self.status.state is GroupState.READY


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryDecision:
    """`state` is to be written, `targets` are pods to delete now, `requeue_after` is in how many seconds to decide
    again."""

    state: RecoveryState
    reason: str = ""
    targets: tuple[Pod, ...] = ()
    requeue_after: float | None = None


def decide(policy: RecoverySpec, known: RecoveryInput, now: float) -> RecoveryDecision:
    """The next move for one group. `now` is unix seconds; whole ones are remembered."""
    now = math.floor(now)
    state = update_budget(policy, _without_past(known, now), known.healthy, now)
    if not policy.observe and (targets := _targets(known)):
        return RecoveryDecision(state=state, reason=_under_way(known, state), targets=targets)
    if unplaced := _unplaced(known, state, now):
        state = _return_nodes(policy, state, unplaced, now)
        return RecoveryDecision(state=state, reason=_under_way(known, state), requeue_after=0.0)
    crashing = known.issue.pod if known.issue and known.issue.heals else None
    fault = detect_fault(known.group, known.report, now, crashing, known.recovering_since)
    if fault is None:
        return RecoveryDecision(state=state, reason=_under_way(known, state))
    incarnation = known.status.incarnation if known.status else ""
    step = RecoveryStep(
        policy=policy,
        group=known.group,
        fault=fault,
        state=state,
        incarnation=incarnation,
        now=now,
        suspicion=known.suspicion,
    )
    if wait := _wait(step, known):
        return wait
    return _dry_run(step) if policy.observe else _next_step(step, known.seed)


def _without_past(known: RecoveryInput, now: float) -> RecoveryState:
    """Nodes are avoided until their time is over. An unschedulable pod was created to keep away from these, and
    always will: see `_unplaced`."""
    avoided = {node: until for node, until in known.state.avoided.items() if until > now or known.unschedulable}
    return replace(known.state, avoided=avoided)


def _targets(known: RecoveryInput) -> tuple[Pod, ...]:
    """Pods of the written step that are still to go, once their successors will be made right."""
    action = known.state.action
    if action is None or action.dry_run or known.healthy is not False or not known.group.settled:
        return ()
    return tuple(pod for pod in known.group.pods if pod.uid in action.pods and pod.deleting is None)


def _unplaced(known: RecoveryInput, state: RecoveryState, now: float) -> tuple[str, ...]:
    """UIDs of pods that find no node while one is avoided."""
    if not state.avoided or not known.unschedulable:
        return ()
    pending = [pod for pod in known.group.pods if pod.phase == "Pending" and pod.deleting is None]
    return tuple(pod.uid for pod in pending) if any(now - p.created > UNPLACED_SECONDS for p in pending) else ()


def _return_nodes(policy: RecoverySpec, state: RecoveryState, unplaced: tuple[str, ...], now: float) -> RecoveryState:
    """There is nowhere to move to: the rung's whole budget counts as spent."""
    rung = Rung.MOVE_AWAY
    reason = f"no other node can take the pods, so {', '.join(sorted(state.avoided))} is used again"
    blank = RecoveryAction(rung=rung, trigger="", fault="", rank=None, reason="", pods=(), since=now, noticed=now)
    action = replace(state.action or blank, rung=rung, reason=reason, pods=unplaced, since=now)
    return replace(state, action=action, avoided={}, attempts_used={**state.attempts_used, rung: policy.attempts})


def _under_way(known: RecoveryInput, state: RecoveryState) -> str:
    action = state.action
    return action.reason if action and not action.healed and not action.dry_run and not known.healthy else ""


def _wait(step: RecoveryStep, known: RecoveryInput) -> RecoveryDecision | None:
    """What comes before the next step."""
    state, action = step.state, step.state.action
    if known.moving:
        return RecoveryDecision(state=state, reason=known.moving)
    if known.issue and not known.issue.heals:
        text = f"{known.issue.message}; that comes first, since replacing pods wouldn't fix it"
        return RecoveryDecision(state=state, reason=text)
    if coming := " and ".join(_coming(step.group)):
        return RecoveryDecision(state=state, reason=_under_way(known, state) or f"waits until {coming}")
    if action is None or action.dry_run is not step.policy.observe or not same_fault(action.trigger, step.fault.key):
        return None
    return _patience(step, known, action)


def _patience(step: RecoveryStep, known: RecoveryInput, action: RecoveryAction) -> RecoveryDecision | None:
    """The step that answers this very fault is given its time."""
    given = RecoveryDecision(state=step.state, reason=action.reason)
    if action.dry_run or (known.status and any(rank.state in LOADING for rank in known.status.ranks)):
        return given
    began = max([action.since, *(pod.created for pod in step.group.pods)])
    left = began + PATIENCE_SECONDS - step.now
    return RecoveryDecision(state=step.state, reason=action.reason, requeue_after=left) if left > 0 else None


def _coming(group: Group) -> Iterator[str]:
    """What the StatefulSet controller and the kubelet are about to do by themselves."""
    if len(group.pods) < group.wanted or not group.exists:
        yield "its missing pods are recreated"
    for pod in group.pods:
        if pod.deleting is not None:
            yield f"pod {pod.name} has ended"
        elif pod.phase != "Running":
            yield f"pod {pod.name} runs"


def _next_step(step: RecoveryStep, seed: str) -> RecoveryDecision:
    rung, next_try = step.choose(), step.state.next_try
    state = replace(step.state, stalled=rung is None)
    step = dataclasses.replace(step, state=state)
    if next_try is not None and step.now < next_try:
        return RecoveryDecision(state=state, reason=step.why_not_yet(), requeue_after=next_try - step.now)
    planned = step.taken(rung, seed)
    return RecoveryDecision(state=planned, reason=planned.action.reason if planned.action else "", requeue_after=0.0)


def _dry_run(step: RecoveryStep) -> RecoveryDecision:
    """What would be done, with nothing counted."""
    action = step.action(step.choose() or Rung.RECYCLE_GROUP)
    text = f"{action.reason} (not done, because recovery.mode is Observe)"
    action = replace(action, reason=text, pods=(), dry_run=True, incarnation="")
    return RecoveryDecision(state=replace(step.state, action=action), reason=text)
