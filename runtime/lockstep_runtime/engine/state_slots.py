"""Who reads and writes which slots of recurrent state, and which of them stand for the beginning of a text. Pure.

A step reads a sequence's state from one slot and writes it to another; what was written is read next once the step is
booked. So a step that is repeated after a fault reads what it read before, and writes it to where nobody has read from.
And to keep a state takes no copy: its slot gets a key (`prefix_keys`) and is written no more. Other sequences that
begin with the same tokens read it as they would read slot 0, which is what every text begins with.

What nobody reads is kept until its slot is needed; the one that was let go first is taken first.
"""

from __future__ import annotations

from collections.abc import Sequence

from lockstep_runtime.protocol.step import NO_STATE, StateSlots


class StateBook:
    """Slots 1 … `slots` - 1: two for each of as many sequences as there are `pairs`; whichever of them are not in use
    keep states. Without slots nobody needs any."""

    def __init__(self, slots: int) -> None:
        self.pairs = max(0, (slots - 1) // 2)
        self._empty = list(range(slots - 1, 0, -1))  # low ones are given first, and what was given back last
        self._reads: dict[int, int] = {}  # by owner
        self._writes: dict[int, int] = {}  # by owner, from its plan to its booking
        self._readers = [0] * slots
        self._slot_of: dict[bytes, int] = {}  # by key
        self._key_of: dict[int, bytes] = {}
        self._kept: dict[int, None] = {}  # with a key and without a reader, in the order in which they were let go
        self._passing: dict[int, bytes] = {}  # by owner, what it keeps until it has a later one

    @property
    def kept(self) -> int:
        """How many slots are in use for nothing else."""
        return len(self._kept)

    def slots(self, owner: int) -> StateSlots:
        """For the sequence's next step.

        Raises:
            IndexError: more sequences than pairs.
        """
        if not self.pairs:
            return NO_STATE
        if owner not in self._reads:
            self._begin(owner, 0)
        if owner not in self._writes:
            self._writes[owner] = self._take()
        return StateSlots(self._reads[owner], self._writes[owner])

    def booked(self, owner: int, key: bytes | None = None, *, passing: bool = False) -> None:
        """A step of the sequence is done: what it wrote is read next. With a key it can be shared, and is kept when the
        sequence goes on; `passing`: only until its next such one, unless another sequence has begun with it."""
        if owner not in self._writes:
            return
        self._let_go(self._reads[owner])
        written = self._reads[owner] = self._writes.pop(owner)
        self._readers[written] = 1
        if key is None:
            return
        if passing:
            self._drop(self._passing.pop(owner, None))
        if key not in self._slot_of:
            self._slot_of[key], self._key_of[written] = written, key
            if passing:
                self._passing[owner] = key

    def longest(self, keys: Sequence[bytes]) -> int:
        """With how many of these blocks the longest text begins whose state is here."""
        return next((count for count in range(len(keys), 0, -1) if keys[count - 1] in self._slot_of), 0)

    def share(self, owner: int, key: bytes) -> None:
        """Begin a new sequence with this state, which `longest` has found.

        Raises:
            IndexError: more sequences than pairs.
            ValueError: it has begun.
        """
        if owner in self._reads:
            raise ValueError(f"sequence {owner} has begun already")
        self._begin(owner, self._slot_of[key])
        self._passing = {one: passed for one, passed in self._passing.items() if passed != key}

    def release(self, owner: int) -> None:
        """Give back all that the sequence has; one that has nothing is no error."""
        self._passing.pop(owner, None)
        if (written := self._writes.pop(owner, None)) is not None:
            self._empty.append(written)
        if (read := self._reads.pop(owner, None)) is not None:
            self._let_go(read)

    def forget_kept(self) -> None:
        """The contents of what nobody reads are not to be relied on."""
        for slot in list(self._kept):
            self._forget(slot)

    def _begin(self, owner: int, slot: int) -> None:
        if len(self._reads) == self.pairs:
            raise IndexError(f"{self.pairs} sequences have states already")
        self._reads[owner] = slot
        self._readers[slot] += 1
        self._kept.pop(slot, None)

    def _take(self) -> int:
        if not self._empty:
            self._forget(next(iter(self._kept)))
        return self._empty.pop()

    def _let_go(self, slot: int) -> None:
        self._readers[slot] -= 1
        if slot and not self._readers[slot]:
            if slot in self._key_of:
                self._kept[slot] = None
            else:
                self._empty.append(slot)

    def _drop(self, key: bytes | None) -> None:
        slot = None if key is None else self._slot_of.get(key)
        if slot in self._kept:
            self._forget(slot)

    def _forget(self, slot: int) -> None:
        del self._kept[slot]
        del self._slot_of[self._key_of.pop(slot)]
        self._empty.append(slot)
