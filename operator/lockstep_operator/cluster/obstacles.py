"""What keeps the operator itself from doing what the spec asks."""

from __future__ import annotations

from lockstep_operator.cluster.failures import Failures
from lockstep_operator.decisions.planner import Decision
from lockstep_operator.reporting.conditions import Obstacle
from lockstep_operator.types.model_status import ModelStatus
from lockstep_operator.types.reasons import Reason
from lockstep_operator.types.spec import Model
from lockstep_operator.types.timestamps import format_rfc3339


def find_obstacle(
    model: Model, decision: Decision, failures: Failures, before: ModelStatus, now: float
) -> Obstacle | None:
    """None if nothing does. `before` is the status as last written."""
    if model.flaw:
        return Obstacle(Reason.INVALID_SPEC, model.flaw, stalled=True)
    if decision.bugs:
        return Obstacle(Reason.OPERATOR_ERROR, "; ".join(bug.sentence for bug in decision.bugs[:3]), stalled=True)
    if failures.refused:
        return Obstacle(Reason.REFUSED, failures.refused, stalled=True)
    retrying = failures.retrying(before)
    if retrying is None:
        return None
    if now - retrying.since < model.progress_deadline:
        return Obstacle(Reason.RETRYING, retrying.sentence, stalled=False)
    text = f"{retrying.sentence}; nothing has moved since {format_rfc3339(retrying.since)}"
    return Obstacle(Reason.PROGRESS_DEADLINE_EXCEEDED, text, stalled=True)
