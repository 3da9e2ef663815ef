"""The CRD as a document: every field described, defaults only where the API server needs them, and the fields that the
operator writes.

What the API server makes of its rules is tested on the cluster.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml
from tests.support.chart import CRD_SOURCE
from tests.support.kube_world import World, well

from lockstep_operator.cluster.served_schema import WRITTEN
from lockstep_operator.types.documents import write
from lockstep_operator.types.model_status import (
    NodeFaults,
    PinnedModel,
    ProcessFailure,
    Rollback,
    SurgeGroup,
    SurgeReason,
    Waiting,
)
from lockstep_operator.types.names import GROUP, KIND, PLURAL, VERSION
from lockstep_operator.types.observed import GroupReport
from lockstep_operator.types.recovery_state import RecoveryAction, RecoveryState, Rung, to_status
from lockstep_runtime.protocol.status import Fault, FaultRecord, Latency

CRD: dict[str, Any] = yaml.safe_load(CRD_SOURCE.read_text())
SERVED = CRD["spec"]["versions"][0]
SCHEMA = SERVED["schema"]["openAPIV3Schema"]


def fields(path: str, schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, field in schema.get("properties", {}).items():
        yield f"{path}.{name}", field
        yield from fields(f"{path}.{name}", field)
    if "items" in schema:
        yield from fields(f"{path}[]", schema["items"])


def test_it_has_the_names_that_the_operator_uses() -> None:
    assert CRD["metadata"]["name"] == f"{PLURAL}.{GROUP}"
    assert (CRD["spec"]["names"]["kind"], CRD["spec"]["names"]["shortNames"], SERVED["name"]) == (
        KIND,
        ["tpm"],
        VERSION,
    )


def test_every_field_is_described() -> None:
    undescribed = [path for path, field in fields("", SCHEMA) if not field.get("description") and path != ".metadata"]
    assert undescribed == []


def test_only_what_the_scale_subresource_reads_has_a_default() -> None:
    defaults = {path: field["default"] for path, field in fields("", SCHEMA) if "default" in field}
    assert defaults == {SERVED["subresources"]["scale"]["specReplicasPath"]: 1}


def test_every_rule_says_in_words_what_to_change() -> None:
    rules = [
        rule for _, field in [("", SCHEMA), *fields("", SCHEMA)] for rule in field.get("x-kubernetes-validations", [])
    ]
    assert len(rules) >= 10
    assert all(len(rule["message"].split()) >= 6 for rule in rules)


def test_the_columns_are_the_ones_that_people_look_at() -> None:
    shown = [column["name"] for column in SERVED["additionalPrinterColumns"] if not column.get("priority")]
    assert shown == ["Groups", "Ready", "Available", "Ranks", "Reason", "Recoveries", "Last fault", "Age"]
    assert SERVED["subresources"]["scale"]["labelSelectorPath"] == ".status.selector"


async def test_the_schema_keeps_every_field_of_the_status_that_the_operator_writes() -> None:
    world = World()
    key = world.add()
    fault = FaultRecord(
        id=1,
        fault=Fault.HANG,
        rank=1,
        message="stopped",
        at=world.time,
        epoch=1,
        rung="Rebuild",
        recovered_at=world.time,
        phases={"detect": 0.5},
    )
    latency = Latency(p50_ms=1.0, p99_ms=2.0)
    said = well(key, 0, "inc", "new")
    ranks = [type(rank)(**{name: getattr(rank, name) for name in rank.__struct_fields__} | {
        "step_latency": latency, "last_step_at": world.time, "message": "well"}) for rank in said.ranks]  # fmt: skip
    whole = type(said)(**{name: getattr(said, name) for name in said.__struct_fields__} | {
        "faults": [fault], "step_latency": latency, "last_step_at": world.time, "ranks": ranks})  # fmt: skip
    world.groups.said[key, 0] = GroupReport(status=whole)
    await world.settle(key)
    plan = RecoveryAction(
        rung=Rung.MOVE_AWAY, trigger="inc/2", fault="Hang", rank=1, reason="stopped", pods=("uid",), since=world.time,
        noticed=world.time,
    )  # fmt: skip
    everything = RecoveryState(
        action=plan, attempts_used={Rung.MOVE_AWAY: 1}, failures=1, next_try=world.time, healthy_since=world.time,
        node_fault_counts={"n1": 1}, avoided={"n1": world.time},
    )  # fmt: skip
    status: dict[str, Any] = dict(world.status(key))
    waits = write(Waiting("Unschedulable", world.time, "new"))
    complains = write(ProcessFailure("OutOfMemory", "pod chat-0-1 was killed", world.time))
    pin = write(PinnedModel(source="corp", repo="a/b", revision="v1", resolve_revision_at=world.time, commit="c" * 40))
    held = write(NodeFaults(name="node-1", faults=2, fault="Desync", time=world.time))
    status |= {"model": pin, "nodeFaults": [held]}
    status["rollback"] = write(Rollback(revision="0123456789", shape="0123456789abcdef"))
    status["surge"] = [write(SurgeGroup(group=2, reason=SurgeReason.ROLLOUT))]
    more = {"recovery": to_status(everything), "waiting": waits, "podProblem": complains, "startSeconds": 3.0}
    status["groups"] = [status["groups"][0] | more]
    assert status["lastFault"]["rung"] == "Rebuild"
    assert status["lastRecovery"].pop("phases") == {"detect": 0.5}  # whose names are free
    assert list(unknown("status", status, SCHEMA["properties"]["status"])) == []
    written = set(paths("", status))
    known = {path.removeprefix(".status") for path, _ in fields("", SCHEMA) if path.startswith(".status.")}
    assert known - {".lastRecovery.phases"} == written
    checked = {"." + ".".join(path[1:]) for path in WRITTEN if path != ("status",)}
    assert {path.replace("[]", "") for path in known} == checked, "what is compared with the served CRD"


def unknown(path: str, value: Any, schema: dict[str, Any]) -> Iterator[str]:
    """Fields that the API server would drop."""
    if isinstance(value, dict):
        for name, item in value.items():
            if name not in schema["properties"]:
                yield f"{path}.{name}"
            else:
                yield from unknown(f"{path}.{name}", item, schema["properties"][name])
    elif isinstance(value, list):
        for item in value:
            yield from unknown(f"{path}[]", item, schema["items"])


def paths(path: str, value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield f"{path}.{name}"
            yield from paths(f"{path}.{name}", item)
    elif isinstance(value, list):
        for item in value:
            yield from paths(f"{path}[]", item)
