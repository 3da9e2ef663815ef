"""Which rank hangs: the one whose progress record is furthest behind. Pure: records in, a rank and a sentence out.

Ranks of a group run the same collectives in the same order, so a record's place in that order shows who waits for whom:
a rank inside collective n waits for every rank that has not entered n. When all are inside, a record may name the rank
whose part it waits for: a rank that is waited for and waits for nobody is the straggler.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lockstep_runtime.protocol.bus import ProgressRecord

_Place = tuple[int, int]  # 0 before the step, 1 in it, 2 after it; then twice the collective, less one while inside
_AFTER: _Place = (2, 0)


@dataclass(frozen=True, slots=True)
class HangReport:
    """`stragglers`: ranks that block the others; empty where all wait alike. `awaited`: ranks inside the same
    collective whose part the others lack.

    `moved_ago`: seconds since any rank made progress, without those in which the awaited ranks were runnable and got
    no CPU.
    """

    stragglers: tuple[int, ...]
    sentence: str
    moved_ago: float | None
    awaited: tuple[int, ...] = ()


def attribute(
    records: Sequence[ProgressRecord], *, epoch: int, step: int, silent: Sequence[int], size: int
) -> HangReport:
    """`silent`: the ranks of `size` that have not answered this step; the others are done with it."""
    known = {record.rank: record for record in records if record.rank in silent}
    places = {rank: _place(record, epoch, step) for rank, record in known.items()}
    last = min(places.values(), default=_AFTER)
    stragglers = tuple(sorted(rank for rank, place in places.items() if place == last))
    moved = min((_age(record, stragglers) for record in known.values()), default=None)
    if len(silent) == 1:
        return HangReport((silent[0],), _alone(silent[0], known, places, size), moved)
    if len(known) < len(silent):
        return HangReport((), f"{ranks_text(silent)} did not answer, and not all of their records can be read", moved)
    if len(stragglers) == size:
        where = _where(known[stragglers[0]], last)
        idle = {record.rank for record in known.values() if record.awaited is None}
        awaited = tuple(sorted(idle & {record.awaited for record in known.values()}))
        what = f"the others wait for {ranks_text(awaited)}" if awaited else "none behind the others"
        return HangReport((), f"{ranks_text(stragglers)} all stopped {where}, {what}", moved, awaited)
    waiting = sorted(places.keys() - set(stragglers))
    return HangReport(stragglers, _sentence(stragglers, waiting, known, places), moved)


def ranks_text(ranks: Sequence[int]) -> str:
    """`rank 1`, or `ranks 0,2,3`."""
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {','.join(map(str, ranks))}"


def _age(record: ProgressRecord, stragglers: Sequence[int]) -> float:
    """One that waits for others is woken again and again, and waits for a CPU too: that is no excuse for them."""
    return record.age - (record.starved if record.rank in stragglers else 0.0)


def _place(record: ProgressRecord, epoch: int, step: int) -> _Place:
    if (record.epoch, record.step) != (epoch, step):
        return (0, 0)
    return (1, 2 * record.collective - record.inside) if record.in_step else _AFTER


def _sentence(
    stragglers: Sequence[int], waiting: Sequence[int], known: Mapping[int, ProgressRecord], places: Mapping[int, _Place]
) -> str:
    first = stragglers[0]
    next_collective = places[first][1] // 2 + 1  # where the straggler stands between two
    ahead = [known[rank] for rank in waiting if places[rank][0] == 1 and known[rank].collective == next_collective]
    if places[first][0] == 1 and places[first][1] % 2 == 0 and ahead:
        where = f"before {_name(ahead[0])}"
    else:
        where = _where(known[first], places[first])
    if not waiting:
        return f"{ranks_text(stragglers)} stopped {where}, the other ranks are done"
    waited = max(known[rank].age for rank in waiting)
    return f"{ranks_text(stragglers)} stopped {where}, {ranks_text(waiting)} waited {waited:.1f} s"


def _alone(rank: int, known: Mapping[int, ProgressRecord], places: Mapping[int, _Place], size: int) -> str:
    if rank not in known:
        return f"rank {rank} did not answer, and its record can't be read"
    others = ", the other ranks are done" if size > 1 else ""
    return f"rank {rank} stopped {_where(known[rank], places[rank])}{others}"


def _where(record: ProgressRecord, place: _Place) -> str:
    if place == (0, 0):
        return "before it began"
    if place == _AFTER:
        return "after it was done"
    if record.collective == 0:
        return "before the first collective"
    return f"{'in' if record.inside else 'after'} {_name(record)}"


def _name(record: ProgressRecord) -> str:
    return record.place or f"collective {record.collective}"
