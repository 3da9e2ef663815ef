"""What rank 0 remembers of sequences with rules, from draw to draw. Nothing of it can't be told again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Final

from llguidance import LLMatcher

from lockstep_runtime.grammar.compiler import GrammarError
from lockstep_runtime.grammar.matcher import Mask, Matcher
from lockstep_runtime.protocol.step import Grammar, LogitRules, Ruled, SequenceSlice
from lockstep_runtime.worker.grammars import Grammars
from lockstep_runtime.worker.rules import RuledRow, Seen

PATIENCE_SECONDS: Final = 0.01  # of a step, for a grammar that is being compiled: then it goes without the sequence


class NotYetError(Exception):
    """The sequence can't be drawn for in this step."""


class Constraint:
    """A grammar, and the drawn tokens that it is to follow once it is compiled."""

    def __init__(self, grammar: Grammar, compiled: Future[LLMatcher]) -> None:
        self._grammar, self._compiled = grammar, compiled
        self._matcher: Matcher | None = None
        self._behind: list[int] = []

    def add(self, tokens: Sequence[int]) -> None:
        self._behind += tokens

    def mask(self) -> Mask:
        """
        Raises:
            NotYetError: it is still being compiled.
            GrammarError: it can't be followed.
        """
        if self._matcher is None:
            try:
                self._matcher = Matcher(self._grammar, self._compiled.result(PATIENCE_SECONDS))
            except TimeoutError:
                raise NotYetError from None
        behind, self._behind = self._behind, []
        self._matcher.consume(behind)
        return self._matcher.mask()


@dataclass(slots=True)
class Record:
    """Of one sequence; `known` is the position up to which its tokens are."""

    rules: LogitRules
    known: int
    constraint: Constraint | None
    seen: Seen = field(default_factory=Seen)

    def add(self, tokens: Sequence[int], prompt: int) -> None:
        """prompt: the position at which the answer begins."""
        of_prompt = max(0, prompt - self.known)
        self.known += len(tokens)
        if self.rules.penalizes:
            self.seen.add(tokens[:of_prompt], drawn=False)
            self.seen.add(tokens[of_prompt:], drawn=True)
        if self.constraint is not None:
            self.constraint.add(tokens[of_prompt:])


@dataclass(slots=True)
class Page:
    """Of a step's draws: those that have rules, and those that can't be made, by row."""

    ruled: list[RuledRow] = field(default_factory=list)
    put_off: list[int] = field(default_factory=list)
    failures: dict[int, str] = field(default_factory=dict)

    @property
    def left_out(self) -> set[int]:
        return {*self.put_off, *self.failures}


class Rulebook:
    """`room`: for so many sequences; the one that was used the longest ago makes way."""

    def __init__(self, room: int, grammars: Grammars | None = None) -> None:
        self._room = room
        self.grammars = grammars or Grammars()
        self._records: OrderedDict[int, Record] = OrderedDict()

    def prepare(self, sequences: Sequence[SequenceSlice]) -> None:
        """Begin to compile what will be needed."""
        for sequence in sequences:
            if sequence.ruled and sequence.ruled.past and (grammar := sequence.ruled.past.rules.grammar):
                self.grammars.begin(grammar)

    def page(self, sequences: Sequence[SequenceSlice]) -> Page:
        """Of slices after each of which a token is drawn. A slice that comes again changes nothing."""
        page = Page()
        for row, sequence in enumerate(sequences):
            if sequence.ruled is None:
                continue
            try:
                page.ruled.append(self._row(row, sequence, sequence.ruled))
            except NotYetError:
                page.put_off.append(row)
            except GrammarError as error:
                page.failures[row] = str(error)
        return page

    def _row(self, row: int, sequence: SequenceSlice, ruled: Ruled) -> RuledRow:
        record = self._follow(sequence, ruled)
        mask = None if record.constraint is None else record.constraint.mask()
        return RuledRow(row=row, rules=record.rules, drawn=ruled.drawn, seen=record.seen, mask=mask)

    def _follow(self, sequence: SequenceSlice, ruled: Ruled) -> Record:
        end = sequence.position + len(sequence.tokens)
        prompt = end - ruled.drawn
        record = self._records.pop(sequence.sequence_id, None)
        if ruled.past is not None:
            record = self._begin(ruled.past.rules, ruled.past.start)
            record.add(ruled.past.tokens, prompt)
        if record is None or not sequence.position <= record.known <= end:
            raise NotYetError
        record.add(sequence.tokens[record.known - sequence.position :], prompt)
        self._records[sequence.sequence_id] = record
        while len(self._records) > self._room:
            self._records.popitem(last=False)
        return record

    def _begin(self, rules: LogitRules, start: int) -> Record:
        grammar = rules.grammar
        constraint = None if grammar is None else Constraint(grammar, self.grammars.begin(grammar))
        return Record(rules, start, constraint)
