"""Proof before use: a fixed token is decoded on a newly made group, and its fingerprint must be that of the first time.

A shard that differs from what was loaded changes the sum of all ranks, so fingerprints agree with each other and yet
differ from the remembered one. What is remembered counts as long as one process is left that was there.

Streams wait for it, so it is the shortest step there is, and draws nothing: no fingerprint covers the logits. Its
context stands in a block of the cache that is nobody's and that every rank fills with the same numbers each time: with
one token alone attention would have nothing to choose from. A group that serves nobody yet runs a prefill step as well,
so that the engine knows how long those take before the first request may hang in one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from lockstep_runtime.protocol.step import NO_STATE, SamplingParams, SequenceSlice, StateSlots

SEQUENCE: Final = 0  # no request's: those count from 1
PROMPT: Final = [1, 2, 3]  # token ids that every vocabulary has
PROBE_BLOCKS: Final = 1  # of the cache, behind those of requests
GREEDY: Final = SamplingParams(temperature=0)


def probe(block: int, state_slots: int = 0) -> list[SequenceSlice]:
    """A decode step behind what the block was filled with, and the slot behind the `state_slots` of requests."""
    state = StateSlots(state_slots, state_slots + 1) if state_slots else NO_STATE
    return [SequenceSlice(sequence_id=SEQUENCE, position=len(PROMPT), tokens=[4], blocks=[block], state=state)]


def warmup_step(block: int, state_slots: int = 0) -> list[SequenceSlice]:
    """A prefill step over them."""
    state = StateSlots(0, state_slots + 1) if state_slots else NO_STATE
    return [SequenceSlice(sequence_id=SEQUENCE, position=0, tokens=PROMPT, blocks=[block], state=state, sample=GREEDY)]


class Baseline:
    """What the probe gave when the model was first loaded, and which processes were there."""

    def __init__(self) -> None:
        self._fingerprint = 0
        self._reference_processes: set[str] = set()

    def check(self, fingerprint: int, incarnations: Iterable[str]) -> str:
        """What is wrong, or nothing: then it is remembered, with the processes that gave it."""
        now = set(incarnations)
        if self._reference_processes & now and fingerprint != self._fingerprint:
            was, found = f"{self._fingerprint:016x}", f"{fingerprint:016x}"
            return f"the probe's fingerprint is {found}, and was {was} when the model was loaded"
        self.accept(fingerprint, now)
        return ""

    def accept(self, fingerprint: int, incarnations: Iterable[str]) -> None:
        """From now on this is right, by whatever it was proved."""
        self._fingerprint, self._reference_processes = fingerprint, set(incarnations)
