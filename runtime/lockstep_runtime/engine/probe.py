"""Proof before use: a fixed prompt is run on a newly made group, and its fingerprint must be that of the first time.

A shard that differs from what was loaded changes the sum of all ranks, so fingerprints agree with each other and yet
differ from the remembered one. What is remembered counts as long as one process is left that was there.

Streams wait for it, so it is one step. A group that serves nobody yet runs a decode step as well, so that the engine
knows how long those take before the first request may hang in one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from lockstep_runtime.wire import SamplingParams, SequenceSlice

SEQUENCE: Final = 0  # no request's: those count from 1
PROMPT: Final = tuple(range(1, 9))  # token ids that every vocabulary has
GREEDY: Final = SamplingParams(temperature=0)


def probe(blocks: int, block_size: int) -> list[SequenceSlice]:
    """One prefill step, cut short where the cache is smaller than the prompt."""
    prompt = list(PROMPT[: max(1, blocks * block_size - 1)])
    return [_slice(0, prompt, blocks, block_size)]


def practice(blocks: int, block_size: int) -> list[SequenceSlice]:
    """The decode step after it; none where there is no room for it."""
    [prefill] = probe(blocks, block_size)
    position = len(prefill.tokens)
    return [_slice(position, prefill.tokens[-1:], blocks, block_size)] if blocks * block_size > position else []


def _slice(position: int, tokens: list[int], blocks: int, block_size: int) -> SequenceSlice:
    table = list(range(min(blocks, -(-(len(PROMPT) + 1) // block_size))))
    return SequenceSlice(sequence_id=SEQUENCE, position=position, tokens=tokens, blocks=table, sample=GREEDY)


class Memory:
    """What the probe gave when the model was first loaded, and which processes were there."""

    def __init__(self) -> None:
        self._fingerprint = 0
        self._witnesses: set[str] = set()

    def judge(self, fingerprint: int, incarnations: Iterable[str]) -> str:
        """What is wrong, or nothing: then it is remembered, with the processes that gave it."""
        now = set(incarnations)
        if self._witnesses & now and fingerprint != self._fingerprint:
            was, found = f"{self._fingerprint:016x}", f"{fingerprint:016x}"
            return f"the probe prompt's fingerprint is {found}, and was {was} when the model was loaded"
        self._fingerprint = fingerprint
        self._witnesses = now
        return ""
