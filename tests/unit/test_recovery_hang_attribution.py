"""Who hangs, from the progress records; and the probe's memory."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockstep_runtime.layers.cache import BLOCK_SIZE
from lockstep_runtime.protocol.bus import ProgressRecord
from lockstep_runtime.recovery.hang_attribution import HangReport, attribute, ranks_text
from lockstep_runtime.recovery.self_test import PROMPT, Baseline, probe, warmup_step


def record(
    rank: int, collective: int, *, inside: bool, age: float = 3.14, step: int = 9, done: bool = False,
    starved: float = 0.0, awaited: int | None = None,
) -> ProgressRecord:  # fmt: skip
    return ProgressRecord(
        rank=rank, incarnation="i", epoch=4, step=step, in_step=not done, collective=collective, inside=inside,
        place=f"layers.{collective}.mlp.down_proj", age=age, starved=starved,
        awaited=awaited,
    )  # fmt: skip


def judge(*records: ProgressRecord, silent: list[int] | None = None, size: int = 0) -> HangReport:
    ranks = [one.rank for one in records]
    return attribute(records, epoch=4, step=9, silent=ranks if silent is None else silent, size=size or len(ranks))


def test_the_rank_that_never_entered_is_named_with_where_the_others_wait() -> None:
    found = judge(
        record(0, 12, inside=True), record(1, 11, inside=False, age=3.2), record(2, 12, inside=True, age=3.1),
        record(3, 12, inside=True, age=3.0),
    )  # fmt: skip
    assert found.stragglers == (1,)
    assert found.sentence == "rank 1 stopped before layers.12.mlp.down_proj, ranks 0,2,3 waited 3.1 s"
    assert found.moved_ago == 3.0


def test_a_rank_that_gets_no_cpu_is_not_blamed_for_that_time_and_one_that_waits_for_it_has_no_excuse() -> None:
    starved = judge(record(0, 12, inside=True, age=3.0), record(1, 11, inside=False, age=3.2, starved=3.0))
    assert starved.moved_ago == pytest.approx(0.2)
    blocked = judge(record(0, 12, inside=True, age=3.0, starved=2.9), record(1, 11, inside=False, age=3.2))
    assert blocked.moved_ago == 3.0
    both = judge(record(0, 0, inside=False, age=3.0, starved=2.9), record(1, 0, inside=False, age=3.0, starved=2.0))
    assert both.moved_ago == pytest.approx(0.1)


def test_a_rank_that_stays_inside_while_the_others_are_through() -> None:
    found = judge(record(0, 6, inside=True), record(1, 5, inside=True))
    assert found.stragglers == (1,)
    assert found.sentence == "rank 1 stopped in layers.5.mlp.down_proj, rank 0 waited 3.1 s"


def test_a_rank_that_never_began_the_step() -> None:
    found = judge(record(0, 30, inside=False, step=8, done=True), record(1, 1, inside=True))
    assert found.stragglers == (0,)
    assert found.sentence == "rank 0 stopped before it began, rank 1 waited 3.1 s"


def test_before_the_first_collective() -> None:
    found = judge(record(0, 0, inside=False), record(1, 1, inside=True))
    assert found.sentence == "rank 0 stopped before layers.1.mlp.down_proj, rank 1 waited 3.1 s"


def test_the_last_one_of_a_step_that_the_others_have_done() -> None:
    found = judge(record(1, 57, inside=False), silent=[1], size=3)
    assert found.stragglers == (1,)
    assert found.sentence == "rank 1 stopped after layers.57.mlp.down_proj, the other ranks are done"


def test_several_that_hold_up_one() -> None:
    found = judge(record(0, 5, inside=False), record(1, 6, inside=True), record(2, 5, inside=False))
    assert found.stragglers == (0, 2)
    assert found.sentence == "ranks 0,2 stopped before layers.6.mlp.down_proj, rank 1 waited 3.1 s"


def test_who_is_inside_like_all_others_and_is_waited_for_is_named() -> None:
    found = judge(record(0, 5, inside=True, awaited=2), record(1, 5, inside=True, awaited=2), record(2, 5, inside=True))
    assert (found.stragglers, found.awaited) == ((), (2,))
    assert found.sentence == "ranks 0,1,2 all stopped in layers.5.mlp.down_proj, the others wait for rank 2"
    each_other = judge(record(0, 5, inside=True, awaited=1), record(1, 5, inside=True, awaited=0))
    assert (each_other.stragglers, each_other.awaited) == ((), ())


def test_nobody_is_blamed_when_all_stand_alike_or_records_are_missing() -> None:
    assert judge(record(0, 5, inside=True), record(1, 5, inside=True)).stragglers == ()
    unknown = judge(record(0, 5, inside=True), silent=[0, 1], size=2)
    assert (unknown.stragglers, unknown.moved_ago) == ((), 3.14)
    assert unknown.sentence == "ranks 0,1 did not answer, and not all of their records can be read"


def test_a_rank_alone_is_its_own_suspect() -> None:
    assert judge(record(0, 5, inside=False)).sentence == "rank 0 stopped after layers.5.mlp.down_proj"
    assert judge(silent=[0], size=1) == HangReport((0,), "rank 0 did not answer, and its record can't be read", None)


def test_where_one_stands_is_named_by_itself_unless_another_waits_in_the_very_next_collective() -> None:
    for other in (record(1, 12, inside=False, done=True), record(1, 14, inside=True)):
        found = judge(record(0, 11, inside=False), other)
        assert found.stragglers == (0,)
        assert found.sentence.startswith("rank 0 stopped after layers.11.mlp.down_proj, rank 1 waited")


def test_one_that_is_in_another_step_has_not_begun_this_one() -> None:
    for step in (8, 10):
        found = judge(record(0, 30, inside=True, step=step), record(1, 1, inside=True))
        assert found.sentence == "rank 0 stopped before it began, rank 1 waited 3.1 s"


def test_all_stand_before_the_first_collective() -> None:
    found = judge(record(0, 0, inside=False), record(1, 0, inside=False))
    assert found.sentence == "ranks 0,1 all stopped before the first collective, none behind the others"


@pytest.mark.parametrize(
    ("size", "others"), [(1, ""), (2, ", the other ranks are done"), (3, ", the other ranks are done")]
)
def test_one_that_answers_last_may_be_alone_or_not(size: int, others: str) -> None:
    found = judge(record(0, 3, inside=True), size=size)
    assert found.sentence == f"rank 0 stopped in layers.3.mlp.down_proj{others}"
    found = judge(record(0, 3, inside=False, done=True), size=size)
    assert found.sentence == f"rank 0 stopped after it was done{others}"


def test_a_place_without_a_name_is_its_number() -> None:
    nameless = ProgressRecord(
        rank=1, incarnation="i", epoch=4, step=9, in_step=True, collective=3, inside=True, place="", age=1.0
    )
    assert judge(nameless, silent=[1], size=1).sentence == "rank 1 stopped in collective 3"


@given(st.lists(st.tuples(st.integers(0, 60), st.booleans(), st.booleans()), min_size=1, max_size=8))
def test_whoever_is_blamed_is_behind_somebody_and_never_in_front(ranks: list[tuple[int, bool, bool]]) -> None:
    records = [record(rank, n, inside=inside and n > 0, done=done) for rank, (n, inside, done) in enumerate(ranks)]
    found = judge(*records)
    assert set(found.stragglers) <= set(range(len(ranks)))
    assert len(found.stragglers) < len(ranks) or len(ranks) == 1
    furthest = max(records, key=lambda one: (not one.in_step, one.collective, not one.inside))
    assert len(ranks) == 1 or furthest.rank not in found.stragglers
    assert found.sentence.startswith(("rank ", "ranks "))


def test_ranks_are_listed_as_people_do() -> None:
    assert (ranks_text([1]), ranks_text([0, 2, 3])) == ("rank 1", "ranks 0,2,3")


def test_the_probe_is_a_decode_and_practice_a_prefill_step_in_the_same_block() -> None:
    [decode], [prefill] = probe(99), warmup_step(99)
    assert (prefill.tokens, prefill.position, prefill.blocks) == (PROMPT, 0, [99])
    assert (decode.position, len(decode.tokens), decode.blocks) == (len(PROMPT), 1, [99])
    assert 0 < decode.position < BLOCK_SIZE


def test_fingerprints_are_compared_as_long_as_a_process_is_left_that_was_there() -> None:
    baseline = Baseline()
    assert baseline.check(2, ["a", "b"]) == ""
    assert baseline.check(2, ["a", "c"]) == ""
    wrong = baseline.check(3, ["d", "c"])
    assert wrong.startswith("the probe's fingerprint is 0000000000000003, and was 0000000000000002 when")
    assert baseline.check(3, ["d", "e"]) == ""  # all loaded anew: what they give is what was loaded
    assert baseline.check(2, ["d", "f"]) != ""


@pytest.mark.parametrize("fingerprint", [0, 7])
def test_a_first_time_is_right_by_definition(fingerprint: int) -> None:
    assert Baseline().check(fingerprint, ["a"]) == ""


def test_ranks_that_stop_when_the_others_are_done_keep_nobody_waiting() -> None:
    found = judge(
        record(0, 12, inside=False), record(1, 12, inside=False), record(2, 12, inside=False, done=True), silent=[0, 1]
    )
    assert found.stragglers == (0, 1)
    assert found.sentence.endswith("the other ranks are done")
