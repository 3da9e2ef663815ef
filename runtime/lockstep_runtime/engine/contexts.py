"""What the layers remember of the sequences: blocks of keys and values, slots of recurrent state, and what of both is
shared by texts that begin alike. Pure.

With prefix caching a sequence begins behind the full blocks of its tokens that stand in the cache already, whoever had
them computed, and itself before it gave its blocks up. A block is entered when the step that has filled it is booked.
Of a model with recurrent states it begins behind the longest beginning of which both the blocks and the state are here.
A state is of all that was computed, so it can be kept only where a chunk ends: see `stops`.
"""

from __future__ import annotations

from typing import Final

from lockstep_runtime.engine.block_manager import BlockManager
from lockstep_runtime.engine.prefix_keys import PrefixKeys
from lockstep_runtime.engine.sequence import Sequence
from lockstep_runtime.engine.state_slots import StateBook

EVERY: Final = 32  # blocks of a long prompt: a state is kept of each such part's end
WORTHWHILE: Final = 4  # blocks: a chunk that ends early costs a step, and a state that saves less is not worth it


class Contexts:
    """Of one layout of the caches."""

    def __init__(self, *, blocks: int, block_size: int, state_slots: int, shared: bool) -> None:
        self.book = BlockManager(blocks)
        self.states = StateBook(state_slots)
        self.block_size = block_size
        self._shared = shared

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def place(self, sequence: Sequence) -> int:
        """Free blocks that a sequence that waits takes up to its last token."""
        blocks = self.blocks_for(len(sequence.tokens))
        if not self._shared:
            return blocks
        keys = self._shareable(sequence)
        found = self.book.match(keys)
        return blocks - self.book.held_by_others(found[: self._usable(keys[: len(found)])])

    def begin(self, sequence: Sequence) -> bool:
        """Behind what stands in the cache; whether there was a look."""
        sequence.stops = ()
        if not self._shared:
            return False
        keys = self._shareable(sequence)
        found = self.book.match(keys)
        count = self._usable(keys[: len(found)])
        self.book.share(sequence.id, found[:count])
        sequence.computed = count * self.block_size
        if self.states.pairs:
            if count:
                self.states.share(sequence.id, keys[count - 1])
            wanted = stops(count, len(found), (len(sequence.tokens) - 1) // self.block_size)
            sequence.stops = tuple(stop * self.block_size for stop in wanted)
        return True

    def booked(self, sequence: Sequence, count: int) -> None:
        """So many more of its tokens are computed: what is full now can be shared, and its state where it is."""
        before = sequence.computed // self.block_size
        sequence.computed += count
        full, more = divmod(sequence.computed, self.block_size)
        key = None
        if self._shared and full > before:
            keys = self._keys(sequence).of(sequence.tokens, full)
            for index in range(before, full):
                self.book.enter(sequence.id, index, keys[index])
            key = None if more else keys[-1]
        self.states.booked(sequence.id, key, passing=sequence.computed not in sequence.stops)

    def release(self, sequence_id: int) -> None:
        """Whatever the layers remember of it."""
        self.book.release(sequence_id)
        self.states.release(sequence_id)

    def forget_cached(self) -> None:
        """What no sequence holds is not to be relied on."""
        self.book.forget_cached()
        self.states.forget_kept()

    def _usable(self, keys: list[bytes]) -> int:
        """Behind how many blocks of these, which are here, a sequence can begin."""
        return self.states.longest(keys) if self.states.pairs else len(keys)

    def _shareable(self, sequence: Sequence) -> list[bytes]:
        """Keys of the blocks that need not be computed again: something has to be, from which a token is drawn, and
        everything that is to be scored."""
        most = len(sequence.tokens) if sequence.is_scored else sequence.scored
        return self._keys(sequence).of(sequence.tokens, (most - 1) // self.block_size)

    def _keys(self, sequence: Sequence) -> PrefixKeys:
        if sequence.keys is None:
            request = sequence.request
            images = [image.span for image in request.images]
            sequence.keys = PrefixKeys(request.cache_salt, self.block_size, images)
        return sequence.keys


def stops(begun: int, known: int, whole: int) -> list[int]:
    """Where a sequence's chunks are to end for their states' sake; all in blocks, from a text's beginning.

    It begins behind `begun` of `known` blocks that it shares with an earlier text, and has `whole` ones before its last
    token. What two texts have had in common a third may begin with, too; behind the whole prompt comes a conversation's
    next turn; and the ends of long parts serve texts that part from this one before.
    """
    found = [*range(begun - begun % EVERY + EVERY, whole + 1, EVERY)]
    for stop in (known, whole):
        before = max((one for one in found if one <= stop), default=begun)
        if stop - before >= WORTHWHILE:
            found.append(stop)
    return sorted(found)
