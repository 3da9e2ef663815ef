"""Faults that say something about a node (pure), each once: of a rank that is named, whose pod outlived them.

A rank whose pod was deleted, drained or evicted was lost by no fault of its node; neither was one that ran out of the
memory that its pod may use.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from lockstep_operator.decisions.node_suspicion import EVIDENCE, NodeFault
from lockstep_operator.reporting.assessment import GroupAssessment
from lockstep_operator.reporting.recovery_log import Repair, completed_repairs
from lockstep_operator.types.observed import Pod
from lockstep_operator.types.reasons import Reason

NEAR_SECONDS: Final = 60.0  # of a lack of memory, that explains a lost rank
CRASHES: Final = "crash/"  # how the keys of crash loops begin: the image's or the spec's fault most often


def node_faults(groups: Sequence[GroupAssessment], now: float) -> list[NodeFault]:
    """That the status doesn't know yet."""
    return [fault for one in groups for fault in (*_repaired(one, now), *_given_up(one))]


def _repaired(one: GroupAssessment, now: float) -> Iterator[NodeFault]:
    for repair in completed_repairs(one, now):
        pod = _pod(one, repair)
        if pod is not None and not _short_of_memory(one, repair):
            who = f"{pod.name} (group {repair.group}, rank {repair.rank})"
            incarnation = one.status.incarnation if one.status else ""
            yield NodeFault(
                node=pod.node,
                fault=repair.fault,
                key=f"node/{repair.group}/{incarnation}/{repair.noticed:.3f}",
                sentence=f"{repair.fault} in pod {who}, repaired by {repair.rung}",
                at=repair.noticed,
            )


def _pod(one: GroupAssessment, repair: Repair) -> Pod | None:
    """Where the faulty rank ran and still runs."""
    if repair.fault not in EVIDENCE or repair.rank is None or one.status is None:
        return None
    index = next((rank.pod_index for rank in one.status.ranks if rank.rank == repair.rank), None)
    pod = next((pod for pod in one.group.pods if pod.index == index), None)
    if pod is None or pod.deleting is not None or pod.created >= repair.noticed or not pod.node:
        return None
    return pod if _ran(pod, repair.noticed) else None


def _ran(pod: Pod, at: float) -> bool:
    """A rank may be missed for as long as its pod's image is pulled. What was restarted since has run before."""
    restarted = any(one.get("restartCount") for one in pod.containers)
    return restarted or pod.started is None or pod.started < at


def _short_of_memory(one: GroupAssessment, repair: Repair) -> bool:
    failure = one.facts.process_failure
    lack = failure is not None and failure.reason == Reason.OUT_OF_MEMORY
    return lack and failure is not None and abs(failure.time - repair.noticed) < NEAR_SECONDS


def _given_up(one: GroupAssessment) -> Iterator[NodeFault]:
    """Faults that the group could not repair: the step that answers one holds it against the suspect's node."""
    action, known = one.recovery.action, one.facts.last.recovery.action
    if action is None or action.dry_run or action.healed or action.fault not in EVIDENCE:
        return
    if action.trigger.startswith(CRASHES) or (known and (known.trigger, known.since) == (action.trigger, action.since)):
        return
    before = one.facts.last.recovery.node_fault_counts
    for node, count in one.recovery.node_fault_counts.items():
        if count > before.get(node, 0):
            key = f"node/{one.group.index}/{action.trigger}/{known.since if known else 0:.0f}"
            sentence = f"{action.fault} in group {one.group.index}, which could not repair it: {action.rung}"
            yield NodeFault(node=node, fault=action.fault, key=key, sentence=sentence, at=action.noticed)
