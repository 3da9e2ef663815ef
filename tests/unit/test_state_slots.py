"""Slots of recurrent state: a step never writes what it reads, and nobody writes what another will read. What is kept
of a text's beginning costs no copy, and no slot that a sequence needs.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockstep_runtime.engine.state_slots import StateBook
from lockstep_runtime.protocol.step import NO_STATE, StateSlots


def test_a_repeated_step_reads_what_it_read_before_and_a_booked_one_is_read_next() -> None:
    book = StateBook(5)
    assert book.pairs == 2
    begin = book.slots(7)
    assert begin.read == 0, "zeros"
    assert book.slots(7) == begin, "nothing was booked"
    book.booked(7)
    second = book.slots(7)
    assert second.read == begin.write
    book.booked(7)
    assert book.slots(7) == StateSlots(second.write, second.read)


def test_models_without_states_need_no_slots() -> None:
    book = StateBook(0)
    book.booked(1)
    book.release(1)
    assert (book.pairs, book.slots(1)) == (0, NO_STATE)


def test_there_are_as_many_sequences_as_pairs() -> None:
    book = StateBook(4)  # zeros, one pair, and one that is left over
    book.slots(1)
    with pytest.raises(IndexError):
        book.slots(2)
    book.release(1)
    assert book.slots(2).read == 0


def keys(*texts: str) -> list[bytes]:
    return [text.encode() for text in texts]


def written(book: StateBook, owner: int, key: str = "", *, passing: bool = False) -> int:
    """A step of the owner's, booked: the slot that it has written."""
    slot = book.slots(owner).write
    book.booked(owner, key.encode() or None, passing=passing)
    return slot


def test_what_is_kept_is_read_by_others_and_written_by_nobody() -> None:
    book = StateBook(9)
    slot = written(book, 1, "a")
    assert book.longest(keys("a", "ab")) == 1
    book.share(2, b"a")
    assert [book.slots(owner).read for owner in (1, 2)] == [slot, slot]
    others = {written(book, owner) for owner in (1, 2, 1, 2, 1, 2)}
    assert slot not in others
    book.release(1)
    book.release(2)
    assert (book.kept, book.longest(keys("a"))) == (1, 1)
    book.slots(3)
    with pytest.raises(ValueError, match="sequence 3 has begun already"):
        book.share(3, b"a")


def test_a_step_that_is_not_booked_keeps_nothing() -> None:
    book = StateBook(9)
    book.slots(1)
    book.booked(2, b"a")
    book.release(1)
    assert (book.kept, book.longest(keys("a"))) == (0, 0)


def test_the_longest_beginning_with_a_state_is_found_though_shorter_ones_have_none() -> None:
    book = StateBook(9)
    written(book, 1, "ab")
    assert book.longest(keys("a", "ab", "abc")) == 2
    assert book.longest(keys("a")) == 0


def test_who_needs_a_slot_takes_that_of_what_was_let_go_first() -> None:
    book = StateBook(5)  # two pairs
    for text in ("a", "ab", "abc"):
        written(book, 1, text)
    book.release(1)
    assert book.kept == 3
    book.share(2, b"a")
    written(book, 2)
    book.release(2)  # "a" is the latest now
    book.slots(3)
    book.slots(4)
    assert [book.longest([key]) for key in keys("a", "ab", "abc")] == [1, 0, 1]


def test_all_pairs_can_be_taken_whatever_is_kept() -> None:
    book = StateBook(7)
    for text in ("a", "ab", "abc", "abcd", "abcde"):
        written(book, 1, text)
    book.release(1)
    for owner in (2, 3, 4):
        book.share(owner, b"abcde")
    with pytest.raises(IndexError, match="3 sequences have states already"):
        book.share(5, b"abcde")
    for owner in (2, 3, 4, 2, 3, 4):
        written(book, owner)
    assert len({slot for owner in (2, 3, 4) for slot in (book.slots(owner).read, book.slots(owner).write)}) == 6


def test_in_passing_only_the_latest_is_kept_unless_another_has_begun_with_it() -> None:
    book = StateBook(9)
    written(book, 1, "a", passing=True)
    written(book, 1, "ab")
    written(book, 1, "abc", passing=True)
    assert [book.longest([key]) for key in keys("a", "ab", "abc")] == [0, 1, 1]
    book.share(2, b"abc")
    written(book, 1, "abcd", passing=True)
    book.release(2)
    written(book, 1, "abcde", passing=True)
    assert [book.longest([key]) for key in keys("ab", "abc", "abcd", "abcde")] == [1, 1, 0, 1]


def test_after_a_look_at_what_is_read_the_rest_is_forgotten() -> None:
    book = StateBook(9)
    for text in ("a", "ab"):
        written(book, 1, text)
    book.forget_kept()
    assert [book.longest([key]) for key in keys("a", "ab")] == [0, 1]


LIFE = st.tuples(st.sampled_from(["step", "keep", "pass", "fail", "release", "share", "forget"]), st.integers(0, 9))


@given(st.integers(3, 20), st.lists(LIFE, max_size=60))
def test_no_two_share_a_slot_and_none_writes_what_is_read(slots: int, life: list[tuple[str, int]]) -> None:
    """`contents[slot]` is which text's state it is: what a rank would find there. The number of a text is its length
    and who has begun it."""
    book = StateBook(slots)
    contents: dict[int, tuple[int, ...]] = {0: ()}
    texts: dict[int, tuple[int, ...]] = {}
    known: set[tuple[int, ...]] = set()
    for what, owner in life:
        if what == "release":
            book.release(owner)
            texts.pop(owner, None)
            continue
        if what == "forget":
            book.forget_kept()
            continue
        if owner not in texts and len(texts) == book.pairs:
            continue
        if what == "share" and owner not in texts:
            found = [text for text in sorted(known) if book.longest([bytes(text)])]
            if found:
                texts[owner] = found[owner % len(found)]
                book.share(owner, bytes(texts[owner]))
        text = texts.setdefault(owner, ())
        state = book.slots(owner)
        assert 0 < state.write < slots
        assert state.read != state.write
        assert contents[state.read] == text
        contents[state.write] = (*text, owner)  # also where the step fails afterwards
        if what != "fail":
            texts[owner] = (*text, owner)
            known.add(texts[owner])
            book.booked(owner, bytes(texts[owner]) if what in ("keep", "pass") else None, passing=what == "pass")
