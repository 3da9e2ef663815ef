"""How long a step may take: learned from the steps before it. Pure.

A step's kind is decode or prefill, its size the tokens that are fed and the longest context that they attend to. For
each kind and size (by powers of two) the model holds a high mark of recent durations: a longer one raises it at once, a
shorter one lets it sink slowly. A size that was not seen yet is measured by the nearest one that was, scaled by how
much more work it is; both measures of size are at most linear in time. When steps take longer than expected, every
expectation is stretched for a while: a machine that is busy now is busy for the next size, too.

The engine's own delays are none of a rank's doing: `DeadlineTimer` counts only the time in which the engine got to run.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from lockstep_runtime.config import Watchdog
from lockstep_runtime.protocol.images import Pixels
from lockstep_runtime.protocol.step import SequenceSlice

CEILING_SECONDS: Final = 120.0  # of a learned deadline, and of a step of which nothing is known
SINKING: Final = 0.9  # of what a high mark is above a shorter duration, this much is left after it
LONGEST_STRETCH: Final = 4.0
WARMING_SECONDS: Final = 10.0  # the least for the first step of a kind after a process was replaced
LOOK_SECONDS: Final = 0.1  # at most, between two looks at the clock
PIXELS_PER_TOKEN: Final = 16 * 16  # a patch, which a tower works on as a model on a token
LATE_SECONDS: Final = 0.02  # a wait that ends later than this was prolonged by our own delay
STILL: Final = 0.5  # of its deadline: a rank that moved more recently is slow and does not hang


class Kind(enum.StrEnum):
    DECODE = "decode"
    PREFILL = "prefill"
    IMAGES = "images"  # a prefill that encodes images as well


class Work(msgspec.Struct, frozen=True):
    """A step's size: tokens fed, and the longest context in tokens."""

    kind: Kind
    tokens: int
    context: int


class Deadline(msgspec.Struct, frozen=True):
    """`extends`: a rank that still moves when it is over may go on, up to `ceiling`."""

    seconds: float
    ceiling: float
    extends: bool


UNKNOWN: Final = Deadline(CEILING_SECONDS, CEILING_SECONDS, extends=False)  # of a kind's first step


def work_of(slices: Sequence[SequenceSlice], images: Sequence[Pixels] = ()) -> Work:
    """The size of a step; one that prefills at all counts as a prefill. What encoding takes is at most linear in an
    image's pixels, too, for images are small."""
    kind, tokens, context = Kind.DECODE, 0, 1
    for part in slices:  # one loop: every step waits for this
        fed = len(part.tokens)
        tokens += fed
        context = max(context, part.position + fed)
        if part.is_prefill:
            kind = Kind.PREFILL
    if images:
        kind = Kind.IMAGES
        tokens += sum(image.height * image.width for image in images) // PIXELS_PER_TOKEN
    return Work(kind, max(tokens, 1), context)


class _Mark(msgspec.Struct, frozen=True):
    """The high mark of one size, with the work that it was last seen for."""

    seconds: float
    tokens: int
    context: int


_Size = tuple[int, int]


class DeadlineModel:
    """`learn` from every step that was done in time, ask `deadline` before every step."""

    def __init__(self, settings: Watchdog) -> None:
        self._fixed, self._floor, self._factor = settings.step_timeout, settings.floor, settings.factor
        self._marks: dict[Kind, dict[_Size, _Mark]] = {kind: {} for kind in Kind}
        self._stretch = 1.0
        self._cold: set[Kind] = set()

    def deadline(self, work: Work) -> Deadline:
        """For a step of this size, in seconds."""
        if self._fixed is not None:
            return Deadline(self._fixed, self._fixed, extends=False)
        expected = self.expected(work)
        if expected is None:
            return UNKNOWN
        least = max(self._floor, WARMING_SECONDS) if work.kind in self._cold else self._floor
        return Deadline(min(max(expected * self._factor, least), CEILING_SECONDS), CEILING_SECONDS, extends=True)

    def expected(self, work: Work) -> float | None:
        """Seconds; None when no step of this kind was seen yet."""
        marks = self._marks[work.kind]
        if not marks:
            return None
        size = _size(work)
        mark = marks.get(size) or marks[_nearest(size, marks)]
        more = max(1.0, work.tokens / mark.tokens) * max(1.0, work.context / mark.context)
        return mark.seconds * more * self._stretch

    def learn(self, work: Work, seconds: float) -> None:
        """A step of this size was done in so many seconds."""
        if (expected := self.expected(work)) is not None:
            surprise = min(seconds * self._stretch / max(expected, 1e-6), LONGEST_STRETCH)
            self._stretch = max(surprise, 1.0 + (self._stretch - 1.0) * SINKING)
        self._cold.discard(work.kind)
        marks, size = self._marks[work.kind], _size(work)
        before = marks[size].seconds if size in marks else seconds
        high = max(seconds, seconds + (before - seconds) * SINKING)
        marks[size] = _Mark(high, work.tokens, work.context)

    def processes_changed(self) -> None:
        """A rank's process is new: its first steps touch everything for the first time."""
        self._cold = set(Kind)


def _size(work: Work) -> _Size:
    return work.tokens.bit_length(), work.context.bit_length()


def _nearest(size: _Size, others: Iterable[_Size]) -> _Size:
    return min(others, key=lambda other: (abs(other[0] - size[0]) + abs(other[1] - size[1]), other))


class DeadlineTimer:
    """How much of a deadline is left. Sleep for `next_wait()` seconds, then call `elapsed` with the time."""

    def __init__(self, seconds: float, now: float) -> None:
        self.allowed = seconds
        self.waited = 0.0
        self.delayed = 0.0  # seconds in which the engine was kept from looking
        self._looked = now
        self._wait = 0.0

    @property
    def is_over(self) -> bool:
        return self.waited >= self.allowed - 1e-9

    def next_wait(self) -> float:
        self._wait = max(0.0, min(LOOK_SECONDS, self.allowed - self.waited))
        return self._wait

    def elapsed(self, now: float) -> None:
        """Of a wait that took too long only what was meant counts: the answer may be here, unread."""
        passed = max(0.0, now - self._looked)
        self._looked = now
        counted = passed if passed <= self._wait + LATE_SECONDS else self._wait
        self.waited += counted
        self.delayed += passed - counted

    def extend(self, seconds: float) -> None:
        self.allowed += seconds


def extension(deadline: Deadline, timer: DeadlineTimer, moved_ago: float | None) -> float:
    """Seconds more for a step whose deadline is over; 0: it hangs. `moved_ago`: since any rank last got further."""
    still = deadline.seconds * STILL
    if not deadline.extends or moved_ago is None or moved_ago >= still:
        return 0.0
    return max(0.0, min(still - moved_ago, deadline.ceiling - timer.waited))
