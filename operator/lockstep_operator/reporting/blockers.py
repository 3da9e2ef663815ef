"""Why a group doesn't serve, in a sentence that a person can act on (pure)."""

from __future__ import annotations

from dataclasses import dataclass

from lockstep_operator.groups import group_view
from lockstep_operator.groups.facts import GroupFacts
from lockstep_operator.types.reasons import Reason
from lockstep_runtime.protocol.status import Download, GroupState, GroupStatus


@dataclass(frozen=True, slots=True)
class Blocker:
    """`stalled`: it won't resolve by itself."""

    reason: str
    message: str
    stalled: bool = False


def find_blocker(facts: GroupFacts, remedy: str, size: int, *, given_up: bool) -> Blocker:
    """Of a group of `size` ranks that doesn't serve. `remedy` is what recovery does about it, empty if nothing;
    `given_up`: it needs a person."""
    return _with_process_failure(facts, _explain(facts, given_up, remedy, size))


def load_failure(status: GroupStatus) -> str:
    worded = [rank for rank in group_view.failed_ranks(status) if rank.message]
    if worded:
        return f"rank {worded[0].rank} can't load the model: {worded[0].message}"
    return status.message or "the model can't be loaded"


def _with_process_failure(facts: GroupFacts, blocker: Blocker) -> Blocker:
    """What failed within its pods is the likely reason why it doesn't come up."""
    failure = facts.process_failure
    if failure is None or failure.message in blocker.message:
        return blocker
    vague = blocker.reason in (Reason.STARTING, Reason.LOADING, Reason.UNREACHABLE)
    if vague:
        return Blocker(failure.reason, f"{failure.message}; {blocker.message}", blocker.stalled)
    return Blocker(blocker.reason, f"{blocker.message}; {failure.message}", blocker.stalled)


def _explain(facts: GroupFacts, given_up: bool, remedy: str, size: int) -> Blocker:
    group, status, issue = facts.group, facts.view.status, facts.issue
    name = f"group {group.index}"
    if issue:
        text = _joined(issue.message, remedy if issue.heals else "")
        return Blocker(issue.reason, text, given_up and issue.heals)
    if not group.exists or group.deleting:
        return Blocker(Reason.STARTING, f"{name} is being created")
    if group.strays and not group.pods:
        return Blocker(Reason.STARTING, f"{name} waits until {group.strays} older pods of the same names have ended")
    if status is None:
        return _unheard(facts, given_up, remedy, name)
    if group_view.failed_to_load(status):
        return Blocker(Reason.MODEL_LOAD_FAILED, f"{name}: {load_failure(status)}", stalled=not status.may_pass)
    if status.state is GroupState.POISONED:
        return _poisoned(status, given_up, remedy, name)
    if remedy and given_up:  # a late try is under way: until it has helped, it needs a person
        return Blocker(Reason.RECOVERY_EXHAUSTED, remedy, stalled=True)
    if remedy and status.state in (GroupState.READY, GroupState.RECOVERING):  # for too long, by its own report
        return Blocker(Reason.RECOVERING, remedy)
    return _by_state(status, name, size)


def _unheard(facts: GroupFacts, given_up: bool, remedy: str, name: str) -> Blocker:
    group, unreachable = facts.group, facts.view.unreachable_reason
    if unreachable:
        return Blocker(Reason.UNREACHABLE, _joined(unreachable, remedy), given_up)
    running = sum(pod.phase == "Running" and pod.deleting is None for pod in group.pods)
    text = f"{running} of {group.wanted} pods of {name} run; its first pod hasn't reported yet"
    return Blocker(Reason.STARTING, _joined(text, remedy), given_up)


def _poisoned(status: GroupStatus, given_up: bool, remedy: str, name: str) -> Blocker:
    """Progress, as long as the operator has a remedy."""
    text = remedy or f"{name} can't serve and can't recover by itself{f': {status.message}' if status.message else ''}"
    return Blocker(Reason.RECOVERY_EXHAUSTED if given_up else Reason.POISONED, text, given_up)


def _by_state(status: GroupStatus, name: str, size: int) -> Blocker:
    text = f": {status.message}" if status.message else ""
    match status.state:
        case GroupState.RECOVERING:
            return Blocker(Reason.RECOVERING, f"{name} recovers{text}")
        case GroupState.DRAINING:
            return Blocker(Reason.DRAINING, f"{name} finishes its requests{text}")
        case GroupState.LOADING if group_view.loaded(status, size):
            return Blocker(Reason.LOADING, status.message or f"{name} holds its weights")
        case GroupState.LOADING if status.download:
            return Blocker(Reason.LOADING, f"{name} downloads the model: {_downloaded(status.download)}")
        case GroupState.LOADING:
            return Blocker(Reason.LOADING, f"{name} has read {group_view.progress(status)} % of its weights")
        case GroupState.READY:
            return Blocker(Reason.STARTING, f"{name} has joined its {size} ranks and is about to accept requests")
        case _:
            return Blocker(Reason.STARTING, f"{name} waits for its {size} ranks{text}")


def _downloaded(download: Download) -> str:
    """In few steps: each is written to the status."""
    size, unit = (1e9, "GB") if download.total >= 1e9 else (1e6, "MB")
    rate = f" at {download.rate / 1e6:.3g} MB/s" if download.rate else ""
    return f"{download.percent} % of {download.total / size:.1f} {unit}{rate}"


def _joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)
