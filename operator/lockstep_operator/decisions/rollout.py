"""Which groups get the new revision now (pure).

A StatefulSet keeps the old template until its group's turn, so that a pod which dies meanwhile is recreated as it was,
and a broken spec reaches only the groups whose turn it is. At most `max_unavailable` groups are in transition or down
together, beside those that surge groups stand in for. Groups that are down already go first, and one of them may
always: replacing them costs no availability.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from lockstep_operator.groups.group import Group


class RolloutStep(enum.StrEnum):
    CREATE = "Create"
    KEEP = "Keep"  # of the revision already
    HOLD = "Hold"  # of another one, as the partition asks
    REPLACE = "Replace"
    WAIT = "Wait"
    LEAVE = "Leave"  # it is fenced


@dataclass(frozen=True, slots=True)
class RolloutDecision:
    """What happens to one group in this pass, and why."""

    group: int
    step: RolloutStep
    reason: str
    revision: str = ""  # that the group has until its next turn


def plan(
    groups: Sequence[Group],
    revision: str,
    max_unavailable: int,
    unplaced: Collection[int] = (),
    astray: Mapping[int, str] = MappingProxyType({}),
    surge: Collection[int] = (),
    held: Mapping[int, str] = MappingProxyType({}),
) -> tuple[RolloutDecision, ...]:
    """One decision per group, in the order of `groups`. `unplaced` ones were unschedulable already before this
    revision: they get it first, and nobody waits for them, or a change would never reach the groups that serve.
    `astray`: groups of this revision that load another commit than the model is pinned to, with that commit. `surge`
    groups are beyond those that the spec asks for: each that is Ready stands in for one of those. `held` ones keep, or
    get, the revision that is named here."""
    asked = [group for group in groups if group.index not in held]
    outdated = [group for group in asked if group.exists and (group.revision != revision or group.index in astray)]
    late = {group.index for group in outdated}
    moving = [
        group
        for group in groups
        if group.index not in {*unplaced, *astray, *surge}
        and (not group.exists or (group.index not in late and not group.ready_at(group.revision)))
    ]
    standing_in = [group for group in groups if group.index in surge and group.ready_at(group.revision)]
    down, most = len(moving), max_unavailable + len(standing_in)
    taken: dict[int, str] = {}
    for group in sorted(outdated, key=lambda group: (group.ready, group.index not in surge, -group.index)):
        missed = group.ready or group.index not in surge
        if missed and down >= (most if group.ready else max(1, most)):
            break
        down += missed
        taken[group.index] = _turn(group, revision, astray)
    return tuple(_decision(group, held.get(group.index, revision), revision, taken, groups) for group in groups)


def _turn(group: Group, revision: str, astray: Mapping[int, str]) -> str:
    if group.revision == revision:
        return f"group {group.index} loaded commit {astray[group.index]}, which is not the model's"
    if not group.ready:
        return f"group {group.index} isn't Ready anyway, so it gets revision {revision} first"
    return f"group {group.index} gets revision {revision}: it is next"


def _decision(group: Group, own: str, revision: str, taken: dict[int, str], groups: Sequence[Group]) -> RolloutDecision:
    """`own` is the revision that the group is to have, `revision` the newest."""
    name = f"group {group.index}"
    if not group.exists:
        return RolloutDecision(group.index, RolloutStep.CREATE, f"{name} doesn't exist yet", own)
    if own != revision:
        return RolloutDecision(group.index, RolloutStep.HOLD, f"{name} is below the partition", own)
    if group.revision == revision and group.index not in taken:
        return RolloutDecision(group.index, RolloutStep.KEEP, f"{name} has revision {revision}", revision)
    if group.index in taken:
        return RolloutDecision(group.index, RolloutStep.REPLACE, taken[group.index], revision)
    blocking = _listed([other.index for other in groups if not other.ready or other.index in taken])
    reason = f"{name} keeps revision {group.revision} until {blocking} Ready"
    return RolloutDecision(group.index, RolloutStep.WAIT, reason, group.revision)


def _listed(indices: Sequence[int]) -> str:
    if not indices:
        return "one more group is"
    if len(indices) == 1:
        return f"group {indices[0]} is"
    return f"groups {', '.join(map(str, indices))} are"
