"""What a fault is, who is to blame, and what to do about it. Pure: evidence in, a decision with its reason out."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from lockstep_runtime.wire import Fault, StepDone


class Rung(enum.StrEnum):
    """The steps of the ladder that the group can take by itself."""

    REBUILD = "Rebuild"
    RESPAWN = "Respawn"


@dataclass(frozen=True, slots=True)
class Evidence:
    """What one rank said, or did not say. `hearsay`: the rank only noticed that another one is gone."""

    fault: Fault
    rank: int | None
    message: str
    hearsay: bool = False


@dataclass(frozen=True, slots=True)
class Recovery:
    """The decision: `kill` are ranks whose process can't be used further."""

    rung: Rung
    kill: tuple[int, ...]
    reason: str


_WEIGHT: Final = {
    Fault.RANK_LOST: 5,
    Fault.CONTEXT_FAULT: 4,
    Fault.CORRUPTION: 3,
    Fault.NON_FINITE: 3,
    Fault.STEP_FAILED: 2,
    Fault.DESYNC: 2,
    Fault.HANG: 1,
}
_PROCESS_UNUSABLE: Final = frozenset({Fault.CONTEXT_FAULT, Fault.CORRUPTION})
_NOT_BY_A_STEP: Final = frozenset({Fault.RANK_LOST, Fault.CORRUPTION})


def diagnose(evidence: Sequence[Evidence]) -> Evidence:
    """The cause among all that is known: what a rank says of itself before what it says of others, the gravest first.

    The messages of every rank that failed by itself are joined: one may explain the other.
    """
    own = [one for one in evidence if not one.hearsay]
    if not own:
        first = evidence[0]
        return Evidence(first.fault, None, first.message)
    cause = max(own, key=lambda one: _WEIGHT[one.fault])  # the first of the gravest
    others = [one.message for one in own if one is not cause and one.message not in cause.message]
    return Evidence(cause.fault, cause.rank, "; ".join([cause.message, *others]))


def silent(missing: Sequence[int], what: str, seconds: float) -> Evidence:
    """The evidence of an answer that did not come in time.

    Where several ranks are silent, most of them only wait for another: which one, shows when they are aborted.
    """
    who = f"rank {missing[0]}" if len(missing) == 1 else f"ranks {', '.join(map(str, missing))}"
    return Evidence(Fault.HANG, missing[0] if len(missing) == 1 else None, f"{who}: no {what} within {seconds:g} s")


def compare(answers: Mapping[int, StepDone]) -> Evidence | None:
    """Whether all ranks computed the same; the odd one is named where a majority shows it."""
    prints = {rank: answer.fingerprint for rank, answer in answers.items()}
    counts = Counter(prints.values()).most_common()
    if len(counts) == 1:
        return None
    values = ", ".join(f"rank {rank}: {value:016x}" for rank, value in sorted(prints.items()))
    odd = [rank for rank, value in prints.items() if value != counts[0][0]]
    known = len(odd) == 1 and len(prints) > 2
    return Evidence(Fault.DESYNC, odd[0] if known else None, f"the ranks' hidden states differ ({values})")


def decide(cause: Evidence, evidence: Sequence[Evidence]) -> Recovery:
    """The cheapest rung that can help against this fault."""
    if cause.fault is Fault.RANK_LOST and cause.rank is not None:
        return Recovery(Rung.RESPAWN, (), f"rank {cause.rank} is gone; its supervisor starts it again")
    if cause.fault in _PROCESS_UNUSABLE:
        suspects = {one.rank for one in evidence if one.fault is cause.fault and one.rank is not None}
        kill = tuple(sorted(suspects))
        return Recovery(Rung.RESPAWN, kill, f"{cause.fault}: the processes of ranks {list(kill)} can't be used further")
    if cause.fault is Fault.HANG:
        return Recovery(Rung.REBUILD, (), "Hang: every rank is aborted; one that does not answer that either is killed")
    return Recovery(Rung.REBUILD, (), f"{cause.fault}: every process lives; a new communicator is made")


def points(fault: Fault) -> int:
    """How much a fault is held against the sequences of its step: a lost process is seldom their doing."""
    return 1 if fault in _NOT_BY_A_STEP else 2
