"""Where an answer stands in its grammar: which tokens may be next. A pure function of the tokens that were drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llguidance import LLMatcher

from lockstep_runtime.grammar.compiler import GrammarError, sentence
from lockstep_runtime.protocol.step import Grammar


@dataclass(frozen=True, slots=True)
class Mask:
    """A bit for every token of the vocabulary, the lowest of a byte first."""

    bits: bytes | None  # None: every token but `never`
    never: tuple[int, ...] = ()
    must_end: bool = False  # nothing but the end is left


class Matcher:
    """Of one sequence.

    Args:
        start: the compiled grammar, which stays as it is.
    """

    def __init__(self, grammar: Grammar, start: LLMatcher) -> None:
        self._grammar, self._matcher = grammar, start.deep_copy()
        self._begun = False
        self._thinking = grammar.thoughts is not None and grammar.thoughts.open

    def consume(self, tokens: Sequence[int]) -> None:
        """Tokens that were drawn, the end not among them.

        Raises:
            GrammarError: they can't follow what was drawn before.
        """
        rest = list(tokens)
        while rest and self._in_thoughts(rest[0]):
            rest.pop(0)
        self._begun = self._begun or bool(tokens)
        if rest and not self._matcher.consume_tokens(rest):
            raise GrammarError(f"the grammar can't go on: {sentence(self._matcher.get_error())}")

    def _in_thoughts(self, token: int) -> bool:
        thoughts = self._grammar.thoughts
        if thoughts is None:
            return False
        if self._thinking:
            self._thinking = token != thoughts.closing
            self._begun = True
            return True
        if not self._begun and token == thoughts.opening:
            self._thinking = self._begun = True
            return True
        return False

    def mask(self) -> Mask:
        """
        Raises:
            GrammarError: no token can follow, or to find out which would take too long.
        """
        if self._thinking:
            return Mask(None, never=self._grammar.end_ids)
        bits = bytearray(self._matcher.compute_bitmask())
        if self._matcher.is_error():
            raise GrammarError(f"the grammar can't go on: {sentence(self._matcher.get_error())}")
        complete = self._matcher.is_accepting()
        for token in self._grammar.end_ids:
            _clear(bits, token)
        must_end = not any(bits)
        thoughts = self._grammar.thoughts
        if thoughts is not None and not self._begun:
            _set(bits, thoughts.opening)
        for token in self._grammar.end_ids if complete else ():
            _set(bits, token)
        if not any(bits):
            raise GrammarError("the grammar can't go on: no token of this model can follow")
        return Mask(bytes(bits), must_end=must_end)


def _set(bits: bytearray, token: int) -> None:
    if token // 8 < len(bits):
        bits[token // 8] |= 1 << token % 8


def _clear(bits: bytearray, token: int) -> None:
    if token // 8 < len(bits):
        bits[token // 8] &= ~(1 << token % 8) & 0xFF
