"""The group's state and message, from what the engine knows. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from lockstep_runtime.protocol.bus import LoadFailure
from lockstep_runtime.protocol.status import Download, GroupState, RankState
from lockstep_runtime.recovery.coordinator import Coordinator
from lockstep_runtime.recovery.rank_handle import RankHandle
from lockstep_runtime.recovery.stage import Stage
from lockstep_runtime.recovery.timing import MODEL_SECONDS


def group_state(
    group: Coordinator,
    now: float,
    *,
    draining: bool,
    blocker: str,
    problem: str = "",
    loading: str = "",
    leaving: str = "",
) -> tuple[GroupState, str]:
    """The state and a sentence a person can act on.

    `blocker`: the leader's own: its model's configuration can't be read, or the api can't answer with this model.
    `problem`: what a pod complains of. `loading`: what the api still reads.
    `leaving`: who was asked to end, without the leader.
    """
    handles = group.handles
    if draining:
        return GroupState.DRAINING, "asked to end; running requests are being finished"
    if group.poison:
        return GroupState.POISONED, group.poison
    failed = [one for one in handles if one.state is RankState.FAILED]
    if blocker or failed:
        return GroupState.FAILED, blocker or failed[0].message
    if group.stage is Stage.SERVING and loading:
        return GroupState.LOADING, f"all {len(handles)} ranks are in step; {loading}"
    if group.stage is Stage.SERVING and leaving:
        return GroupState.DRAINING, f"{leaving} must end; running requests are being finished"
    if group.stage is Stage.SERVING:
        return GroupState.READY, f"all {len(handles)} ranks are in step"
    if group.stage is Stage.WAITING and now - group.since >= MODEL_SECONDS:
        return GroupState.FAILED, f"the ranks are ready, but the leader could not read {group.model}'s config.json yet"
    missing = _names(handles, RankState.ABSENT)
    because = f": {problem}" if problem else ""
    if group.has_served:
        departed = all(one.is_released for one in handles if one.state is RankState.ABSENT)
        why = " of the pod in the place of the one that was asked to end" if departed else because
        waiting = f"waiting for {missing}{why}" if missing else f"the ranks are loaded or loading{because}"
        return GroupState.RECOVERING, f"{waiting}; requests wait and will be resumed"
    if missing:
        return GroupState.STARTING, f"waiting for {missing} to connect{because}"
    return GroupState.LOADING, _loading(handles)


def is_accepting(group: Coordinator, state: GroupState) -> bool:
    """Whether requests are taken: a short pause must not empty the Service, and a long one must."""
    return state is GroupState.READY or (state is GroupState.RECOVERING and group.accepting_until is not None)


def may_pass(handles: Sequence[RankHandle]) -> bool:
    """Whether the failed loads may resolve by themselves: no rank reports a permanent error."""
    failed = [one.load_failure for one in handles if one.state is RankState.FAILED]
    return bool(failed) and all(one is LoadFailure.TRANSIENT for one in failed)


def slowest_download(handles: Sequence[RankHandle]) -> Download | None:
    """Of the pods that still fetch the model."""
    found = [one.download for one in handles if one.download is not None]
    return min(found, key=lambda one: one.done / max(one.total, 1), default=None)


def _loading(handles: Sequence[RankHandle]) -> str:
    if download := slowest_download(handles):
        return f"{download.done / 1e6:.0f} of {download.total / 1e6:.0f} MB of the model are downloaded"
    done = sum(one.load_done for one in handles)
    total = sum(one.load_total for one in handles)
    if all(one.loaded is not None for one in handles):
        return "every rank is loaded; they are joining"
    return f"{done / 1e6:.0f} of {total / 1e6:.0f} MB of weights loaded" if total else "the ranks are starting to load"


def _names(handles: Sequence[RankHandle], state: RankState) -> str:
    ranks = [str(one.rank) for one in handles if one.state is state]
    if not ranks:
        return ""
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(ranks)}"
