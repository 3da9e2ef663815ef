"""What the next step computes: continuous batching with chunked prefill, first come first served. Pure.

Each step takes one token of every decoding sequence; the prefills share what the budget leaves (shares.py), so that a
short prompt waits for no long one. A new sequence is admitted, in order of arrival, when its whole prompt finds room
beside what the running prefills will still need; while the first in line lacks room, shorter ones may go before it, but
no more of them than would fill its own place. When blocks run out, the latest sequence gives up all of its blocks
and is computed again later from its token ids; so the oldest always goes on, and every sequence that fits by itself
finishes.

With prefix caching a sequence begins behind what of its tokens stands in the cache already: see contexts.py.

After a fault, sequences under suspicion run alone, one after the other, until they draw a token: one that breaks a step
again is known by that, and the others are not blamed for it.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from operator import attrgetter
from typing import Final

from lockstep_runtime.engine.block_manager import BlockManager
from lockstep_runtime.engine.client import FinishReason
from lockstep_runtime.engine.contexts import Contexts
from lockstep_runtime.engine.image_book import ImageBook
from lockstep_runtime.engine.sequence import QUARANTINE_AT, REJECT_AT, Sequence
from lockstep_runtime.engine.shares import share
from lockstep_runtime.protocol.step import SampledToken, SequenceSlice

_by_arrival = attrgetter("id")


SCORED_CHUNK: Final = 256  # tokens of a prompt in one step whose log probabilities are wanted: each costs a head


@dataclass(frozen=True, slots=True)
class SampledOutput:
    """One token let out of a step; with the first of a sequence, its prompt's tokens, if they were to be scored."""

    sequence_id: int
    token: SampledToken
    finish: FinishReason | None
    prompt: tuple[SampledToken, ...] = ()
    cached: int = 0  # tokens of the prompt that stood in the cache


