"""Proof before use: a fixed prompt is run on a newly made group, and its fingerprints must be those of the first time.

A shard that differs from what was loaded changes the sum of all ranks, so fingerprints agree with each other and yet
differ from the remembered ones. What is remembered counts as long as one process is left that was there.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from lockstep_runtime.wire import SamplingParams, SequenceSlice

SEQUENCE: Final = 0  # no request's: those count from 1
PROMPT: Final = tuple(range(1, 17))  # token ids that every vocabulary has
GREEDY: Final = SamplingParams(temperature=0)


def probe_steps(blocks: int, block_size: int) -> list[list[SequenceSlice]]:
    """One prefill and one decode step, cut short where the cache is smaller than the prompt."""
    prompt = PROMPT[: max(1, blocks * block_size - 1)]
    table = list(range(min(blocks, -(-(len(prompt) + 1) // block_size))))
    steps = [_slice(0, list(prompt), table)]
    if blocks * block_size > len(prompt):
        steps.append(_slice(len(prompt), [prompt[-1]], table))
    return [[step] for step in steps]


def _slice(position: int, tokens: list[int], blocks: list[int]) -> SequenceSlice:
    return SequenceSlice(sequence_id=SEQUENCE, position=position, tokens=tokens, blocks=blocks, sample=GREEDY)


class Memory:
    """What the probe gave when the model was first loaded, and which processes were there."""

    def __init__(self) -> None:
        self._prints: tuple[int, ...] = ()
        self._witnesses: set[str] = set()

    def judge(self, prints: tuple[int, ...], incarnations: Iterable[str]) -> str:
        """What is wrong, or nothing: then it is remembered, with the processes that gave it."""
        now = set(incarnations)
        if self._witnesses & now and prints != self._prints:
            was, found = (" ".join(f"{one:016x}" for one in some) for some in (self._prints, prints))
            return f"the probe prompt's fingerprints are {found}, and were {was} when the model was loaded"
        self._prints = prints
        self._witnesses = now
        return ""
