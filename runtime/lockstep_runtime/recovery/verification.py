"""Proof before use, as a verdict on the probe's fingerprints. Pure.

A fingerprint that differs from the first time's need not be corruption: sums in another order, as on another ring of
the same ranks, may round otherwise. Then it is the same every time, and every rank's weights are what was loaded.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Final

from lockstep_runtime.recovery.self_test import Baseline

RETESTS: Final = 2


class Verdict(enum.StrEnum):
    """What is to be done next."""

    RIGHT = "right"
    TEST_AGAIN = "test again"
    SCRUB = "scrub"  # are the weights what was loaded?
    WRONG = "wrong"


class Verification:
    """Of one group over all its attempts. `message`: what is or was wrong, as a sentence."""

    def __init__(self) -> None:
        self.message = ""
        self._baseline = Baseline()
        self._incarnations: list[str] = []
        self._odd: list[int] = []  # fingerprints of this attempt that differ from the baseline

    def begin(self, incarnations: Sequence[str]) -> None:
        """Another attempt, with these processes."""
        self.message, self._odd, self._incarnations = "", [], list(incarnations)

    def tested(self, fingerprint: int) -> Verdict:
        """What a probe gave."""
        if not self._odd:
            self.message = self._baseline.check(fingerprint, self._incarnations)
            if not self.message:
                return Verdict.RIGHT
        self._odd.append(fingerprint)
        if len(set(self._odd)) > 1:
            return Verdict.WRONG
        return Verdict.SCRUB if len(self._odd) > RETESTS else Verdict.TEST_AGAIN

    def scrubbed(self, tensors: Sequence[int]) -> Verdict:
        """Every rank has compared so many tensors with what was loaded, and they are right."""
        if not all(tensors):
            return Verdict.WRONG
        self._baseline.accept(self._odd[0], self._incarnations)
        return Verdict.RIGHT
