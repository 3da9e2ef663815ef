"""How many tokens of prompts a step may take beside sequences that decode, so that these go on nearly as before. Pure.

A step lasts as long as its slowest part, and every stream waits for all of it: a chunk of 2,048 tokens that is computed
in passing on one machine holds up others for seconds. So the time of a token of a prompt is learned from the steps, and
the chunk is what fits into a multiple of the time of a step that only decodes (as Sarathi-Serve does with a fixed
budget of tokens: https://arxiv.org/abs/2403.02310). Where nobody decodes, nothing is held back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from lockstep_runtime.protocol.step import SequenceSlice

SLOWDOWN: Final = 2.5  # of a step by what it prefills, on average; single ones may be slower
LEAST_TOKENS: Final = 16  # that a prompt gets in every step, however slow it is: it has to end
FIRST_TOKENS: Final = 64  # while nothing is known
MEMORY: Final = 0.9  # of what was learned before, this much is left after a step
MOST_SURPRISE: Final = 4.0  # times: a step that took longer was held up by something else


class Pace:
    """`learn` from every step that is done, ask `prefill_tokens` before every step that decodes."""

    def __init__(self) -> None:
        self._decode: float | None = None  # seconds of a step that only decodes
        self._seconds = 0.0  # that were spent on prompts, and on how many of their tokens
        self._tokens = 0.0

    def prefill_tokens(self) -> int | None:
        """Tokens of prompts in the next step, if any sequence decodes in it; None: as many as there are."""
        if self._decode is None:
            return None
        if not self._tokens:
            return FIRST_TOKENS
        each = self._seconds / self._tokens
        return max(LEAST_TOKENS, int((SLOWDOWN - 1) * self._decode / each)) if each > 0 else None

    def learn(self, slices: Sequence[SequenceSlice], seconds: float) -> None:
        """A step with these parts took so long."""
        prompts = sum(len(part.tokens) for part in slices if part.is_prefill)
        if not prompts:
            before = seconds if self._decode is None else self._decode
            self._decode = MEMORY * before + (1 - MEMORY) * min(seconds, MOST_SURPRISE * before)
            return
        spent = max(0.0, seconds - (self._decode or 0.0))
        if self._tokens:
            spent = min(spent, MOST_SURPRISE * prompts * self._seconds / self._tokens)
        self._seconds = MEMORY * self._seconds + spent
        self._tokens = MEMORY * self._tokens + prompts
