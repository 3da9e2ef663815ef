"""A fake rank's recurrent states: each is of the tokens that it was made from."""

from __future__ import annotations

from collections.abc import Sequence

from lockstep_runtime.protocol.step import PROBE_STATE_SLOTS, SequenceSlice
from lockstep_runtime.recovery.self_test import PROMPT


class ToyStates:
    """By slot; one that nobody has written is missing."""

    def __init__(self) -> None:
        self.held: dict[int, Sequence[int | None]] = {0: ()}

    def fill_for_probe(self, slots: int) -> None:
        """`slots`: of the cache."""
        if slots:
            self.held[slots - PROBE_STATE_SLOTS] = range(len(PROMPT))

    def advance(self, part: SequenceSlice, context: Sequence[int | None], tokens: Sequence[int]) -> None:
        """From the slot that is read to the one that is written. `context`: what the blocks hold before `tokens`."""
        read, written = part.state.read, part.state.write
        assert read in self.held, "a state is read that nobody wrote"
        assert list(self.held[read]) == list(context), "the state of another text is read"
        assert written not in (0, read), "a state is written that has to be read again"
        self.held[written] = (*context, *tokens)

    def spoil(self, slot: int, contents: int | None) -> None:
        """What stands there is of nothing any more."""
        if slot:
            self.held[slot] = [contents] * max(1, len(self.held.get(slot, ())))


def check_states(parts: Sequence[SequenceSlice]) -> None:
    """Sequences may read one state, but who writes one has it alone."""
    written = [part.state.write for part in parts]
    assert len(set(written)) == len(written), "two sequences write one state"
    assert not {part.state.read for part in parts} & set(written), "a state is written that another sequence reads"
