"""Who holds which slots of recurrent state: two each, one that is read and one that is written. Pure.

The two change places when a step is booked. So a step that is repeated after a fault reads what it read before, and
writes it to where nobody has read from.
"""

from __future__ import annotations

from lockstep_runtime.protocol.step import NO_STATE, StateSlots


class StateBook:
    """Slots 1 … `slots` - 1, in pairs; slot 0 is what every sequence begins with. Without slots nobody needs any."""

    def __init__(self, slots: int) -> None:
        self._free = [(first, first + 1) for first in range(1, slots - 1, 2)]
        self._free.reverse()  # low ones are given first
        self.pairs = len(self._free)
        self._pairs: dict[int, tuple[int, int]] = {}
        self._current: dict[int, StateSlots] = {}

    def slots(self, owner: int) -> StateSlots:
        """For the sequence's next step.

        Raises:
            IndexError: more sequences than pairs.
        """
        if not self.pairs:
            return NO_STATE
        if owner not in self._current:
            pair = self._pairs[owner] = self._free.pop()
            self._current[owner] = StateSlots(0, pair[0])
        return self._current[owner]

    def booked(self, owner: int) -> None:
        """A step of the sequence is done: what it wrote is read next."""
        if owner in self._current:
            first, second = self._pairs[owner]
            written = self._current[owner].write
            self._current[owner] = StateSlots(written, second if written == first else first)

    def release(self, owner: int) -> None:
        """Give them back; one who has none is no error."""
        self._current.pop(owner, None)
        if pair := self._pairs.pop(owner, None):
            self._free.append(pair)
