"""Faults and repairs are told once each, and those of an absence when somebody is back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace
from prometheus_client import generate_latest
from tests.support.kube_world import well
from tests.support.operator_models import NOW, group, model, pass_of

from lockstep_operator.decisions.recovery_policy import RecoveryDecision
from lockstep_operator.reporting.document import document
from lockstep_operator.reporting.events import EventDraft, event_drafts, manifest
from lockstep_operator.reporting.metrics import Metrics
from lockstep_operator.reporting.recovery_log import Repair, Step
from lockstep_operator.reporting.transition import Transition
from lockstep_operator.types.model_status import Condition, ModelStatus, parse
from lockstep_operator.types.names import ModelKey
from lockstep_operator.types.observed import GroupReport, Observed
from lockstep_operator.types.recovery_state import RecoveryAction, RecoveryState, Rung
from lockstep_operator.types.timestamps import format_rfc3339
from lockstep_runtime.protocol.status import Fault, FaultRecord, GroupStatus

KEY = ModelKey("team", "chat")
NOTHING = RecoveryState()


def fault(number: int, **fields: Any) -> FaultRecord:
    record = FaultRecord(
        id=number, fault=Fault.HANG, rank=1, message="stopped", at=NOW - 60 + number, epoch=number, rung="Rebuild",
        recovered_at=NOW - 59 + number, phases={"detect": 0.5, "rebuild": 0.25},
    )  # fmt: skip
    return msgspec.structs.replace(record, **fields)


def said(faults: Sequence[FaultRecord], **fields: Any) -> GroupStatus:
    counted = {"faults": list(faults), "recoveries": sum(fault.recovered_at is not None for fault in faults)}
    return msgspec.structs.replace(well(KEY, 0, "inc", "new"), **(counted | fields))


def look(
    old: Mapping[str, Any], report: GroupReport, state: RecoveryState = NOTHING, now: float = NOW
) -> tuple[Transition, dict[str, Any]]:
    observed = Observed(status=parse(old), resource_version="1", children={}, reports={0: report})
    seen = pass_of(model(), observed, group(), now=now, recoveries={0: RecoveryDecision(state=state)})
    return seen, document(seen.after)


def told(seen: Transition) -> list[str]:
    return [item.reason for item in of_model(seen) if item.reason not in ("Created", "Ready")]


def of_model(seen: Transition) -> list[EventDraft]:
    """What is told of the model itself."""
    return [item for item in event_drafts(seen) if item.pod is None and not item.node]


def test_what_happened_meanwhile_is_told_once() -> None:
    _, first = look({}, GroupReport(status=said([fault(1)])))
    away, second = look(first, GroupReport(status=said([fault(1), fault(2), fault(3, recovered_at=None, rung="")])))
    assert told(away) == ["Hang", "Hang", "Recovered"]
    assert (second["groups"][0]["lastFaultID"], second["groups"][0]["lastRepairID"]) == (3, 2)
    requeue_after, third = look(second, GroupReport(status=said([fault(2), fault(3)])))
    assert told(requeue_after) == ["Recovered"]
    assert told(look(third, GroupReport(status=said([fault(2), fault(3)])))[0]) == []
    anew, _ = look(third, GroupReport(status=said([fault(1)], incarnation="other")))
    assert told(anew) == ["Hang", "Recovered"], "another process counts anew"


def test_a_repair_is_told_with_its_first_token() -> None:
    fresh = fault(1, recovered_at=NOW - 1, requests_resumed=2)
    seen, status = look({}, GroupReport(status=said([fresh])))
    assert told(seen) == ["Hang"]
    done = fault(1, recovered_at=NOW - 1, requests_resumed=2, phases=fresh.phases | {"firstToken": 0.125})
    later, after = look(status, GroupReport(status=said([done])))
    assert [item.note for item in event_drafts(later) if item.reason == "Recovered"] == [
        "group 0 rank 1 recovered from Hang by Rebuild (detect 0.5 s, rebuild 0.25 s, firstToken 0.12 s); "
        "2 requests resumed"
    ]
    assert after["lastRecovery"] == {
        "fault": "Hang", "group": 0, "suspectRank": 1, "rung": "Rebuild", "requestsResumed": 2,
        "phases": {"detect": 0.5, "rebuild": 0.25, "firstToken": 0.125}, "finishedAt": format_rfc3339(NOW - 1),
    }  # fmt: skip
    given_up, _ = look(status, GroupReport(status=said([fresh])), now=NOW + 10)
    assert told(given_up) == ["Recovered"], "nobody waits for it any longer"


def test_counters_of_a_group_that_falls_silent_go_on_where_they_were() -> None:
    _, heard = look({}, GroupReport(status=said([fault(1)])))
    silent, unknown = look(heard, GroupReport(status=said([fault(1)]), unreachable_since=NOW - 99, error="no route"))
    assert told(silent) == []
    assert unknown["groups"][0]["state"] == "Unknown"
    back, known = look(unknown, GroupReport(status=said([fault(1)])))
    assert told(back) == []
    assert known["recoveries"] == 1


STEP = RecoveryAction(
    rung=Rung.RECYCLE_POD, trigger="inc/1", fault="Hang", rank=1, reason="because", pods=("p",), since=NOW - 8,
    noticed=NOW - 10,
)  # fmt: skip


@pytest.mark.parametrize("closed", [True, False])
def test_a_step_of_the_operator_that_helped_is_one_recovery(closed: bool) -> None:
    """The group closes the fault too, if its first pod stayed; then that is not told besides."""
    record = fault(1, at=NOW - 10, recovered_at=None, phases={"detect": 0.5}, rung="")
    before = RecoveryState(action=STEP, attempts_used={Rung.RECYCLE_POD: 1})
    _, poisoned = look({}, GroupReport(status=said([record])), before)
    report = said([fault(1, at=NOW - 10, recovered_at=NOW)]) if closed else said([], incarnation="other")
    after = RecoveryState(
        action=replace(STEP, healed=True, pods=()), attempts_used=before.attempts_used, healthy_since=NOW
    )
    seen, status = look(poisoned, GroupReport(status=report), after)
    assert told(seen) == ["Recovered"]
    [repair] = seen.repairs
    assert repair.record == (report.faults[0] if closed else None)
    assert (repair.steps[0], repair.steps[-1].end) == (Step("detect", NOW - 10, NOW - 8), NOW)
    assert (status["recoveries"], status["lastRecovery"]["rung"]) == (1, "RecyclePod")
    assert (status["lastRecovery"]["phases"]["detect"], status["lastRecovery"]["phases"]["recycle"]) == (2.0, 8.0)
    quiet, same = look(status, GroupReport(status=report), after)
    assert told(quiet) == []
    assert (same["recoveries"], same["lastRecovery"]["rung"]) == (1, "RecyclePod")


def test_what_a_dying_operator_told_and_did_not_write_down_is_not_told_again_by_the_next() -> None:
    """The next one decides at another time, and the API server refuses a second Event of the same name."""
    ill = GroupReport(status=said([fault(1, at=NOW - 10, recovered_at=None, rung="")]))
    _, poisoned = look({}, ill)

    def keys(old: Mapping[str, Any], report: GroupReport, step: RecoveryAction, now: float) -> set[str]:
        seen, _ = look(old, report, RecoveryState(action=step), now)
        return {item.key for item in event_drafts(seen) if item.reason in ("RecyclePod", "RecycleGroup", "Recovered")}

    decided = keys(poisoned, ill, STEP, NOW)
    assert decided == keys(poisoned, ill, replace(STEP, since=NOW - 1), NOW + 7)
    _, written = look(poisoned, ill, RecoveryState(action=STEP))
    assert len(decided | keys(written, ill, replace(STEP, rung=Rung.RECYCLE_GROUP, since=NOW + 99), NOW + 99)) == 2

    served, well_again = replace(STEP, healed=True, pods=()), GroupReport(status=said([], incarnation="other"))
    assert len(keys(written, well_again, served, NOW) | keys(written, well_again, served, NOW + 7)) == 1


def test_faults_and_repairs_of_one_second_are_sorted_as_they_came() -> None:
    """As `kubectl describe` does: by the last time, which has whole seconds, and then by name."""
    times = (0.1, 0.3), (0.5, 0.7)
    records = [fault(n, at=NOW + at, recovered_at=NOW + done) for n, (at, done) in enumerate(times, 1)]
    seen, _ = look({}, GroupReport(status=said(records)), now=NOW + 0.8)
    written = [manifest(KEY, "uid-m", item, NOW + 0.8) for item in of_model(seen) if item.at]
    assert {item["lastTimestamp"] for item in written} == {format_rfc3339(NOW)}
    written.sort(key=lambda item: str(item["metadata"]["name"]))
    assert [item["reason"] for item in written] == ["Hang", "Recovered", "Hang", "Recovered"]


def test_repairs_are_counted_by_fault_and_rung_and_timed_by_phase() -> None:
    now = NOW
    metrics = Metrics(lambda: now)
    repair = Repair(group=0, fault="Hang", rank=1, rung="Respawn", noticed=10.0, finished=12.0, phases={"detect": 0.5})
    poisoned = Condition(type="Poisoned", status="True", reason="Hang", message="", last_transition_time=NOW)
    metrics.model(KEY, ModelStatus(conditions=(poisoned,)))
    metrics.repaired(KEY, [repair, repair])
    metrics.stepped(KEY, {0: GroupReport(status=said([], last_step_at=NOW - 7))})
    page = generate_latest(metrics.registry).decode()
    assert 'lockstep_operator_recoveries_total{fault="Hang",model="chat",namespace="team",rung="Respawn"} 2.0' in page
    assert 'lockstep_operator_recovery_seconds_sum{phase="detect"} 1.0' in page
    assert 'lockstep_operator_recovery_seconds_sum{phase="total"} 4.0' in page
    assert 'lockstep_operator_seconds_since_last_step{group="0",model="chat",namespace="team"} 7.0' in page
    assert 'lockstep_operator_condition{condition="Poisoned",model="chat",namespace="team"} 1.0' in page
    now = NOW + 5
    assert 'since_last_step{group="0",model="chat",namespace="team"} 12.0' in generate_latest(metrics.registry).decode()
    metrics.forget(KEY)
    assert 'model="chat"' not in generate_latest(metrics.registry).decode()


def test_a_request_that_was_dropped_is_a_fault_and_no_repair() -> None:
    dropped = fault(1, at=NOW, recovered_at=NOW + 0.1, rung="Drop")
    seen, new = look({}, GroupReport(status=said([dropped])))
    assert told(seen) == ["Hang"]
    assert (seen.repairs, new.get("lastRecovery")) == ([], None)
    assert new["groups"][0]["lastRepairID"] == 1, "and it is not looked at again"
