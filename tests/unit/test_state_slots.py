"""Slots of recurrent state: a step never writes what it reads, and nobody writes what another will read."""

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


@given(st.integers(3, 20), st.lists(st.tuples(st.sampled_from(["step", "fail", "release"]), st.integers(0, 9))))
def test_no_two_share_a_slot_and_none_writes_what_is_read(slots: int, life: list[tuple[str, int]]) -> None:
    """`contents[slot]` is whose state it is and after how many steps: what a rank would find there."""
    book = StateBook(slots)
    contents: dict[int, tuple[int, int]] = {}
    done: dict[int, int] = {}
    for what, owner in life:
        if what == "release":
            book.release(owner)
            done.pop(owner, None)
            continue
        if owner not in done and len(done) == book.pairs:
            continue
        steps = done.setdefault(owner, 0)
        state = book.slots(owner)
        assert 0 < state.write < slots
        assert state.read != state.write
        assert state.read == 0 if not steps else contents[state.read] == (owner, steps)
        contents[state.write] = (owner, steps + 1)  # also where the step fails afterwards
        if what == "step":
            book.booked(owner)
            done[owner] = steps + 1
