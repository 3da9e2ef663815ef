"""Which fault it is, and of which rank. Pure: the ranks' answers, and missing answers, in; the cause out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from lockstep_runtime.protocol.bus import StepDone
from lockstep_runtime.protocol.status import Fault
from lockstep_runtime.recovery.hang_attribution import HangReport, ranks_text


@dataclass(frozen=True, slots=True)
class Evidence:
    """A rank's failure, or its missing answer.

    `secondary`: the rank only noticed that another one is gone. `stragglers`: ranks that block the others and don't
    answer. `outside`: not caused by a request. `waited`: seconds from the start to the detection, where known.
    `final`: the group can't repair it by itself. `planned`: no fault; the rank's pod was asked to end and let go.
    """

    fault: Fault
    rank: int | None
    message: str
    secondary: bool = False
    stragglers: tuple[int, ...] = ()
    outside: bool = False
    waited: float = 0.0
    final: bool = False
    planned: bool = False


_WEIGHT: Final = {
    Fault.RANK_LOST: 5,
    Fault.CONTEXT_FAULT: 4,
    Fault.CORRUPTION: 3,
    Fault.NON_FINITE: 3,
    Fault.STEP_FAILED: 2,
    Fault.DESYNC: 2,
    Fault.HANG: 1,
}


def diagnose(evidence: Sequence[Evidence]) -> Evidence:
    """The cause among all evidence: a rank's own failure before what it reports of others, the gravest first.

    The messages of all ranks that failed by themselves are joined: one may explain the other.
    """
    own = [one for one in evidence if not one.secondary]
    if not own:
        first = evidence[0]
        return Evidence(first.fault, None, first.message)
    cause = max(own, key=lambda one: (one.final, _WEIGHT[one.fault], not one.planned))  # the first of the gravest
    others = [one.message for one in own if one is not cause and one.message not in cause.message]
    return replace(cause, message="; ".join([cause.message, *others]))


def no_answer(missing: Sequence[int], what: str, waited: float, report: HangReport) -> Evidence:
    """The evidence of an answer that did not come in time."""
    stragglers = report.stragglers
    message = f"{ranks_text(missing)}: no {what} within {waited:.1f} s; {report.sentence}"
    named = stragglers or report.awaited
    rank = named[0] if len(named) == 1 else None
    return Evidence(Fault.HANG, rank, message, stragglers=stragglers, waited=waited)


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
