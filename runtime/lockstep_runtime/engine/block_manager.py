"""The book of KV-cache blocks: which sequences hold which, and what prefixes of prompts stand in them. Pure.

A full block whose contents are known by their key (`prefix_keys`) can be shared: a sequence that begins with the same
tokens begins its table with the same blocks. One that nobody holds keeps its contents until its place is needed; the
one that was let go first is taken first, and of a sequence's blocks the last, since a block is found by way of those
before it. See `free_runs` for where a sequence's further blocks are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from lockstep_runtime.engine.free_runs import FreeRuns

AT_ONCE: Final = 16  # blocks whose contents are forgotten together, so that what grows into them stays contiguous
AT_ONCE_SHARE: Final = 32  # but no more of a small cache than this part


class BlockManager:
    """Blocks 0 … total-1, each free, held by sequences, or cached: held by nobody and with contents worth keeping."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._empty = FreeRuns(total)
        self._tables: dict[int, list[int]] = {}
        self._holders = [0] * total
        self._block_of: dict[bytes, int] = {}  # by key
        self._key_of: dict[int, bytes] = {}
        self._cached: dict[int, None] = {}  # in the order in which they were let go
        self._at_once = max(1, min(AT_ONCE, total // AT_ONCE_SHARE))

    @property
    def free(self) -> int:
        """Those that a sequence can get, what is cached included."""
        return self._empty.free + len(self._cached)

    @property
    def used(self) -> int:
        return self.total - self.free

    @property
    def cached(self) -> int:
        return len(self._cached)

    def held(self, owner: int) -> int:
        """How many blocks the sequence holds."""
        return len(self._tables.get(owner, ()))

    def table(self, owner: int) -> list[int]:
        """The sequence's blocks in the order of its tokens; a copy."""
        return list(self._tables.get(owner, ()))

    def grow(self, owner: int, blocks: int) -> bool:
        """Make the sequence's table `blocks` long at least; False, and nothing changed, when too few are free."""
        missing = blocks - self.held(owner)
        if missing > self.free:
            return False
        if missing > 0:
            table = self._tables.setdefault(owner, [])
            self._make_room(missing)
            while missing:
                taken = self._empty.take(table[-1] if table else None, missing, self._is_edge)
                for block in taken:
                    self._holders[block] = 1
                table.extend(taken)
                missing -= len(taken)
        return True

    def release(self, owner: int) -> None:
        """Give back all that the sequence holds."""
        empty = []
        for block in reversed(self._tables.pop(owner, [])):
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if block in self._key_of:
                self._cached[block] = None
            else:
                empty.append(block)
        self._empty.give(empty)

    def enter(self, owner: int, index: int, key: bytes) -> None:
        """The sequence's block of this index is full, and this is the key of its contents. If they stand in another
        block already, that one goes on being the one to share."""
        block = self._tables[owner][index]
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key], self._key_of[block] = block, key

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks with these contents, as far as there are any."""
        blocks = []
        for key in keys:
            if (block := self._block_of.get(key)) is None:
                break
            blocks.append(block)
        return blocks

    def held_by_others(self, blocks: Iterable[int]) -> int:
        """How many of these have a holder: to share them takes nothing of what is free."""
        return sum(self._holders[block] > 0 for block in blocks)

    def share(self, owner: int, blocks: Sequence[int]) -> None:
        """Begin a new sequence's table with these, which `match` has found.

        Raises:
            ValueError: it has a table.
        """
        if self.held(owner):
            raise ValueError(f"sequence {owner} has begun already")
        for block in blocks:
            self._holders[block] += 1
            self._cached.pop(block, None)
        self._tables[owner] = list(blocks)

    def forget_cached(self) -> None:
        """The contents of what nobody holds are not to be relied on."""
        self._forget(list(self._cached))

    def _make_room(self, missing: int) -> None:
        short = missing - self._empty.free
        if short > 0:
            oldest = iter(self._cached)
            count = min(max(short, self._at_once), len(self._cached))
            self._forget([next(oldest) for _ in range(count)])

    def _forget(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            del self._cached[block]
            del self._block_of[self._key_of.pop(block)]
        self._empty.give(blocks)

    def _is_edge(self, block: int) -> bool:
        """Whether some sequence ends with this block and would grow into the next."""
        return any(table and table[-1] == block for table in self._tables.values())
