"""What healing in place was worth (pure): sums of what was measured, never of guesses.

A repair is counted with the status that first holds it (`lastRepairID`), so no operator counts one twice.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from lockstep_operator.groups.group import Group
from lockstep_operator.reporting.assessment import GroupAssessment
from lockstep_operator.reporting.recovery_log import completed_repairs
from lockstep_operator.types.model_status import Savings
from lockstep_operator.types.observed import Pod
from lockstep_operator.types.timestamps import parse_rfc3339


def savings(before: Savings | None, groups: Sequence[GroupAssessment], now: float) -> Savings | None:
    """With the groups' own repairs that the status doesn't know yet. A restart would have cost what the group's last
    start took; where that isn't known, nothing is added for it."""
    found = before
    for one in groups:
        start = start_seconds(one)
        for repair in completed_repairs(one, now):
            paused = sum(repair.phases.values()) or max(0.0, repair.finished - repair.noticed)
            known = found or Savings()
            found = replace(
                known,
                faults=known.faults + 1,
                requests=known.requests + repair.resumed,
                paused_seconds=round(known.paused_seconds + paused, 3),
                restart_seconds=known.restart_seconds + (start or 0.0),
                restarts_measured=known.restarts_measured + (start is not None),
            )
    return found


def start_seconds(one: GroupAssessment) -> float | None:
    """From the creation of the group's last pod until all were Ready, as measured when its first pod first was: not
    after a fault, nor after containers were started again."""
    group, last = one.group, one.facts.last
    if group.leader is None:
        return None
    if last.leader_uid == group.leader.uid and last.start_seconds is not None:
        return last.start_seconds
    untouched = one.status is not None and one.status.recoveries == 0 and not any(map(_restarted, group.pods))
    return _took(group) if group.ready and untouched else None


def _took(group: Group) -> float | None:
    times = [pod.conditions.get("Ready", {}).get("lastTransitionTime") for pod in group.pods]
    if not all(times):
        return None
    ready = max(parse_rfc3339(time) for time in times if time)
    return max(0.0, ready - max(pod.created for pod in group.pods))


def _restarted(pod: Pod) -> bool:
    return any(container.get("restartCount") for container in pod.containers)
