"""What is held against nodes, by which evidence, and who acts on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import msgspec
import pytest
from prometheus_client import generate_latest
from tests.support.kube_watch import KubeWatch
from tests.support.kube_world import World, well
from tests.support.operator_models import NOW, group, model, pass_of

from lockstep_operator.cluster.client import KubeError
from lockstep_operator.cluster.node_conditions import LEARNING_SECONDS, NodeConditions
from lockstep_operator.decisions.node_suspicion import (
    REMEMBERED_NODES,
    SUSPICION_SECONDS,
    NodeFault,
    remembered,
    shared,
    suspects,
)
from lockstep_operator.decisions.recovery_policy import RecoveryInput, decide
from lockstep_operator.groups.group import Group
from lockstep_operator.reconcile import Reconciler
from lockstep_operator.reporting.document import document
from lockstep_operator.reporting.events import event_drafts, manifest
from lockstep_operator.reporting.metrics import NAMED_NODES, Metrics
from lockstep_operator.reporting.transition import Transition
from lockstep_operator.types.model_status import NodeFaults, parse
from lockstep_operator.types.names import ModelKey
from lockstep_operator.types.observed import GroupReport, Object, Observed
from lockstep_operator.types.recovery_state import RecoveryAction, RecoveryState, Rung
from lockstep_operator.types.spec_blocks import RecoverySpec
from lockstep_runtime.protocol.status import Fault, FaultRecord, GroupState

KEY = ModelKey("team", "chat")


def repaired(number: int = 1, kind: Fault = Fault.DESYNC, **fields: Any) -> FaultRecord:
    record = FaultRecord(
        id=number, fault=kind, rank=1, message="other numbers", at=NOW - 30, epoch=number, rung="Respawn",
        recovered_at=NOW - 29, phases={"detect": 0.5},
    )  # fmt: skip
    return msgspec.structs.replace(record, **fields)


def placed(**fields: Any) -> Group:
    """Pod 0 on node-1 and pod 1 on node-2."""
    made = group()
    pods = tuple(
        replace(pod, raw={"metadata": {}, "spec": {"nodeName": f"node-{pod.index + 1}"}, "status": {}}, **fields)
        for pod in made.pods
    )
    return replace(made, pods=pods)


def look(old: Mapping[str, Any], *faults: FaultRecord, seen: Group | None = None) -> Transition:
    report = msgspec.structs.replace(well(KEY, 0, "inc", "new"), faults=[*faults], recoveries=len(faults))
    reports = {0: GroupReport(status=report)}
    observed = Observed(status=parse(old), resource_version="1", children={}, reports=reports)
    return pass_of(model(), observed, seen or placed())


def held(seen: Transition) -> dict[str, int]:
    return {one.name: one.faults for one in seen.after.node_faults or ()}


@pytest.mark.parametrize("kind", [Fault.HANG, Fault.RANK_LOST, Fault.DESYNC, Fault.CORRUPTION, Fault.NON_FINITE])
def test_a_fault_is_held_against_the_node_of_the_rank_that_is_named(kind: Fault) -> None:
    assert held(look({}, repaired(kind=kind))) == {"node-2": 1}


@pytest.mark.parametrize(
    "innocent",
    [
        repaired(rank=None),
        repaired(kind=Fault.STEP_FAILED),
        repaired(rung="Drop"),
        repaired(recovered_at=None, rung=""),
    ],
    ids=["nobody named", "a step that raised", "a request was refused", "not repaired yet"],
)
def test_innocents_are_left_alone(innocent: FaultRecord) -> None:
    assert held(look({}, innocent)) == {}


def test_a_pod_that_did_not_outlive_the_fault_was_taken_away() -> None:
    assert held(look({}, repaired(), seen=placed(created=NOW - 10))) == {}
    assert held(look({}, repaired(), seen=placed(deleting=NOW + 5))) == {}


def test_a_pod_whose_image_was_still_pulled_had_no_part_in_the_fault() -> None:
    made = placed()

    def begun(at: str, restarts: int) -> Group:
        state = {"name": "lockstep", "restartCount": restarts, "state": {"running": {"startedAt": at}}}
        raw = {"metadata": {}, "spec": {"nodeName": "node-2"}, "status": {"containerStatuses": [state]}}
        return replace(made, pods=(made.pods[0], replace(made.pods[1], raw=raw)))

    assert held(look({}, repaired(kind=Fault.RANK_LOST), seen=begun("2027-01-15T07:59:50Z", 0))) == {}
    assert held(look({}, repaired(kind=Fault.RANK_LOST), seen=begun("2027-01-15T07:59:50Z", 1))) == {"node-2": 1}
    assert held(look({}, repaired(kind=Fault.RANK_LOST), seen=begun("2027-01-15T07:50:00Z", 0))) == {"node-2": 1}


def test_memory_that_the_pod_may_not_use_is_no_fault_of_the_node() -> None:
    killed = {"terminated": {"reason": "OOMKilled", "exitCode": 137, "finishedAt": "2027-01-15T07:59:31Z"}}
    made = placed()
    status = {"containerStatuses": [{"name": "lockstep", "restartCount": 1, "lastState": killed}]}
    raw = {"metadata": {}, "spec": {"nodeName": "node-2"}, "status": status}
    short = replace(made, pods=(made.pods[0], replace(made.pods[1], raw=raw)))
    seen = look({}, repaired(kind=Fault.RANK_LOST), seen=short)
    assert seen.after.groups[0].pod_problem is not None
    assert held(seen) == {}


def test_each_fault_is_held_once() -> None:
    first = look({}, repaired())
    again = look(document(first.after), repaired(), repaired(2))
    assert held(again) == {"node-2": 2}
    assert held(look(document(again.after), repaired(), repaired(2))) == {"node-2": 2}


def test_a_fault_that_the_group_could_not_repair_counts_with_the_step_that_answers_it() -> None:
    report = msgspec.structs.replace(
        well(KEY, 0, "inc", "new"),
        state=GroupState.POISONED,
        since=NOW - 5,
        faults=[repaired(recovered_at=None, rung="")],
    )
    seen = replace(placed(), pods=tuple(replace(pod, ready=False) for pod in placed().pods))
    reports = {0: GroupReport(status=report)}
    known = RecoveryInput(seed="s", group=seen, state=RecoveryState(), report=reports[0])
    decision = decide(RecoverySpec(), known, NOW)
    observed = Observed(status=parse({}), resource_version="1", children={}, reports=reports)
    found = pass_of(model(), observed, seen, recoveries={0: decision})
    assert held(found) == {"node-2": 1}
    after = Observed(status=parse(document(found.after)), resource_version="2", children={}, reports=reports)
    assert held(pass_of(model(), after, seen, recoveries={0: decision})) == {"node-2": 1}


def test_the_node_gets_an_event_of_its_own() -> None:
    [draft] = [draft for draft in event_drafts(look({}, repaired())) if draft.node]
    event = manifest(KEY, "uid-m", draft, NOW)
    assert event["metadata"]["namespace"] == "default"
    assert event["involvedObject"] == {"apiVersion": "v1", "kind": "Node", "name": "node-2", "uid": "node-2"}
    assert (event["type"], event["reason"]) == ("Warning", "Desync")
    assert event["message"] == "team/chat: Desync in pod chat-0-1 (group 0, rank 1), repaired by Respawn"


def test_suspicion_is_of_the_last_hour_and_bounded() -> None:
    many = [
        NodeFault(node=f"n{number}", fault="Hang", key="", sentence="", at=NOW + number)
        for number in range(REMEMBERED_NODES + 4)
    ]
    kept = remembered((), many, NOW)
    assert [one.name for one in kept] == [f"n{number}" for number in range(4, REMEMBERED_NODES + 4)]
    assert remembered(kept, (), NOW + SUSPICION_SECONDS + REMEMBERED_NODES + 4) == ()


def test_all_models_evidence_adds_up_but_not_that_of_one_who_blames_everybody() -> None:
    def against(*nodes: str) -> list[NodeFaults]:
        return [NodeFaults(name=node, faults=1, fault="Hang", time=NOW) for node in nodes]

    faults = shared([against("a"), against("a", "b"), against("a", "b", "c", "d")], NOW)
    assert faults == {"a": 2, "b": 1}
    assert suspects(faults) == ["a"]


def test_another_models_faults_make_the_group_move_and_avoid_other_suspects() -> None:
    unwell = replace(placed(), pods=tuple(replace(pod, ready=False) for pod in placed().pods))
    fault = repaired(recovered_at=None, rung="")
    status = msgspec.structs.replace(
        well(KEY, 0, "inc", "new"), state=GroupState.POISONED, since=NOW - 400, faults=[fault]
    )
    failed = RecoveryAction(
        rung=Rung.RECYCLE_GROUP, trigger="earlier", fault="Hang", rank=1, reason="", pods=(), since=NOW - 300,
        noticed=NOW - 310,
    )  # fmt: skip
    known = RecoveryInput(seed="s", group=unwell, state=RecoveryState(action=failed), report=GroupReport(status=status))
    alone = decide(RecoverySpec(), known, NOW).state.action
    assert alone is not None
    assert alone.rung is Rung.RECYCLE_GROUP
    told = decide(RecoverySpec(), replace(known, suspicion={"node-2": 1, "node-9": 3, "node-5": 1}), NOW).state
    assert told.action is not None
    assert told.action.rung is Rung.MOVE_AWAY
    assert sorted(told.avoided) == ["node-2", "node-9"]
    assert "and from node-9, where ranks of other groups failed" in told.action.reason


def test_the_metric_names_a_bounded_number_of_nodes() -> None:
    metrics = Metrics()
    metrics.node_faults(
        NodeFault(node=f"n{number}", fault="Hang", key="", sentence="", at=NOW) for number in range(NAMED_NODES + 5)
    )
    text = generate_latest(metrics.registry).decode()
    assert 'lockstep_node_faults_total{fault="Hang",node="n0"} 1.0' in text
    assert 'lockstep_node_faults_total{fault="Hang",node="others"} 5.0' in text


class Nodes:
    """An API server's nodes: server-side apply of a condition, by its type."""

    def __init__(self, *names: str) -> None:
        self.conditions: dict[str, dict[str, Object]] = {name: {} for name in names}
        self.requests: list[str] = []

    async def request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] = MappingProxyType({}),
        body: Object | None = None,
        content: str = "application/json",
    ) -> Object:
        self.requests.append(f"{method} {path}")
        if method == "get":
            return {
                "items": [
                    {"metadata": {"name": name}, "status": {"conditions": [*conditions.values()]}}
                    for name, conditions in self.conditions.items()
                ]
            }
        assert (method, content, query["force"]) == ("patch", "application/apply-patch+yaml", "true")
        name = path.split("/")[4]
        if name not in self.conditions:
            raise KubeError(404, "NotFound", f'nodes "{name}" not found')
        assert body is not None
        for condition in body["status"]["conditions"]:
            self.conditions[name][condition["type"]] = condition
        return body

    def suspect(self) -> dict[str, str]:
        return {name: found["LockstepSuspect"]["status"] for name, found in self.conditions.items() if found}


