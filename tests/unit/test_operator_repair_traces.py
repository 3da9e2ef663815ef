"""The operator's repairs as a real OTLP receiver gets them, and what their parts are."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.support.collector import attributes, collecting, seconds
from tests.support.operator_models import NOW, group
from tests.support.wait import until

from lockstep_operator import tracing
from lockstep_operator.reporting.recovery_log import Repair, Step, steps_of
from lockstep_operator.types.names import ModelKey
from lockstep_operator.types.observed import Pod
from lockstep_operator.types.recovery_state import RecoveryAction, Rung
from lockstep_operator.types.timestamps import format_rfc3339
from lockstep_runtime.protocol.status import Fault, FaultRecord
from lockstep_runtime.protocol.trace_ids import recovery_ids

KEY = ModelKey("team", "chat")
VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_SERVICE_NAME", "OTEL_TRACES_EXPORTER")
RECORD = FaultRecord(id=3, fault=Fault.HANG, rank=1, message="it hangs", at=NOW - 20.25, epoch=4)
STEPS = (
    Step("detect", NOW - 20, NOW - 12),
    Step("delete", NOW - 12, NOW - 10),
    Step("start", NOW - 10, NOW - 7),
    Step("load", NOW - 7, NOW),
)
REPAIR = Repair(
    group=1, fault="Hang", rank=1, rung="RecyclePod", noticed=NOW - 20, finished=NOW, resumed=2, steps=STEPS,
    record=RECORD,
)  # fmt: skip


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


async def test_a_repair_is_a_trace_with_its_steps_and_linked_to_the_groups_own() -> None:
    with collecting() as collector:
        made = await tracing.begun(collector.url, "operator-1")
        unlinked = replace(REPAIR, rung="RecycleGroup", rank=None, record=None)
        made.tell(KEY, [REPAIR, unlinked, replace(REPAIR, rung="Respawn", steps=())])
        await made.close()
        [span] = until("the repair", lambda: collector.named("repair RecyclePod"), 10)
        [other] = collector.named("repair RecycleGroup")
        assert collector.named("repair Respawn") == [], "that is the group's to tell"
        assert {name: seconds(part) for name, part in collector.children(span).items()} == {
            "detect": 8, "delete": 2, "start": 3, "load": 7,
        }  # fmt: skip
        assert seconds(span) == 20
        said = attributes(iter(span.attributes))
        assert (said["k8s.namespace.name"], said["lockstep.model"], said["lockstep.group"]) == ("team", "chat", 1)
        assert (said["lockstep.fault.type"], said["lockstep.fault.rank"]) == ("Hang", 1)
        [link] = span.links
        ids = int.from_bytes(link.trace_id), int.from_bytes(link.span_id)
        assert ids == recovery_ids("chat", 1, RECORD)
        assert not other.links
        assert collector.resources[-1]["service.name"] == "lockstep-operator"


async def test_without_a_collector_nobody_listens() -> None:
    made = await tracing.begun(None, "operator-1")
    made.tell(KEY, [REPAIR])
    await made.close()
    assert made == tracing.Tracing()


def pod(index: int, created: float, started: float | None) -> Pod:
    running = {} if started is None else {"running": {"startedAt": format_rfc3339(started)}}
    raw = {"metadata": {}, "status": {"containerStatuses": [{"name": "lockstep", "state": running}]}}
    return replace(group().pods[index], created=created, raw=raw, phase="Running")


def test_the_steps_are_told_apart_by_the_new_pods_times() -> None:
    action = RecoveryAction(
        rung=Rung.RECYCLE_POD, trigger="inc/3", fault="Hang", reason="", pods=(), since=NOW - 12.5, noticed=NOW - 20
    )
    stays, new = pod(0, NOW - 900, NOW - 890), pod(1, NOW - 10, NOW - 7)
    assert [(one.name, one.end - one.start) for one in steps_of(action, (stays, new), NOW)] == [
        ("detect", 7.5), ("delete", 2.5), ("start", 3), ("load", 7),
    ]  # fmt: skip
    unknown = steps_of(action, (stays,), NOW)
    assert [one.end - one.start for one in unknown] == [7.5, 0, 0, 12.5]
    ahead = steps_of(action, (pod(1, NOW + 60, NOW + 70),), NOW)
    assert ahead[-1].end == NOW, "whatever the node's clock says"
