"""When the Secrets with a model's tokens are made (pure). Nobody may read them: what is known of them is in the status,
in what the kubelet says of a pod that lacks one, and in the answers of pods that know another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from lockstep_operator.decisions.actions import MakeTokens
from lockstep_operator.groups.facts import GroupFacts
from lockstep_operator.groups.group_view import REFUSED_SECONDS
from lockstep_operator.types.model_status import Tokens
from lockstep_operator.types.names import group_token_name, operator_token_name
from lockstep_operator.types.observed import Observed, Pod
from lockstep_operator.types.spec import Model

MISSED_SECONDS: Final = 60.0  # so long a kubelet may go on to miss a Secret that there is again
RIVAL_SECONDS: Final = 10.0  # between Secrets of two operators with keys of their own, where only one should be
AGAIN_SECONDS: Final = 1800.0  # between two Secrets for a pod that refuses the operator


def upkeep(model: Model, observed: Observed, groups: Sequence[GroupFacts], now: float) -> Iterator[MakeTokens]:
    """`now` is unix seconds."""
    made, named = observed.status.tokens, f"Secrets with the tokens of {model.key}"
    if made is None:
        yield _make(model, observed, now, f"{named} are made", groups_too=True)
    elif made.id != model.tokens_id:
        yield _make(model, observed, now, f"new {named} are made, as was asked for", groups_too=True)
    elif missing := _missing(model, observed, now - made.time):
        reason = f"{named} are made anew: pod {missing} can't start without one"
        yield _make(model, observed, now, reason, groups_too=True)
    elif reason := _stale(model, observed.operator_key, made, groups, now):
        secret = operator_token_name(model.name, model.tokens_id)
        yield _make(model, observed, now, f"Secret {secret} is made anew: {reason}", groups_too=False)


def _make(model: Model, observed: Observed, now: float, reason: str, *, groups_too: bool) -> MakeTokens:
    made = Tokens(key=observed.operator_key, id=model.tokens_id, time=now)
    return MakeTokens(group_token_name(model.name, model.tokens_id), made, reason, groups_too)


def _stale(model: Model, key: str, made: Tokens, groups: Iterable[GroupFacts], now: float) -> str:
    """Why the operator's must be another; empty where nobody knows why."""
    if made.key != key:
        return "the operator has another key" if now - made.time > RIVAL_SECONDS else ""
    refusing = _refusing(model, groups, now) if now - made.time > AGAIN_SECONDS else ""
    return f"pod {refusing} doesn't take the operator's token" if refusing else ""


def _missing(model: Model, observed: Observed, age: float) -> str:
    """A pod that waits for the group's. `age` of the Secret, as far as anybody knows."""
    secret = group_token_name(model.name, model.tokens_id)
    pods = observed.pods if age > MISSED_SECONDS else ()
    return next((pod.name for pod in pods if _misses(pod, secret)), "")


def _misses(pod: Pod, secret: str) -> bool:
    """By the kubelet's words for it."""
    waiting = ((container.get("state") or {}).get("waiting") or {} for container in pod.containers)
    return any(f'secret "{secret}" not found' in one.get("message", "") for one in waiting)


def _refusing(model: Model, groups: Iterable[GroupFacts], now: float) -> str:
    """A leader that has refused the operator for so long that its kubelet has brought it what the Secret holds."""
    for one in groups:
        leader, report = one.group.leader, one.report
        if leader is None or report is None or not report.refused or report.unreachable_since is None:
            continue
        if leader.tokens_id == model.tokens_id and now - report.unreachable_since > REFUSED_SECONDS:
            return leader.name
    return ""
