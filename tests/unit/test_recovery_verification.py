"""A fingerprint that differs is tried again, and believed only when every rank's weights are what was loaded."""

from __future__ import annotations

from lockstep_runtime.recovery.verification import RETESTS, Verdict, Verification

FIRST, SECOND = ["a", "b"], ["a", "c"]  # incarnations: one of the first is left


def loaded() -> Verification:
    found = Verification()
    found.begin(FIRST)
    assert found.tested(7) is Verdict.RIGHT
    assert found.message == ""
    found.begin(SECOND)
    return found


def differs(found: Verification, fingerprint: int) -> None:
    verdicts = [found.tested(fingerprint) for _ in range(RETESTS + 1)]
    assert verdicts == [Verdict.TEST_AGAIN] * RETESTS + [Verdict.SCRUB]


def test_one_that_is_as_at_first_is_right() -> None:
    assert loaded().tested(7) is Verdict.RIGHT


def test_one_that_differs_in_the_same_way_each_time_asks_for_a_scrub_and_is_then_what_is_right() -> None:
    found = loaded()
    differs(found, 8)
    assert "8, and was 0000000000000007" in found.message
    assert found.scrubbed([3, 3]) is Verdict.RIGHT
    found.begin(["a", "d"])
    assert found.message == ""
    assert found.tested(8) is Verdict.RIGHT
    found.begin(["a", "d"])
    differs(found, 7)


def test_one_that_differs_each_time_otherwise_is_wrong() -> None:
    found = loaded()
    assert found.tested(8) is Verdict.TEST_AGAIN
    assert found.tested(9) is Verdict.WRONG


def test_one_that_comes_back_to_the_first_is_wrong_too() -> None:
    found = loaded()
    assert found.tested(8) is Verdict.TEST_AGAIN
    assert found.tested(7) is Verdict.WRONG


def test_a_rank_that_compared_nothing_proves_nothing() -> None:
    found = loaded()
    differs(found, 8)
    assert found.scrubbed([3, 0]) is Verdict.WRONG


def test_new_processes_alone_have_nothing_to_be_compared_with() -> None:
    found = loaded()
    found.begin(["x", "y"])
    assert found.tested(8) is Verdict.RIGHT
