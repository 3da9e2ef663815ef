"""Which nodes are suspected (pure): by the faults of the ranks on them, whatever model they were of.

Each model's status remembers what it holds against nodes, for an hour after the newest fault; what all of them hold is
suspicion that every model shares. A model that finds fault with many nodes is more likely at fault itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from lockstep_operator.types.model_status import NodeFaults
from lockstep_runtime.protocol.status import Fault

SUSPICION_SECONDS: Final = 3600.0
FAILING_FAULTS: Final = 2  # so many faults make a node one that keeps failing
REMEMBERED_NODES: Final = 16  # by each model, the newest: nodes come and go
BLAMED_NODES: Final = 2  # a model that holds faults against more of them at a time is not heard
# A step that raises is the request's or the software's most often.
EVIDENCE: Final = frozenset(
    {Fault.HANG, Fault.RANK_LOST, Fault.CONTEXT_FAULT, Fault.DESYNC, Fault.CORRUPTION, Fault.NON_FINITE}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFault:
    """A fault of a rank that ran on the node. `key` is unique among the model's; `at` in unix seconds."""

    node: str
    fault: str
    key: str
    sentence: str
    at: float


def remembered(before: Sequence[NodeFaults], new: Iterable[NodeFault], now: float) -> tuple[NodeFaults, ...]:
    """The newest last."""
    known = {one.name: one for one in before if now - one.time < SUSPICION_SECONDS}
    for fault in sorted(new, key=lambda fault: fault.at):
        old = known.pop(fault.node, None)
        count = 1 + (old.faults if old else 0)
        known[fault.node] = NodeFaults(name=fault.node, faults=count, fault=fault.fault, time=float(int(fault.at)))
    return tuple([*known.values()][-REMEMBERED_NODES:])


def shared(models: Iterable[Sequence[NodeFaults]], now: float) -> dict[str, int]:
    """Faults that models hold against nodes, by node."""
    found: dict[str, int] = {}
    for held in models:
        recent = [one for one in held if now - one.time < SUSPICION_SECONDS]
        for one in recent if len(recent) <= BLAMED_NODES else ():
            found[one.name] = found.get(one.name, 0) + one.faults
    return found


def suspects(faults: Mapping[str, int]) -> list[str]:
    """Those that keep failing, the worst first."""
    return sorted(
        (node for node, count in faults.items() if count >= FAILING_FAULTS), key=lambda node: (-faults[node], node)
    )