async def test_a_suspect_node_gets_its_condition_and_loses_it_and_nothing_is_asked_at_rest() -> None:
    nodes, faults, now = Nodes("a", "b"), {"a": 2, "b": 1, "gone": 5}, [NOW]
    conditions = NodeConditions(nodes, lambda: faults, lambda: now[0])
    await conditions.look()
    assert nodes.suspect() == {"a": "True"}
    asked = len(nodes.requests)
    await conditions.look()
    assert len(nodes.requests) == asked
    faults.clear()
    now[0] += LEARNING_SECONDS + 1
    await conditions.look()
    assert nodes.suspect() == {"a": "False"}


async def test_an_operator_that_starts_takes_back_what_an_earlier_one_left_but_not_before_it_knows() -> None:
    nodes, now = Nodes("a"), [NOW]
    await NodeConditions(nodes, lambda: {"a": 2}, lambda: now[0]).look()
    knows_all: list[bool] = []
    successor = NodeConditions(nodes, dict, lambda: now[0], lambda: bool(knows_all))
    await successor.look()
    assert nodes.suspect() == {"a": "True"}
    now[0] += LEARNING_SECONDS + 1
    await successor.look()
    assert nodes.suspect() == {"a": "True"}, "a model that was not looked at yet may hold faults against it"
    knows_all.append(True)
    await successor.look()
    assert nodes.suspect() == {"a": "False"}


async def test_an_operator_knows_all_models_when_it_has_looked_at_each() -> None:
    world = World()
    keys, watch = [world.add("a"), world.add("b")], KubeWatch(world.kube)
    reconciler = Reconciler(
        world.kube, world.groups, world.settings, Metrics(), lambda: world.time, world.key, indexes=watch.indexes
    )
    watch.catch_up()
    seen = []
    for key in keys:
        seen.append(reconciler.knows_all())
        await reconciler.reconcile(key)
    assert (seen, reconciler.knows_all()) == ([False, False], True)
