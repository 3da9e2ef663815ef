"""What the group says of itself, out of what the engine knows. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lockstep_runtime.engine.members import Member
from lockstep_runtime.wire import GroupState, RankState


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What decides the state. `model_error` is the leader's own: its model's configuration can't be read, or the api
    can't answer with this model; `poison` says why the group can't heal itself, `problem` what a pod complains of,
    `loading` what the api still reads."""

    formed: bool
    was_ready: bool
    draining: bool
    model_error: str
    poison: str = ""
    problem: str = ""
    loading: str = ""


def group_state(standing: Standing, members: Sequence[Member]) -> tuple[GroupState, str]:
    """The state and a sentence a person can act on."""
    if standing.draining:
        return GroupState.DRAINING, "asked to end; running requests are being finished"
    if standing.poison:
        return GroupState.POISONED, standing.poison
    failed = [member for member in members if member.state is RankState.FAILED]
    if standing.model_error or failed:
        return GroupState.FAILED, standing.model_error or failed[0].message
    if standing.formed and standing.loading:
        return GroupState.LOADING, f"all {len(members)} ranks are in step; {standing.loading}"
    if standing.formed:
        return GroupState.READY, f"all {len(members)} ranks are in step"
    missing = _names(members, RankState.ABSENT)
    because = f": {standing.problem}" if standing.problem else ""
    if standing.was_ready:
        waiting = f"waiting for {missing}{because}" if missing else f"the ranks are loaded or loading{because}"
        return GroupState.RECOVERING, f"{waiting}; requests wait and will be resumed"
    if missing:
        return GroupState.STARTING, f"waiting for {missing} to connect{because}"
    return GroupState.LOADING, _loading(members)


def is_accepting(state: GroupState, broken_lately: bool) -> bool:
    """Whether requests are taken: a short pause must not empty the Service, and a long one must."""
    return state is GroupState.READY or (state is GroupState.RECOVERING and broken_lately)


def _loading(members: Sequence[Member]) -> str:
    done = sum(member.load_done for member in members)
    total = sum(member.load_total for member in members)
    if all(member.loaded is not None for member in members):
        return "every rank is loaded; they are joining"
    return f"{done / 1e6:.0f} of {total / 1e6:.0f} MB of weights loaded" if total else "the ranks are starting to load"


def _names(members: Sequence[Member], state: RankState) -> str:
    ranks = [str(member.rank) for member in members if member.state is state]
    if not ranks:
        return ""
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(ranks)}"