class Scheduler:
    """Holds every sequence that is waiting or running. `max_sequences` is at most `max_batch_tokens`."""

    def __init__(
        self,
        *,
        max_sequences: int,
        max_batch_tokens: int,
        max_model_len: int,
        blocks: int,
        block_size: int,
        state_slots: int = 0,
        prefix_caching: bool = True,
    ) -> None:
        self._caches_prefixes = prefix_caching
        self._most_sequences = min(max_sequences, max_batch_tokens)  # so that every running one can move in a step
        self._max_batch_tokens = max_batch_tokens
        self._waiting: list[Sequence] = []  # by arrival
        self._running: list[Sequence] = []  # by arrival
        self.preemptions = 0
        self.images = ImageBook()
        self.looked_up_tokens = 0  # of sequences that began, and how many of them stood in the cache
        self.cached_tokens = 0
        self._admitted: list[int] = []
        self._lay_out(max_model_len, blocks, block_size, state_slots)

    def _lay_out(self, max_model_len: int, blocks: int, block_size: int, state_slots: int) -> None:
        self._contexts = Contexts(
            blocks=blocks, block_size=block_size, state_slots=state_slots, shared=self._caches_prefixes
        )
        self._max_sequences = min(self._most_sequences, self._contexts.states.pairs or self._most_sequences)
        self.max_model_len = min(max_model_len, blocks * block_size)

    @property
    def book(self) -> BlockManager:
        return self._contexts.book

    def forget_cached(self) -> None:
        """What no sequence holds is not to be relied on."""
        self._contexts.forget_cached()

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def fits(self, most_tokens: int) -> bool:
        """Whether a sequence of so many tokens could run by itself."""
        return most_tokens <= self.max_model_len

    def add(self, sequence: Sequence) -> None:
        insort(self._waiting, sequence, key=_by_arrival)

    def remove(self, sequence_id: int) -> None:
        """Forget a sequence, wherever it stands; an unknown one is no error. Its blocks are free for the next step."""
        self._contexts.release(sequence_id)
        self._running = [sequence for sequence in self._running if sequence.id != sequence_id]
        self._waiting = [sequence for sequence in self._waiting if sequence.id != sequence_id]

    def plan(self, prefill_tokens: int | None = None) -> list[SequenceSlice]:
        """The next step's parts; empty when there is nothing to do. `prefill_tokens`: of prompts, at most, if any
        sequence decodes; None: what the budget leaves."""
        suspect = next((one for one in (*self._running, *self._waiting) if one.fault_points >= QUARANTINE_AT), None)
        if suspect is not None:
            return self._plan_alone(suspect)
        self._admit()
        return self._plan_running(prefill_tokens)

    def apply(
        self,
        slices: list[SequenceSlice],
        sampled: Iterable[SampledToken],
        scored: Iterable[SampledToken] = (),
        put_off: Collection[int] = (),
    ) -> list[SampledOutput]:
        """Book a finished step: what it computed, the tokens it drew, and the sequences that are complete. A slice that
        was put off is planned again, as if it had not been there."""
        self.images.booked()
        running = {sequence.id: sequence for sequence in self._running}
        for part in slices:
            sequence = running.get(part.sequence_id)
            if sequence is None:  # it was cancelled meanwhile
                continue
            if part.sequence_id in put_off:
                sequence.told = False
                continue
            sequence.told = sequence.told or (part.ruled is not None and part.sample is not None)
            self._contexts.booked(sequence, len(part.tokens))
        for token in scored:
            sequence = running.get(token.sequence_id)
            if sequence is not None and token.sequence_id not in put_off:
                sequence.score(token)
        drawn = []
        for token in sampled:
            if sequence := running.get(token.sequence_id):
                finish = sequence.append(token, self.max_model_len)
                cached = sequence.cached or 0
                drawn.append(SampledOutput(sequence.id, token, finish, sequence.take_scores(), cached))
                if finish is not None:
                    self.remove(sequence.id)
        return drawn

    def fault_points(self, slices: list[SequenceSlice], points: int) -> list[Sequence]:
        """Charge a failed step to its sequences; remove and return those that have reached the limit."""
        members = {part.sequence_id for part in slices}
        rejected = []
        for sequence in (*self._running, *self._waiting):
            if sequence.id in members:
                sequence.fault_points += points
                if sequence.fault_points >= REJECT_AT:
                    rejected.append(sequence)
        for sequence in rejected:
            self.remove(sequence.id)
        return rejected

    def forget_images(self) -> None:
        """The ranks have lost what they had encoded."""
        self.images.forget((*self._running, *self._waiting))

    @property
    def image_bytes(self) -> int:
        """Of all sequences' pixels, equal ones counted once."""
        images = (image.pixels for one in (*self._running, *self._waiting) for image in one.request.images)
        return sum({pixels.digest: len(pixels.data) for pixels in images}.values())

    def held(self) -> list[SequenceSlice]:
        """What the caches hold: every sequence's last computed token, which attends to all of it."""
        return [
            SequenceSlice(
                sequence_id=sequence.id,
                position=sequence.computed - 1,
                tokens=sequence.tokens[sequence.computed - 1 : sequence.computed],
                blocks=self.book.table(sequence.id),
                state=self._contexts.states.slots(sequence.id),
            )
            for sequence in self._running
            if sequence.computed
        ]

    def start_over(self, *, max_model_len: int, blocks: int, block_size: int, state_slots: int = 0) -> list[Sequence]:
        """The caches are new: every sequence is computed again. Returns (removed) what no longer fits."""
        everyone = sorted((*self._running, *self._waiting), key=_by_arrival)
        self._lay_out(max_model_len, blocks, block_size, state_slots)
        for sequence in everyone:
            sequence.computed, sequence.keys = 0, None
        self._running = []
        self._waiting = [sequence for sequence in everyone if self.fits(sequence.most_tokens)]
        return [sequence for sequence in everyone if not self.fits(sequence.most_tokens)]

    def _plan_running(self, prefill_tokens: int | None) -> list[SequenceSlice]:
        self.images.begin(self._running)
        wanted = [self._wanted(sequence) for sequence in self._running]
        counts = share(wanted, self._budget(wanted, prefill_tokens))
        queue = list(zip(self._running, counts, strict=True))
        slices: list[SequenceSlice] = []
        while queue:
            sequence, count = queue.pop(0)
            while not self.book.grow(sequence.id, self._contexts.blocks_for(sequence.computed + count)):
                victim = queue.pop()[0] if queue else sequence
                self._preempt(victim)
                if victim is sequence:
                    return slices
            if fed := self.images.feed(sequence, count):
                slices.append(self._slice(sequence, fed))
        return slices

    def _budget(self, wanted: list[int], prefill_tokens: int | None) -> int:
        """Tokens of the next step. A stream that is computed again waits for its next token, too: nothing holds it
        back for others'."""
        decoding = wanted.count(1)
        again = any(want > 1 and one.drawn for want, one in zip(wanted, self._running, strict=True))
        if prefill_tokens is None or not decoding or again:
            return self._max_batch_tokens
        return min(self._max_batch_tokens, max(decoding + prefill_tokens, len(wanted)))

    def _wanted(self, sequence: Sequence) -> int:
        """Tokens that it would take in a step of its own. The last before a draw that may be put off comes alone: it
        may come more than once."""
        wanted = sequence.remaining if sequence.is_scored else min(sequence.remaining, SCORED_CHUNK)
        most = wanted - 1 if sequence.awaits_grammar and wanted == sequence.remaining > 1 else wanted
        return min(most, sequence.until_stop)

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._max_sequences:
            chosen = self._next_in()
            if chosen is None:
                return
            self._waiting.remove(chosen)
            insort(self._running, chosen, key=_by_arrival)
            self._admitted.append(chosen.id)
            self._begin(chosen)

    def take_admitted(self) -> list[int]:
        """Ids of the sequences that left the queue since the last call: for the first time, or again."""
        admitted, self._admitted = self._admitted, []
        return admitted

    def _begin(self, sequence: Sequence) -> None:
        """Behind what stands in the cache."""
        if self._contexts.begin(sequence) and sequence.cached is None:
            sequence.cached = sequence.computed
            self.looked_up_tokens += len(sequence.tokens)
            self.cached_tokens += sequence.computed

    def _next_in(self) -> Sequence | None:
        room = self.book.free - self._promised()
        first = self._waiting[0]
        place = self._contexts.place(first)
        if place <= room:
            return first
        most = min(room, place - first.overtaken)
        for later in self._waiting[1:] if most > 0 else ():
            blocks = self._contexts.blocks_for(len(later.tokens))
            if blocks <= most:
                first.overtaken += blocks
                return later
        return None

    def _plan_alone(self, sequence: Sequence) -> list[SequenceSlice]:
        if sequence not in self._running:
            self._waiting.remove(sequence)
            while self._contexts.states.pairs and len(self._running) >= self._max_sequences:
                self._preempt(self._running[-1])
            insort(self._running, sequence, key=_by_arrival)
            self._begin(sequence)
        self.images.begin([sequence])
        count = self.images.feed(sequence, min(self._wanted(sequence), self._max_batch_tokens))
        while not self.book.grow(sequence.id, self._contexts.blocks_for(sequence.computed + count)):
            self._preempt(next(one for one in reversed(self._running) if one is not sequence))
        return [self._slice(sequence, count)]

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self._contexts.release(sequence.id)
        sequence.computed = 0
        self._running.remove(sequence)
        self.add(sequence)

    def _promised(self) -> int:
        """Blocks that the running prefills will still take."""
        blocks_for = self._contexts.blocks_for
        return sum(max(0, blocks_for(len(one.tokens)) - self.book.held(one.id)) for one in self._running)

    def _slice(self, sequence: Sequence, count: int) -> SequenceSlice:
        end = sequence.computed + count
        draws = end == len(sequence.tokens)
        return SequenceSlice(
            sequence_id=sequence.id,
            position=sequence.computed,
            tokens=sequence.tokens[sequence.computed : end],
            blocks=self.book.table(sequence.id),
            state=self._contexts.states.slots(sequence.id),
            sample=sequence.request.sampling if draws else None,
            scoring=sequence.scoring(end),
            ruled=sequence.ruled(sequence.computed, draws=draws),
            images=sequence.images(end),
            shift=sequence.shift,
        )
