"""The slow comparison of a rank's weights with the checksums taken when they were loaded.

A wrong shard's contribution is summed into all ranks alike, so that no comparison between ranks can show it. One tensor
after the other is looked at, evenly over the interval and a few milliseconds at a time, between steps.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Final

from lockstep_runtime.weights.weight import StoredTable, Weight

INTERVAL_VARIABLE: Final = "LOCKSTEP_SCRUB_SECONDS"  # for all weights once; 0 switches it off
INTERVAL_SECONDS: Final = 300.0
MOST_NAMES: Final = 8  # of what a weight is made of, in a sentence
Parts = Generator[None, None, str]


@dataclass(frozen=True, slots=True)
class Watched:
    """One tensor: how its checksum is taken, and what it was after loading."""

    name: str
    parts: Callable[[], Parts]
    expected: str


class CorruptionError(RuntimeError):
    """A tensor is no longer what was loaded."""


class Scrub:
    """Takes turns; `now` is monotonic seconds."""

    def __init__(self, watched: Iterable[Watched], interval: float, now: float) -> None:
        self._watched = list(watched)
        self._pause = interval / max(1, len(self._watched))
        self._next = 0
        self._due = now + self._pause
        self._under_way: Parts | None = None
        self.rounds = 0  # complete ones

    def wait(self, now: float) -> float | None:
        """Seconds until the next turn is due; None: never."""
        return max(0.0, self._due - now) if self._watched and self._pause > 0 else None

    def turn(self, now: float) -> None:
        """Look at the next few megabytes.

        Raises:
            CorruptionError: naming the tensor.
        """
        one = self._watched[self._next]
        if self._under_way is None:
            self._under_way = one.parts()
        try:
            next(self._under_way)
        except StopIteration as end:
            self._under_way = None
            self._due = max(now, self._due + self._pause)
            self._next = (self._next + 1) % len(self._watched)
            self.rounds += self._next == 0
            if end.value != one.expected:
                raise CorruptionError(f"the weights of {one.name} are no longer what was loaded") from None

    def whole_round(self) -> int:
        """Look at every tensor now; how many there were.

        Raises:
            CorruptionError: naming the tensor.
        """
        for one in self._watched:
            if _exhaust(one.parts()) != one.expected:
                raise CorruptionError(f"the weights of {one.name} are no longer what was loaded")
        return len(self._watched)


def watch(
    weights: Iterable[Weight | StoredTable], known: Callable[[Weight | StoredTable], str | None]
) -> list[Watched]:
    """All of a rank's weights, just loaded. `known` gives a checksum that need not be taken again."""
    return [
        Watched(
            name_of(weight),
            weight.checksum_in_parts,
            known(weight) or _exhaust(weight.checksum_in_parts()),
        )
        for weight in weights
    ]


def name_of(weight: Weight | StoredTable) -> str:
    """As the checkpoint calls what it is made of."""
    names = list(dict.fromkeys(tensor_slice.tensor for tensor_slice in weight.slices))
    if len(names) <= MOST_NAMES:
        return " + ".join(names)
    return f"{names[0]} and {len(names) - 1} more"


def _exhaust(parts: Parts) -> str:
    while True:
        try:
            next(parts)
        except StopIteration as end:
            return str(end.value)
