"""Free blocks as runs of neighbours, and where the next ones are best taken. Pure.

Attention on the CPU reads a contiguous block table as one view instead of gathering it, so the block right after a
sequence's last one is preferred, and a new sequence starts in the largest free run, in its middle when another sequence
grows into that run. Every operation is O(log runs) plus the blocks it moves, a first allocation O(runs).
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Callable, Iterable, Iterator


class FreeRuns:
    """Of blocks 0 … total-1, all free at first."""

    def __init__(self, total: int) -> None:
        self.free = total
        self._starts: list[int] = [0] if total else []  # ascending
        self._ends: dict[int, int] = {0: total} if total else {}  # start -> end, exclusive

    def take(self, last: int | None, wanted: int, is_edge: Callable[[int], bool]) -> range:
        """At most so many neighbours, taken; some must be free.

        Args:
            last: the block after which they would follow best.
            is_edge: whether some sequence ends with this block and would grow into the next.
        """
        if last is not None and (end := self._ends.get(last + 1)):
            return self._take(last + 1, min(end, last + 1 + wanted))
        start = max(self._starts, key=lambda candidate: self._ends[candidate] - candidate)
        end = self._ends[start]
        if start and is_edge(start - 1):
            start = min(start + (end - start) // 2, max(start, end - wanted))
        return self._take(start, min(end, start + wanted))

    def give(self, blocks: Iterable[int]) -> None:
        """Blocks in any order that were taken."""
        for start, end in _runs(sorted(blocks)):
            self._give(start, end)

    def _take(self, start: int, end: int) -> range:
        index = bisect_right(self._starts, start) - 1
        run = self._starts.pop(index)
        run_end = self._ends.pop(run)
        for piece, piece_end in ((run, start), (end, run_end)):
            if piece < piece_end:
                insort(self._starts, piece)
                self._ends[piece] = piece_end
        self.free -= end - start
        return range(start, end)

    def _give(self, start: int, end: int) -> None:
        self.free += end - start
        index = bisect_right(self._starts, start)
        if index < len(self._starts) and self._starts[index] == end:
            end = self._ends.pop(self._starts.pop(index))
        if index and self._ends[self._starts[index - 1]] == start:
            self._ends[self._starts[index - 1]] = end
            return
        self._starts.insert(index, start)
        self._ends[start] = end


def _runs(blocks: list[int]) -> Iterator[tuple[int, int]]:
    """Ascending block numbers as (start, end) ranges."""
    start = end = -1
    for block in blocks:
        if block == end:
            end += 1
            continue
        if start >= 0:
            yield start, end
        start, end = block, block + 1
    if start >= 0:
        yield start, end
