"""Which groups there are to be beyond `replicas`, and why (pure).

A surge group is like any other: it is made, healed, polled, and takes requests through the model's Service. It is
wanted as long as `status.surge` names it, which is written first and acted upon in the next pass; so an operator that
is killed makes no second one. When nobody needs it any more it leaves the status, and then goes as any group beyond
`replicas` does: its pods are taken out of the Service, finish their requests, and end.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from lockstep_operator.groups.group import Group
from lockstep_operator.types.model_status import SurgeGroup, SurgeReason


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """For one reason: so many groups are to be there, `start`, and so many may stay that are there already, `keep`."""

    reason: SurgeReason
    start: int
    keep: int


def of_rollout(most: int, asked: Sequence[Group], revision: str, astray: Collection[int] = ()) -> Need:
    """`asked` are the groups below `replicas` that get the revision, `astray` those of it that must be replaced all the
    same. A group that serves with another one is replaced when somebody stands in for it; they stay until all serve."""
    behind = [one for one in asked if not one.ready_at(revision) or one.index in astray]
    outdated = [one for one in behind if one.ready and (one.revision != revision or one.index in astray)]
    return Need(reason=SurgeReason.ROLLOUT, start=min(most, len(outdated)), keep=min(most, len(behind)))


def plan(
    replicas: int,
    known: Sequence[SurgeGroup],
    needs: Sequence[Need],
    ready: Collection[int] = (),
    leaving: Collection[int] = (),
) -> tuple[SurgeGroup, ...]:
    """What the status is to have, where it has `known`. `ready` groups stay longest. `leaving` are groups beyond those
    wanted that have not gone yet: they count, so that there are never more than is allowed."""
    free = (index for index in itertools.count(replicas) if index not in leaving)
    fresh = (index for index in free if index not in {one.group for one in known})
    found: list[SurgeGroup] = []
    for need in needs:
        held = [one for one in known if one.reason == need.reason and one.group >= replicas]
        held.sort(key=lambda one: (one.group not in ready, one.group))
        kept = held[: max(need.start, need.keep)]
        missing = range(need.start - len(held) - len(leaving))
        found += [*kept, *(SurgeGroup(group=next(fresh), reason=need.reason) for _ in missing)]
    return tuple(sorted(found, key=lambda one: one.group))
