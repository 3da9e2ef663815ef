"""The block book: nothing lost, nothing used twice, and laid out contiguously."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep_runtime.engine.block_manager import BlockManager

OPERATIONS = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 12)), max_size=200)


@given(total=st.integers(0, 60), operations=OPERATIONS)
@settings(max_examples=500, deadline=None)
def test_no_block_is_lost_or_used_twice(total: int, operations: list[tuple[int, int]]) -> None:
    book = BlockManager(total)
    wanted: dict[int, int] = {}
    for owner, blocks in operations:
        if blocks == 0:
            book.release(owner)
            wanted.pop(owner, None)
            continue
        before, free = book.table(owner), book.free
        grown = book.grow(owner, blocks)
        assert grown == (blocks - len(before) <= free)
        after = book.table(owner)
        assert after[: len(before)] == before
        if grown:
            wanted[owner] = max(blocks, wanted.get(owner, 0))
        else:
            assert after == before
        held = [block for one in range(8) for block in book.table(one)]
        assert len(held) == len(set(held)) == book.used == sum(wanted.values())
        assert set(held) <= set(range(total))
    for owner in range(8):
        book.release(owner)
    assert book.free == total
    assert book.grow(0, total)
    assert sorted(book.table(0)) == list(range(total))


def test_a_sequence_alone_is_contiguous_however_it_grows() -> None:
    book = BlockManager(100)
    for blocks in range(1, 101):
        assert book.grow(1, blocks)
    assert book.table(1) == list(range(100))


def test_sequences_that_grow_in_turn_stay_contiguous_while_there_is_room() -> None:
    book = BlockManager(256)
    for blocks in range(1, 17):
        for owner in range(8):
            assert book.grow(owner, blocks)
    for owner in range(8):
        table = book.table(owner)
        assert table == list(range(table[0], table[0] + 16)), owner


def test_a_table_is_a_copy() -> None:
    book = BlockManager(4)
    book.grow(1, 2)
    book.table(1).append(99)
    assert book.table(1) == [0, 1]


def test_releasing_an_unknown_owner_changes_nothing() -> None:
    book = BlockManager(4)
    book.release(5)
    assert (book.free, book.used) == (4, 0)
