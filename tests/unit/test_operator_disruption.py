"""Whose pods a label selector means, which nodes are to be emptied, and whom that concerns."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest
from tests.support.operator_models import NOW, group, model, pod

from lockstep_operator.cluster.indexes import Indexes, leaves
from lockstep_operator.decisions import evacuation
from lockstep_operator.decisions.disruption import selected
from lockstep_operator.groups.group import Group
from lockstep_operator.types.intervention import Intervention, parse_intervention
from lockstep_operator.types.model_status import ModelStatus, SurgeGroup, SurgeReason
from lockstep_operator.types.names import ModelKey
from lockstep_operator.types.observed import Observed

LABELS = {"lockstep.dev/model": "chat", "lockstep.dev/group": "0"}


def term(operator: str, *values: str, key: str = "lockstep.dev/group") -> dict[str, Any]:
    return {"matchExpressions": [{"key": key, "operator": operator, **({"values": [*values]} if values else {})}]}


@pytest.mark.parametrize(
    ("selector", "means_it"),
    [
        (None, False),
        ({}, True),
        ({"matchLabels": {"lockstep.dev/model": "chat"}}, True),
        ({"matchLabels": {"lockstep.dev/model": "chat", "app": "web"}}, False),
        (term("In", "0", "1"), True),
        (term("In", "1"), False),
        (term("NotIn", "1"), True),
        (term("NotIn", "0"), False),
        (term("NotIn", "0", key="app"), True),
        (term("Exists"), True),
        (term("Exists", key="app"), False),
        (term("DoesNotExist", key="app"), True),
        (term("DoesNotExist"), False),
    ],
)
def test_a_selector_means_pods_as_the_api_server_has_it(selector: dict[str, Any] | None, means_it: bool) -> None:
    assert selected(selector, LABELS) is means_it


@pytest.mark.parametrize(
    ("spec", "to_be_emptied"),
    [
        ({}, False),
        ({"unschedulable": True}, True),
        ({"taints": [{"key": "example.com/gpu", "effect": "NoSchedule"}]}, False),
        ({"taints": [{"key": "karpenter.sh/disrupted", "effect": "NoSchedule"}]}, True),
        ({"taints": [{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}]}, True),
    ],
)
def test_nodes_that_are_to_be_emptied(spec: dict[str, Any], to_be_emptied: bool) -> None:
    assert leaves({"spec": spec}) is to_be_emptied


def test_a_cordon_is_news_once_and_for_models_with_pods_there() -> None:
    indexes, chat, code = Indexes(), ModelKey("team", "chat"), ModelKey("team", "code")
    placed: dict[ModelKey, list[dict[str, Any]]] = {chat: [{"nodeName": "a"}, {}], code: [{"nodeName": "b"}]}
    pods = {key: [msgspec.json.encode({"spec": spec}) for spec in specs] for key, specs in placed.items()}
    indexes.bind({"Pod": pods})
    assert [indexes.heard_of_node("a", leaves=it) for it in (False, True, True)] == [False, True, False]
    assert (indexes.leaving_nodes, indexes.on_node("a")) == (frozenset({"a"}), {chat})
    assert indexes.heard_of_node("a", leaves=False)
    assert indexes.leaving_nodes == frozenset()


def observed(*surge: int) -> Observed:
    known = tuple(SurgeGroup(group=index, reason=SurgeReason.EVACUATION) for index in surge)
    return Observed(status=ModelStatus(surge=known), resource_version="1", children={}, leaving_nodes=frozenset({"a"}))


def on(node: str, index: int = 0, **fields: Any) -> Group:
    raw: dict[str, Any] = {"metadata": fields.pop("metadata", {}), "spec": {"nodeName": node, **fields}, "status": {}}
    return replace(group(index), pods=(pod(index, 0, raw=raw), pod(index, 1)))


@pytest.mark.parametrize(
    ("made", "leaving"),
    [
        (on("b"), ""),
        (on("a"), "node a of pod chat-0-0 is cordoned"),
        (on("a", tolerations=[{"operator": "Exists"}]), ""),
        (on("a", tolerations=[{"key": "example.com/gpu", "operator": "Exists"}]), "node a of pod chat-0-0 is cordoned"),
        (
            on("b", metadata={"annotations": {"lockstep.dev/evacuate": "true"}}),
            "pod chat-0-0 has the annotation lockstep.dev/evacuate",
        ),
        (on("b", metadata={"annotations": {"lockstep.dev/evacuate": "false"}}), ""),
        (replace(on("a"), pods=(pod(ready=False, raw=on("a").pods[0].raw), pod(0, 1))), ""),  # it has nothing to lose
    ],
)
def test_who_must_leave(made: Group, leaving: str) -> None:
    found = evacuation.decide(model(), observed(), [made], (), NOW)
    assert found.leaving == ({0: leaving} if leaving else {})
    assert (found.need.start, found.moves) == (bool(leaving), ())


def test_a_pod_goes_when_a_group_stands_in_and_the_others_stay() -> None:
    found = evacuation.decide(model(), observed(1), [on("a"), group(1)], (), NOW)
    assert [move.name for move in found.moves] == ["chat-0-0"]
    assert found.moves[0].reason == ("node a of pod chat-0-0 is cordoned: it goes, since group 1 stands in for group 0")
    assert evacuation.decide(model(), observed(1), [on("a"), group(1, ready=False)], (), NOW).moves == ()
    others = [on("a"), group(1, ready=False), group(2)]
    assert evacuation.decide(model(replicas=2), observed(2), others, (), NOW).moves == (), "one is down already"
    fenced = model(intervention=Intervention(fenced=frozenset({0})))
    assert evacuation.decide(fenced, observed(1), [on("a"), group(1)], (), NOW).leaving == {}


def test_it_is_overdue_when_nobody_could_stand_in_for_long_or_ever_can() -> None:
    waiting = [on("a"), group(1, ready=False)]
    made_at = 1_800_000_000.0
    assert not evacuation.decide(model(progress_deadline=1e9), observed(1), waiting, (), made_at).overdue
    assert evacuation.decide(model(progress_deadline=1.0), observed(1), waiting, (), made_at).overdue
    assert evacuation.decide(model(progress_deadline=1e9), observed(1), waiting, {1}, made_at).overdue


@pytest.mark.parametrize(
    ("annotations", "found"),
    [
        ({}, Intervention()),
        ({"lockstep.dev/paused": "true"}, Intervention(paused=True)),
        ({"lockstep.dev/paused": "false", "lockstep.dev/fenced-groups": ""}, Intervention()),
        ({"lockstep.dev/fenced-groups": "1, 3"}, Intervention(fenced=frozenset({1, 3}))),
    ],
)
def test_annotations_take_things_out_of_the_operators_hands(annotations: dict[str, str], found: Intervention) -> None:
    assert parse_intervention(annotations) == found
