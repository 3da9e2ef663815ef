"""Diagnosis and decision, and the record that is kept of them."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from lockstep_runtime.protocol.bus import StepDone
from lockstep_runtime.protocol.status import Fault, Latency
from lockstep_runtime.recovery.bounded import MESSAGE_CHARACTERS, bounded
from lockstep_runtime.recovery.diagnosis import Evidence, compare, diagnose, no_answer
from lockstep_runtime.recovery.fault_log import KEPT, FaultLog
from lockstep_runtime.recovery.hang_attribution import HangReport
from lockstep_runtime.recovery.latency import LatencyWindow
from lockstep_runtime.recovery.policy import (
    PROVEN_SECONDS,
    REBUILD_REFILL_SECONDS,
    REBUILDS,
    RESPAWN_REFILL_SECONDS,
    RESPAWNS,
    Budget,
    RecoveryPolicy,
    Rung,
    blame_points,
    cheapest,
    invalidates_caches,
    requires_cache_check,
)

LOST = Evidence(Fault.RANK_LOST, 1, "rank 1 was killed by SIGKILL")
HEARD = Evidence(Fault.RANK_LOST, 0, "rank 0: the collective broke", secondary=True)
HUNG = Evidence(Fault.HANG, None, "ranks 0,1: no StepDone")
FAILED = Evidence(Fault.STEP_FAILED, 2, "rank 2: out of memory")


def done(fingerprint: int) -> StepDone:
    return StepDone(epoch=1, step=1, seconds=0.1, fingerprint=fingerprint)


def test_what_a_rank_says_of_itself_goes_before_hearsay() -> None:
    assert diagnose([HEARD, LOST]).rank == 1
    assert diagnose([HEARD, FAILED]) == FAILED


def test_hearsay_alone_blames_nobody() -> None:
    assert diagnose([HEARD]) == Evidence(Fault.RANK_LOST, None, "rank 0: the collective broke")


def test_the_gravest_is_the_cause_and_all_messages_are_kept() -> None:
    planned = replace(LOST, rank=2, planned=True)
    assert diagnose([planned, LOST]).rank == 1, "a loss that nobody asked for comes first"
    cause = diagnose([FAILED, LOST])
    assert (cause.fault, cause.rank) == (Fault.RANK_LOST, 1)
    assert cause.message == "rank 1 was killed by SIGKILL; rank 2: out of memory"


@pytest.mark.parametrize(
    ("prints", "rank"),
    [
        ([1, 1, 2], 2),
        ([2, 1, 1, 1], 0),
        ([5, 5, 3], 2),
        ([1, 2], None),
        ([1, 1, 2, 2], None),
        ([1, 2, 3], None),
    ],
)
def test_the_odd_rank_is_named_where_a_majority_shows_it(prints: list[int], rank: int | None) -> None:
    odd = compare({number: done(value) for number, value in enumerate(prints)})
    assert odd is not None
    assert (odd.fault, odd.rank) == (Fault.DESYNC, rank)
    assert "rank 0: 000000000000000" in odd.message


def test_equal_fingerprints_are_no_fault() -> None:
    assert compare({0: done(5), 1: done(5)}) is None
    assert compare({0: done(5)}) is None


def test_silence_is_told_with_who_holds_up_whom() -> None:
    lagging = no_answer(
        [0, 1, 2], "StepDone", 2.04, HangReport((1,), "rank 1 stopped before layers.3.mlp.down_proj", 2.0)
    )
    words = "ranks 0,1,2: no StepDone within 2.0 s; rank 1 stopped before layers.3.mlp.down_proj"
    assert lagging == Evidence(Fault.HANG, 1, words, stragglers=(1,), waited=2.04)
    alike = no_answer([0, 2], "Joined", 1.5, HangReport((), "none is behind", None))
    assert (alike.rank, alike.stragglers) == (None, ())
    awaited = no_answer([0, 1], "StepDone", 2.0, HangReport((), "rank 0 waits for rank 1", 2.0, awaited=(1,)))
    assert (awaited.rank, awaited.stragglers) == (1, ())  # an abort may get it out


@pytest.mark.parametrize(
    ("cause", "rung", "kill"),
    [
        (LOST, Rung.RESPAWN, ()),
        (FAILED, Rung.REBUILD, ()),
        (Evidence(Fault.CONTEXT_FAULT, 1, "illegal address"), Rung.RESPAWN, (1,)),
        (Evidence(Fault.CORRUPTION, 0, "checksum"), Rung.RESPAWN, (0,)),
        (Evidence(Fault.CORRUPTION, None, "the probe differs"), Rung.RESPAWN, (0, 1, 2)),
        (HUNG, Rung.REBUILD, ()),
        (Evidence(Fault.HANG, 1, "rank 1 stopped", stragglers=(1,)), Rung.RESPAWN, (1,)),
        (Evidence(Fault.HANG, None, "two stopped", stragglers=(0, 2)), Rung.RESPAWN, (0, 2)),
        (Evidence(Fault.DESYNC, None, "the ranks differ"), Rung.REBUILD, ()),
        (Evidence(Fault.NON_FINITE, 0, "NaN"), Rung.REBUILD, ()),
        (Evidence(Fault.RANK_LOST, None, "the collective broke"), Rung.REBUILD, ()),
    ],
)
def test_the_cheapest_rung_that_can_help(cause: Evidence, rung: Rung, kill: tuple[int, ...]) -> None:
    decision = cheapest(cause, [cause], 3)
    assert (decision.rung, decision.kill) == (rung, kill)
    assert decision.reason
    assert RecoveryPolicy(3, "Ladder").decide(cause, [cause]) == decision


def test_a_budget_comes_back_with_healthy_time_and_never_exceeds_itself() -> None:
    budget = Budget(2, 10.0)
    assert [budget.take() for _ in range(3)] == [True, True, False]
    budget.credit(9.0)
    assert not budget.take()
    budget.credit(1.0)
    assert budget.take()
    budget.credit(1000.0)
    assert budget.left == 2
    budget.give_back()
    assert budget.left == 2
    budget.credit(-5.0)
    assert budget.left == 2


def test_a_rebuild_that_did_not_help_is_not_tried_again() -> None:
    policy = RecoveryPolicy(3, "Ladder")
    assert policy.decide(FAILED, [FAILED]).rung is Rung.REBUILD
    policy.credit_healthy_time(0.1, steps=False)
    again = policy.decide(FAILED, [FAILED])
    assert (again.rung, again.kill) == (Rung.RESPAWN, (2,))
    assert again.reason == "StepFailed: a rebuild has just failed to help; the process of rank 2 must go"
    assert policy.decide(HUNG, [HUNG]).kill == (0, 1, 2)


@pytest.mark.parametrize(("seconds", "steps"), [(0.1, True), (60.0, False)])
def test_a_rebuild_that_was_followed_by_steps_or_long_rest_has_helped(seconds: float, steps: bool) -> None:
    policy = RecoveryPolicy(3, "Ladder")
    policy.decide(FAILED, [FAILED])
    policy.credit_healthy_time(seconds, steps=steps)
    assert policy.decide(FAILED, [FAILED]).rung is Rung.REBUILD


def test_what_is_spent_leads_to_the_next_rung_and_past_the_last_to_poison() -> None:
    policy = RecoveryPolicy(2, "Ladder")
    rungs = []
    for _ in range(REBUILDS + RESPAWNS + 1):
        rungs.append(policy.decide(FAILED, [FAILED]).rung)
        policy.credit_healthy_time(0.0, steps=True)
    assert rungs == [Rung.REBUILD] * REBUILDS + [Rung.RESPAWN] * RESPAWNS + [None]
    last = policy.decide(LOST, [LOST])
    assert last.rung is None
    assert last.reason == "10 respawns are used up, and rank 1 is gone; its supervisor starts it again"
    assert not policy.charge_respawn()
    policy.credit_healthy_time(1000.0, steps=False)
    assert policy.decide(LOST, [LOST]).rung is Rung.RESPAWN
    assert policy.charge_respawn()


def test_a_request_that_is_the_cause_costs_the_group_no_budget() -> None:
    policy = RecoveryPolicy(2, "Ladder")
    for _ in range(50):
        assert policy.decide(FAILED, [FAILED]).rung is Rung.REBUILD
        assert policy.decide(FAILED, [FAILED], by_request=True).rung is Rung.REBUILD
        policy.credit_healthy_time(0.0, steps=True)
    assert policy.rebuilds.left == REBUILDS


def test_recycle_pods_takes_no_rung() -> None:
    decision = RecoveryPolicy(2, "RecyclePods").decide(FAILED, [FAILED])
    assert (decision.rung, decision.kill) == (None, ())
    assert decision.reason == "StepFailed: the strategy is RecyclePods; the group waits for new pods"


def test_a_lost_process_is_held_less_against_a_request_than_a_failed_step() -> None:
    assert [blame_points(one) for one in (LOST, FAILED, HUNG)] == [1, 2, 2]
    assert blame_points(replace(LOST, planned=True)) == 0
    assert blame_points(Evidence(Fault.HANG, 1, "stopped by SIGSTOP", stragglers=(1,), outside=True)) == 1


def test_ids_rise_and_the_newest_are_kept() -> None:
    book = FaultLog([], 0)
    for number in range(KEPT + 5):
        book.begin(LOST, "Respawn", at=float(number), epoch=number, detect=0.0)
        book.repaired({"rebuild": 0.1}, at=number + 0.5, resumed=0)
    ids = [record.id for record in book.records]
    assert ids == list(range(6, KEPT + 6))
    assert book.recoveries == KEPT + 5
    assert FaultLog(book.records, 1).begin(LOST, "Respawn", at=0.0, epoch=0, detect=0.0).id == KEPT + 6


def test_the_same_fault_again_before_the_repair_is_one_record_and_another_is_a_second() -> None:
    book = FaultLog([], 0)
    for evidence in (LOST, LOST, FAILED):
        book.begin(evidence, "Respawn", at=1.0, epoch=1, detect=0.0)
    book.repaired({"rebuild": 0.1}, at=2.0, resumed=3)
    assert [(record.fault, record.recovered_at) for record in book.records] == [
        (Fault.RANK_LOST, 2.0),
        (Fault.STEP_FAILED, 2.0),
    ]
    assert book.recoveries == 1


def test_the_first_token_after_a_repair_is_timed_once() -> None:
    book = FaultLog([], 0)
    assert not book.token(0.5)
    book.begin(LOST, "Respawn", at=1.0, epoch=1, detect=0.25)
    book.repaired({"rebuild": 0.1}, at=2.0, resumed=3)
    assert book.token(2.5)
    assert not book.token(3.0)
    assert book.records[0].phases == {"detect": 0.25, "rebuild": 0.1, "firstToken": 0.5}


def test_better_words_for_a_loss_and_the_name_of_a_hanging_rank() -> None:
    book = FaultLog([], 0)
    book.begin(LOST, "Respawn", at=1.0, epoch=1, detect=0.0)
    book.refine("another rank", "was something else")
    book.refine(LOST.message, "rank 1 ended with exit code 1")
    assert book.records[0].message == "rank 1 ended with exit code 1"
    book.begin(HUNG, "Rebuild", at=2.0, epoch=1, detect=2.0)
    book.set_cause(1, "rank 1 was killed", Rung.RESPAWN)
    assert (book.records[1].rank, book.records[1].rung) == (1, "Respawn")


def test_the_end_of_a_later_process_does_not_rewrite_history() -> None:
    book = FaultLog([], 0)
    book.begin(LOST, "Respawn", at=1.0, epoch=1, detect=0.0)
    book.refine(LOST.message, "rank 1 (pid 7) was killed by SIGSEGV")
    again = replace(LOST, message="rank 1 (pid 8) closed its connection")
    book.begin(again, "Respawn", at=1.5, epoch=2, detect=0.0)
    assert book.records[0].message == "rank 1 (pid 7) was killed by SIGSEGV; rank 1 (pid 8) closed its connection"
    book.refine(again.message, "rank 1 (pid 8) ended with exit code 1")
    assert book.records[0].message == "rank 1 (pid 7) was killed by SIGSEGV; rank 1 (pid 8) ended with exit code 1"
    book.repaired({}, at=2.0, resumed=0)
    book.refine("rank 1 (pid 7) was killed by SIGSEGV", "something else")
    assert book.records[0].message.startswith("rank 1 (pid 7) was killed by SIGSEGV")


def test_a_dropped_request_is_a_record_that_is_closed_at_once() -> None:
    book = FaultLog([], 0)
    first = book.begin(LOST, "Respawn", at=1.0, epoch=1, detect=0.0)
    dropped = book.drop(FAILED, at=2.0, epoch=1)
    assert (dropped.id, dropped.rung, dropped.recovered_at) == (2, "Drop", 2.0)
    assert book.open_id == first.id
    book.repaired({}, at=3.0, resumed=1)
    assert (book.open_id, book.recoveries) == (0, 1)
    assert [record.recovered_at for record in book.records] == [3.0, 2.0]


def test_the_rung_that_is_told_is_the_one_that_was_needed() -> None:
    book = FaultLog([], 0)
    book.begin(LOST, "Respawn", at=1.0, epoch=1, detect=0.0)
    book.repaired({}, at=2.0, resumed=0, respawned=False)
    assert book.records[0].rung == "Rebuild"


def test_latency_percentiles_are_of_the_newest_steps() -> None:
    window = LatencyWindow(size=100)
    assert window.latency() == Latency()
    for milliseconds in range(1, 301):
        window.add(milliseconds / 1000)
    assert window.latency() == Latency(p50_ms=250.0, p99_ms=299.0)


def test_what_nothing_by_the_group_itself_can_mend_is_the_cause_and_poisons_at_once() -> None:
    final = Evidence(Fault.RANK_LOST, 0, "rank 0 has been out of reach for 60 s", final=True)
    cause = diagnose([Evidence(Fault.CONTEXT_FAULT, 1, "illegal address"), LOST, final])
    assert (cause.rank, cause.final) == (0, True)
    policy = RecoveryPolicy(3, "Ladder")
    assert policy.decide(cause, [cause]).rung is None
    assert policy.respawns.left == RESPAWNS


def test_a_rank_that_is_killed_again_and_again_is_counted_and_not_repeated() -> None:
    book = FaultLog([], 0)
    book.begin(HUNG, "Rebuild", at=1.0, epoch=1, detect=2.0)
    for _ in range(12):
        book.set_cause(1, "rank 1 has read none of its weights for 15 s and was killed", Rung.RESPAWN)
    book.set_cause(0, "rank 0 did not leave", Rung.RESPAWN)
    [record] = book.records
    assert record.message == (
        "ranks 0,1: no StepDone; rank 1 has read none of its weights for 15 s and was killed (12 times); "
        "rank 0 did not leave"
    )


def test_no_text_of_a_fault_grows_without_end() -> None:
    book = FaultLog([], 0)
    book.begin(Evidence(Fault.STEP_FAILED, 1, "x" * 1_000_000), "Rebuild", at=1.0, epoch=1, detect=0.0)
    for number in range(1000):
        book.set_cause(1, f"for the {number}th time", Rung.RESPAWN)
    book.attribute(Fault.STEP_FAILED, 1, "y" * 10_000)
    [record] = book.records
    assert len(record.message) <= MESSAGE_CHARACTERS
    assert record.message.startswith("xxx")
    assert record.message.endswith("for the 999th time")
    book.begin(LOST, "Respawn", at=1.0, epoch=1, detect=0.0)
    book.refine(LOST.message, "z" * 10_000)
    assert len(book.records[-1].message) <= MESSAGE_CHARACTERS


def test_a_bounded_text_keeps_its_beginning_and_its_end() -> None:
    assert bounded("short") == "short"
    assert bounded("x" * 200, 200) == "x" * 200
    marked = bounded("".join(chr(0x4E00 + number) for number in range(500)), 200)
    kept = [one for one in marked if one >= chr(0x4E00)]
    assert len(kept) + int(re.findall(r"\d+", marked)[0]) == 500
    assert len(set(kept)) == len(kept)
    text = bounded("a" * 3000 + "end", 200)
    assert len(text) <= 200
    assert (text[:150], text[-3:]) == ("a" * 150, "end")
    assert "(2843 characters left out)" in text


@pytest.mark.parametrize(
    ("graver", "lighter"),
    [
        (Fault.RANK_LOST, Fault.CONTEXT_FAULT),
        (Fault.CONTEXT_FAULT, Fault.CORRUPTION),
        (Fault.CONTEXT_FAULT, Fault.NON_FINITE),
        (Fault.CORRUPTION, Fault.STEP_FAILED),
        (Fault.NON_FINITE, Fault.STEP_FAILED),
        (Fault.CORRUPTION, Fault.DESYNC),
        (Fault.STEP_FAILED, Fault.HANG),
        (Fault.DESYNC, Fault.HANG),
    ],
)
def test_the_graver_of_two_faults_is_the_cause_whichever_came_first(graver: Fault, lighter: Fault) -> None:
    evidence = [Evidence(graver, 1, "the one"), Evidence(lighter, 0, "the other")]
    assert diagnose(evidence).fault is diagnose(evidence[::-1]).fault is graver


@pytest.mark.parametrize("fault", list(Fault))
def test_every_fault_has_its_weight_among_causes(fault: Fault) -> None:
    heard = Evidence(Fault.RANK_LOST, 0, "its peer is gone", secondary=True)
    assert diagnose([heard, Evidence(fault, 1, "the one")]).fault is fault


@pytest.mark.parametrize("fault", list(Fault))
def test_which_faults_leave_the_caches_in_doubt(fault: Fault) -> None:
    evidence = [Evidence(fault, 1, "words")]
    assert invalidates_caches(evidence) == (fault in (Fault.CONTEXT_FAULT, Fault.CORRUPTION))
    assert requires_cache_check(evidence) == (fault is Fault.NON_FINITE)
    assert invalidates_caches([LOST, *evidence]) == invalidates_caches(evidence)


@pytest.mark.parametrize(
    ("cause", "reason"),
    [
        (Evidence(Fault.HANG, 1, "m", stragglers=(1,)), "Hang: the others wait for the process of rank 1"),
        (Evidence(Fault.HANG, None, "m", stragglers=(0, 2)), "Hang: the others wait for the processes of ranks 0,2"),
        (Evidence(Fault.CORRUPTION, None, "m"), "Corruption: the processes of ranks 0,1,2 can't be used further"),
        (Evidence(Fault.CONTEXT_FAULT, 2, "m"), "ContextFault: the process of rank 2 can't be used further"),
        (LOST, "rank 1 is gone; its supervisor starts it again"),
        (HUNG, "Hang: every rank is aborted; a rank that does not answer is killed"),
        (FAILED, "StepFailed: every process lives; a new communicator is made"),
    ],
)
def test_every_decision_says_why(cause: Evidence, reason: str) -> None:
    assert cheapest(cause, [cause], 3).reason == reason


def test_every_rank_that_the_evidence_names_goes_and_no_other() -> None:
    evidence = [Evidence(Fault.CONTEXT_FAULT, rank, "m") for rank in (2, 0)]
    assert cheapest(evidence[0], [*evidence, FAILED, LOST], 4).kill == (0, 2)


def test_a_rebuild_that_held_for_long_has_helped_though_nobody_asked_for_a_step() -> None:
    for seconds, rung in ((PROVEN_SECONDS, Rung.RESPAWN), (PROVEN_SECONDS + 0.1, Rung.REBUILD)):
        policy = RecoveryPolicy(3, "Ladder")
        policy.decide(FAILED, [FAILED])
        policy.credit_healthy_time(seconds, steps=False)
        assert policy.decide(FAILED, [FAILED]).rung is rung


def test_one_attempt_of_each_comes_back_in_its_time() -> None:
    policy = RecoveryPolicy(3, "Ladder")
    policy.rebuilds.left = policy.respawns.left = 0.0
    policy.credit_healthy_time(5.0, steps=True)
    assert (policy.rebuilds.left, policy.respawns.left) == (5.0 / REBUILD_REFILL_SECONDS, 5.0 / RESPAWN_REFILL_SECONDS)
    assert (REBUILD_REFILL_SECONDS, RESPAWN_REFILL_SECONDS, PROVEN_SECONDS, REBUILDS) == (5.0, 5.0, 30.0, 5)
    policy.rebuilds.left = 1.0
    policy.rebuilds.give_back()
    assert policy.rebuilds.left == 2.0


def test_a_fault_that_comes_again_before_it_is_repaired_says_what_is_new_about_it() -> None:
    book = FaultLog([], 0)
    book.begin(LOST, "Respawn", at=1.0, epoch=1, detect=0.0)
    assert book.begin(LOST, "Respawn", at=2.0, epoch=2, detect=0.0).message == LOST.message
    away = Evidence(Fault.RANK_LOST, 1, "rank 1 (pod 1) has been out of reach for 60 s", final=True)
    for _ in range(3):
        found = book.begin(away, "", at=3.0, epoch=3, detect=0.0)
    assert found.message == f"{LOST.message}; {away.message}"
    assert (found.id, found.rank, found.rung) == (1, 1, "Respawn")
    for number in range(100):
        book.begin(Evidence(Fault.RANK_LOST, 1, f"rank 1 (pid {number}) went"), "", at=4.0, epoch=4, detect=0.0)
    assert book.footprint <= KEPT + 1
    assert len(book.records) == 1


def test_what_is_open_is_bounded_and_a_dropped_request_is_nobody_s_cause() -> None:
    book = FaultLog([], 0)
    for number in range(3 * KEPT):
        book.begin(Evidence(Fault.RANK_LOST, number % 2, f"{number}"), "Respawn", at=1.0, epoch=1, detect=0.0)
    assert book.footprint <= KEPT
    newest = book.open_id
    book.drop(FAILED, at=2.0, epoch=2)
    book.set_cause(0, "rank 0 did not leave and was killed", Rung.RESPAWN)
    assert [one.id for one in book.records if "did not leave" in one.message] == [newest]


def test_of_what_is_known_only_by_its_effects_the_first_word_counts() -> None:
    second = Evidence(Fault.RANK_LOST, 2, "rank 2: the collective broke", secondary=True)
    assert diagnose([HEARD, second]).message == HEARD.message


def test_the_cause_is_told_once_and_what_others_say_once_each() -> None:
    again = Evidence(Fault.STEP_FAILED, 0, "rank 2: out of memory")
    assert diagnose([FAILED, again]).message == "rank 2: out of memory"
    assert diagnose([FAILED, HUNG]).message == "rank 2: out of memory; ranks 0,1: no StepDone"


def test_of_several_that_hold_up_the_others_none_is_named() -> None:
    found = no_answer([0, 1, 2], "StepDone", 2.0, HangReport((0, 2), "ranks 0,2 stopped", 2.0))
    assert (found.rank, found.stragglers) == (None, (0, 2))
    assert LOST.waited == 0.0
