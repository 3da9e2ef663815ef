"""What rank 0 remembers of sequences with rules, from draw to draw. Nothing of it can't be told again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from lockstep_runtime.protocol.step import LogitRules, Ruled, SequenceSlice
from lockstep_runtime.worker.rules import RuledRow, Seen


@dataclass(slots=True)
class Record:
    """Of one sequence; `known` is the position up to which its tokens are."""

    rules: LogitRules
    known: int
    seen: Seen = field(default_factory=Seen)

    def add(self, tokens: Sequence[int], prompt: int) -> None:
        """prompt: the position at which the answer begins."""
        of_prompt = max(0, prompt - self.known)
        self.known += len(tokens)
        if self.rules.penalizes:
            self.seen.add(tokens[:of_prompt], drawn=False)
            self.seen.add(tokens[of_prompt:], drawn=True)


class Rulebook:
    """`room`: for so many sequences; the one that was used the longest ago makes way."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._records: OrderedDict[int, Record] = OrderedDict()

    def rows(self, sequences: Sequence[SequenceSlice]) -> tuple[list[RuledRow], list[int]]:
        """Of slices after each of which a token is drawn: the rows that have rules, and those of which the past must
        be told first. A slice that comes again changes nothing."""
        ruled, unknown = [], []
        for row, sequence in enumerate(sequences):
            if sequence.ruled is None:
                continue
            record = self._follow(sequence, sequence.ruled)
            if record is None:
                unknown.append(row)
            else:
                ruled.append(RuledRow(row=row, rules=record.rules, drawn=sequence.ruled.drawn, seen=record.seen))
        return ruled, unknown

    def _follow(self, sequence: SequenceSlice, ruled: Ruled) -> Record | None:
        end = sequence.position + len(sequence.tokens)
        prompt = end - ruled.drawn
        record = self._records.pop(sequence.sequence_id, None)
        if ruled.past is not None:
            record = Record(ruled.past.rules, ruled.past.start)
            record.add(ruled.past.tokens, prompt)
        if record is None or not sequence.position <= record.known <= end:
            return None
        record.add(sequence.tokens[record.known - sequence.position :], prompt)
        self._records[sequence.sequence_id] = record
        while len(self._records) > self._room:
            self._records.popitem(last=False)
        return record
