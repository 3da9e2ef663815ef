"""The block book: nothing lost, nothing used twice, and laid out contiguously."""

from __future__ import annotations

from itertools import pairwise

import pytest
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


def key(*path: int) -> bytes:
    return bytes(path)


class World:
    """The same in a simple form: what stands in each block, and who holds which."""

    def __init__(self, total: int) -> None:
        self.book = BlockManager(total)
        self.contents: dict[int, bytes] = {}
        self.path: dict[int, list[int]] = {}  # of each owner, what its blocks are to hold
        self.full: dict[int, int] = {}  # of each owner, how many blocks do

    def begin(self, owner: int, path: list[int]) -> None:
        self.release(owner)
        keys = [key(*path[: end + 1]) for end in range(len(path))]
        blocks = self.book.match(keys)
        assert [self.contents[block] for block in blocks] == keys[: len(blocks)]
        mine = {block for one in self.path for block in self.book.table(one)}
        assert self.book.held_by_others(blocks) == len(mine & set(blocks))
        self.book.share(owner, blocks)
        self.path[owner], self.full[owner] = path, len(blocks)

    def grow(self, owner: int) -> None:
        """By one, and fill it."""
        if owner not in self.path or self.full[owner] == len(self.path[owner]):
            return
        before, index = self.book.table(owner), self.full[owner]
        held = {block for one in self.path for block in self.book.table(one)}
        free = self.book.free
        if not self.book.grow(owner, index + 1):
            assert free == 0
            assert self.book.table(owner) == before
            return
        block = self.book.table(owner)[index]
        assert block not in held
        self.contents[block] = key(*self.path[owner][: index + 1])
        self.book.enter(owner, index, self.contents[block])
        self.full[owner] += 1

    def release(self, owner: int) -> None:
        self.book.release(owner)
        self.path.pop(owner, None)

    def check(self) -> None:
        tables = [self.book.table(owner) for owner in self.path]
        held = {block for table in tables for block in table}
        assert all(len(set(table)) == len(table) for table in tables)
        assert (self.book.used, self.book.free) == (len(held), self.book.total - len(held))
        assert self.book.cached <= self.book.free


@given(total=st.integers(1, 24), data=st.data())
@settings(max_examples=300, deadline=None)
def test_what_is_shared_holds_what_it_is_shared_for(total: int, data: st.DataObject) -> None:
    world = World(total)
    for _ in range(data.draw(st.integers(0, 60))):
        owner = data.draw(st.integers(0, 5))
        match data.draw(st.sampled_from(["begin", "grow", "grow", "grow", "release", "forget"])):
            case "begin":
                world.begin(owner, data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=8)))
            case "grow":
                world.grow(owner)
            case "release":
                world.release(owner)
            case _:
                world.book.forget_cached()
                assert world.book.cached == 0
        world.check()
    for owner in range(6):
        world.release(owner)
    assert world.book.free == total
    assert world.book.grow(9, total)
    assert sorted(world.book.table(9)) == list(range(total))
    assert world.book.cached == 0


def filled(book: BlockManager, owner: int, *path: int) -> list[int]:
    book.grow(owner, len(path))
    for index in range(len(path)):
        book.enter(owner, index, key(*path[: index + 1]))
    return book.table(owner)


def keys_of(*path: int) -> list[bytes]:
    return [key(*path[: end + 1]) for end in range(len(path))]


def test_contents_outlive_their_holder_until_their_place_is_needed() -> None:
    book = BlockManager(10)
    first, second = filled(book, 1, 1, 2, 3), filled(book, 2, 4, 5, 6)
    book.release(1)
    book.release(2)
    assert book.grow(3, 5)  # four are empty
    assert book.match(keys_of(1, 2, 3)) == first[:2]  # the last block of the one that was let go first
    assert book.match(keys_of(4, 5, 6)) == second
    book.share(4, book.match(keys_of(1, 2)))
    book.release(4)
    assert book.grow(5, 3)
    assert book.match(keys_of(1, 2)) == first[:2]  # used since
    assert book.match(keys_of(4, 5, 6)) == []


def test_of_two_blocks_with_the_same_contents_the_first_is_shared() -> None:
    book = BlockManager(8)
    first = filled(book, 1, 1, 2)
    filled(book, 2, 1, 2)
    assert book.match(keys_of(1, 2)) == first
    book.release(2)
    assert (book.free, book.cached) == (6, 0)


def test_what_grows_into_forgotten_blocks_stays_contiguous() -> None:
    book = BlockManager(64 * 32)
    for owner in range(64):
        filled(book, owner, *[owner] * 32)
    for owner in range(64):
        book.release(owner)
    assert book.cached == book.total
    for blocks in range(1, 33):
        book.grow(99, blocks)
    table = book.table(99)
    assert sum(after != before + 1 for before, after in pairwise(table)) == 1  # two runs


def test_a_table_that_was_begun_is_begun_once() -> None:
    book = BlockManager(4)
    book.grow(1, 1)
    with pytest.raises(ValueError, match="has begun already"):
        book.share(1, [])
