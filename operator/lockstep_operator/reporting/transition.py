"""What a pass has changed (pure): the status before and after it, and all that is worth reporting in between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from lockstep_operator.decisions import node_suspicion
from lockstep_operator.decisions.actions import Action, MakeTokens
from lockstep_operator.decisions.node_suspicion import NodeFault
from lockstep_operator.decisions.planner import Decision
from lockstep_operator.reporting import recovery_log
from lockstep_operator.reporting.assessment import assess
from lockstep_operator.reporting.conditions import Obstacle, conditions
from lockstep_operator.reporting.node_evidence import node_faults
from lockstep_operator.reporting.recovery_log import NewFault, Repair
from lockstep_operator.reporting.savings import savings
from lockstep_operator.reporting.summary import summarize
from lockstep_operator.types.model_status import ModelStatus
from lockstep_operator.types.spec import Model, deprecations


@dataclass(frozen=True, slots=True, kw_only=True)
class Transition:
    before: ModelStatus
    after: ModelStatus
    actions: Sequence[Action] = ()  # that were done and changed something
    faults: Sequence[NewFault] = ()
    repairs: Sequence[Repair] = ()
    node_faults: Sequence[NodeFault] = ()
    deprecated: Sequence[str] = ()  # sentences about fields of a spec that is new


def transition(
    model: Model,
    decision: Decision,
    before: ModelStatus,
    obstacle: Obstacle | None,
    actions: Sequence[Action],
    now: float,
) -> Transition:
    """`obstacle` keeps the operator from doing what the spec asks; `now` is unix seconds."""
    groups = [assess(model, facts, decision.recoveries.get(facts.group.index), now) for facts in decision.groups]
    by_operator = [repair for one in groups if (repair := recovery_log.operator_repair(one, now))]
    values = conditions(model, decision, groups, obstacle, before)
    on_nodes = node_faults(groups, now)
    after = replace(
        summarize(model, decision, groups, by_operator, values, before, now),
        savings=savings(before.savings, groups, now),
        node_faults=node_suspicion.remembered(before.node_faults or (), on_nodes, now) or None,
        tokens=next((action.made for action in actions if isinstance(action, MakeTokens)), before.tokens),
    )
    return Transition(
        before=before,
        after=after,
        actions=actions,
        deprecated=deprecations(model) if model.generation != before.observed_generation else (),
        faults=[fault for one in groups for fault in recovery_log.new_faults(one)],
        repairs=[*(repair for one in groups for repair in recovery_log.completed_repairs(one, now)), *by_operator],
        node_faults=on_nodes,
    )
