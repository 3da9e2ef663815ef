"""What may happen to an operator's requests: it is killed around each of its writes, or gets bad answers."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Final

from tests.support.api_proxy import Answer, Asked, Forward, NoAnswerError, refusal

WRITE_TROUBLES: Final = ("409", "429", "500", "lost", "late")
READ_TROUBLES: Final = ("429", "500", "lost", "late", "stale")
READ_SHARE: Final = 0.06  # of the reads that meet trouble; a look at a model takes eight
LATE_SECONDS: Final = 1.0  # at most
REFUSALS: Final = {
    "409": refusal(409, "Conflict"),
    "429": refusal(429, "TooManyRequests"),
    "500": refusal(500, "InternalError"),
}


class KilledAroundWrites:
    """The first time that a write is tried the operator is killed before it, the second time after it.

    Only the third try is answered. A write that was done by the second and is not tried again is one that the next
    operator found done.
    """

    def __init__(self, replace_operator: Callable[[], None]) -> None:
        self._replace_operator = replace_operator
        self._tries: Counter[str] = Counter()
        self.before: set[str] = set()  # targets
        self.after: set[str] = set()

    async def __call__(self, asked: Asked, forward: Forward) -> Answer:
        if not asked.writes or self._tries[asked.meaning] >= 2:
            return await forward()
        self._tries[asked.meaning] += 1
        if self._tries[asked.meaning] == 1:
            self.before.add(asked.target)
        else:
            await forward()
            self.after.add(asked.target)
        self._replace_operator()
        raise NoAnswerError

    @property
    def count(self) -> int:
        return self._tries.total()


class BadAnswers:
    """Every write meets some trouble when it is first tried, and a few reads do; all kinds in turn, by chance."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._of_writes, self._of_reads = _in_turn(chance, WRITE_TROUBLES), _in_turn(chance, READ_TROUBLES)
        self._tried: set[str] = set()
        self._earlier: dict[str, Answer] = {}
        self.given: Counter[str] = Counter()  # e.g. "write 409"

    async def __call__(self, asked: Asked, forward: Forward) -> Answer:
        trouble = self._trouble(asked)
        if trouble in REFUSALS:
            return REFUSALS[trouble]
        if trouble == "late":
            await asyncio.sleep(self._chance.uniform(0, LATE_SECONDS))
        answer = await forward()
        if trouble == "lost":
            raise NoAnswerError
        return self._aged(asked, answer, stale=trouble == "stale")

    def watch_lag(self) -> float:
        return self._chance.uniform(0, LATE_SECONDS / 2)

    def _trouble(self, asked: Asked) -> str:
        if asked.writes:
            meaning = asked.meaning
            trouble = "" if meaning in self._tried else next(self._of_writes)
            self._tried.add(meaning)
        else:
            trouble = next(self._of_reads) if self._chance.random() < READ_SHARE else ""
        if trouble:
            self.given[f"{'write' if asked.writes else 'read'} {trouble}"] += 1
        return trouble

    def _aged(self, asked: Asked, answer: Answer, *, stale: bool) -> Answer:
        """An answer of some looks ago, or the true one, which may be remembered as such."""
        if asked.writes:
            return answer
        if stale:
            return self._earlier.get(asked.url, answer)
        if self._chance.random() < 0.3:
            self._earlier[asked.url] = answer
        return answer


def _in_turn(chance: random.Random, troubles: tuple[str, ...]) -> Iterator[str]:
    while True:
        yield from chance.sample(troubles, len(troubles))
