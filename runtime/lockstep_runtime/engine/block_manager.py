"""The book of KV-cache blocks: who holds which, laid out so that a sequence's blocks follow one another.

Attention on the CPU reads a contiguous block table as one view instead of gathering it, so the book prefers the block
right after a sequence's last one, and starts a new sequence in the largest free run, in its middle when another
sequence grows into that run. Pure; every operation is O(log free runs) plus the blocks it moves, a first allocation
O(free runs).
"""

from __future__ import annotations

from bisect import bisect_right, insort


class BlockManager:
    """Blocks 0 … total-1, each free or held by exactly one sequence."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._tables: dict[int, list[int]] = {}
        self._starts: list[int] = [0] if total else []  # of the free runs, ascending
        self._ends: dict[int, int] = {0: total} if total else {}  # start -> end, exclusive
        self._free = total

    @property
    def free(self) -> int:
        return self._free

    @property
    def used(self) -> int:
        return self.total - self._free

    def held(self, owner: int) -> int:
        """How many blocks the sequence holds."""
        return len(self._tables.get(owner, ()))

    def table(self, owner: int) -> list[int]:
        """The sequence's blocks in the order of its tokens; a copy."""
        return list(self._tables.get(owner, ()))

    def grow(self, owner: int, blocks: int) -> bool:
        """Make the sequence's table `blocks` long at least; False, and nothing changed, when too few are free."""
        missing = blocks - self.held(owner)
        if missing > self._free:
            return False
        if missing > 0:
            table = self._tables.setdefault(owner, [])
            while missing:
                start, end = self._pick(table, missing)
                self._take(start, end)
                table.extend(range(start, end))
                missing -= end - start
        return True

    def release(self, owner: int) -> None:
        """Give back all that the sequence holds."""
        for start, end in _runs(sorted(self._tables.pop(owner, ()))):
            self._give(start, end)

    def _pick(self, table: list[int], wanted: int) -> tuple[int, int]:
        """A free range of at most `wanted` blocks."""
        if table and (end := self._ends.get(table[-1] + 1)):
            start = table[-1] + 1
            return start, min(end, start + wanted)
        start = max(self._starts, key=lambda candidate: self._ends[candidate] - candidate)
        end = self._ends[start]
        if start and self._is_edge(start - 1):
            start = min(start + (end - start) // 2, max(start, end - wanted))
        return start, min(end, start + wanted)

    def _is_edge(self, block: int) -> bool:
        """Whether some sequence ends with this block and would grow into the next."""
        return any(table and table[-1] == block for table in self._tables.values())

    def _take(self, start: int, end: int) -> None:
        index = bisect_right(self._starts, start) - 1
        run = self._starts.pop(index)
        run_end = self._ends.pop(run)
        for piece, piece_end in ((run, start), (end, run_end)):
            if piece < piece_end:
                insort(self._starts, piece)
                self._ends[piece] = piece_end
        self._free -= end - start

    def _give(self, start: int, end: int) -> None:
        self._free += end - start
        index = bisect_right(self._starts, start)
        if index < len(self._starts) and self._starts[index] == end:
            end = self._ends.pop(self._starts.pop(index))
        if index and self._ends[self._starts[index - 1]] == start:
            self._ends[self._starts[index - 1]] = end
            return
        self._starts.insert(index, start)
        self._ends[start] = end


def _runs(blocks: list[int]) -> list[tuple[int, int]]:
    """Ascending block numbers as (start, end) ranges."""
    runs: list[tuple[int, int]] = []
    for block in blocks:
        if runs and runs[-1][1] == block:
            runs[-1] = (runs[-1][0], block + 1)
        else:
            runs.append((block, block + 1))
    return runs
