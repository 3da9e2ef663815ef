"""The next step of the operator's ladder for a group that needs one (pure): which rung, which pods, in which words."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from msgspec.structs import replace

from lockstep_operator.backoff import exponential
from lockstep_operator.decisions.fault_detection import DetectedFault
from lockstep_operator.decisions.node_suspicion import FAILING_FAULTS, suspects
from lockstep_operator.groups.group import Group
from lockstep_operator.types.recovery_state import RecoveryAction, RecoveryState, Rung
from lockstep_operator.types.spec_blocks import RecoverySpec
from lockstep_operator.types.timestamps import format_rfc3339

AVOIDED_NODES: Final = 8  # at a time, the suspect's first
SUSPECTED_NODES: Final = 16  # so many are remembered, the newest: nodes come and go
LADDERS: Final = {
    "Ladder": (Rung.RECYCLE_POD, Rung.RECYCLE_GROUP, Rung.MOVE_AWAY),
    "RecyclePods": (Rung.RECYCLE_GROUP, Rung.MOVE_AWAY),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryStep:
    """A group with a fault, and what is remembered of it."""

    policy: RecoverySpec
    group: Group
    fault: DetectedFault
    state: RecoveryState
    incarnation: str  # of its leader's supervisor
    now: float
    suspicion: Mapping[str, int] = field(default_factory=dict)  # faults that all models hold against nodes

    @property
    def node(self) -> str:
        """That the fault is held against; empty when the suspect isn't known and the pods are on several."""
        if self.fault.pod:
            return self.fault.pod.node
        nodes = {pod.node for pod in self.group.pods}
        return nodes.pop() if len(nodes) == 1 else ""

    def choose(self) -> Rung | None:
        """The cheapest rung that can help and has budget left: above the one that has just failed, if one has."""
        used, action = self.state.attempts_used, self.state.action
        ladder = LADDERS[self.policy.strategy or "Ladder"]
        left = [rung for rung in ladder if self._fits(rung) and used.get(rung, 0) < self.policy.attempts]
        failed = action.rung if action and not action.dry_run else None
        if failed is None:
            return left[0] if left else None
        order = list(Rung)
        above = [rung for rung in left if order.index(rung) > order.index(failed)]
        repeated = [rung for rung in left if rung is not Rung.RECYCLE_POD]
        return next(iter([*above, *repeated]), None)

    def _fits(self, rung: Rung) -> bool:
        match rung:
            case Rung.RECYCLE_POD:
                return self.fault.pod is not None and len(self.group.pods) > 1
            case Rung.MOVE_AWAY:
                held = max(self.state.node_fault_counts.get(self.node, 0), self.suspicion.get(self.node, 0))
                faults = held + 1
                return bool(self.node) and faults >= FAILING_FAULTS and self.node not in self.state.avoided
            case _:
                return True

    def taken(self, rung: Rung | None, seed: str) -> RecoveryState:
        """The state in which the step is written. Without a rung it is a late try, that no budget pays for."""
        state, taken, failures = self.state, rung or Rung.RECYCLE_GROUP, self.state.failures + 1
        used, avoided = state.attempts_used, state.avoided
        return replace(
            state,
            action=self.action(taken),
            attempts_used={**used, rung: used.get(rung, 0) + 1} if rung else used,
            failures=failures,
            next_try=self.now + _delay(self.policy, failures, seed),
            node_fault_counts=self._blamed(),
            avoided={**avoided, **self._moved_from()} if taken is Rung.MOVE_AWAY else avoided,
        )

    def _moved_from(self) -> dict[str, float]:
        """The node, and others that keep failing, whoever says so: until when they are avoided."""
        nodes = [self.node, *(node for node in suspects(self.suspicion) if node != self.node)]
        return dict.fromkeys(nodes[:AVOIDED_NODES], self.now + self.policy.window)

    def _blamed(self) -> dict[str, int]:
        counts = dict(self.state.node_fault_counts)
        if self.node:
            counts[self.node] = counts.pop(self.node, 0) + 1  # the newest last
        return dict([*counts.items()][-SUSPECTED_NODES:])

    def action(self, rung: Rung) -> RecoveryAction:
        suspect = self.fault.pod if rung is Rung.RECYCLE_POD else None
        late = "a late attempt: " if self.state.stalled else ""
        return RecoveryAction(
            rung=rung,
            trigger=self.fault.key,
            fault=self.fault.fault,
            rank=self.fault.rank,
            reason=f"{self._cause()}: {late}{self._remedy(rung)}",
            pods=tuple(pod.uid for pod in self.group.pods if suspect is None or pod == suspect),
            since=self.now,
            noticed=math.floor(min(self.fault.noticed, self.now)),
            incarnation=self.incarnation,
        )

    def _cause(self) -> str:
        fault = self.fault
        who = f" of rank {fault.rank}" if fault.rank is not None else ""
        return f"group {self.group.index} can't recover from {fault.fault}{who} ({fault.message})"

    def _remedy(self, rung: Rung) -> str:
        match rung:
            case Rung.RECYCLE_POD:
                name = self.fault.pod.name if self.fault.pod else ""
                return f"pod {name} is replaced, the others keep their weights"
            case Rung.RECYCLE_GROUP:
                return "all its pods are replaced"
            case Rung.MOVE_AWAY:
                until = format_rfc3339(self.now + self.policy.window)
                others = [node for node in self._moved_from() if node != self.node]
                more = f" and from {', '.join(others)}, where ranks of other groups failed" if others else ""
                where = f"node {self.node}, which keeps failing,{more} until {until}"
                return f"all its pods are replaced and kept away from {where}"

    def why_not_yet(self) -> str:
        fault, next_try = self.fault, format_rfc3339(self.state.next_try or self.now)
        if self.state.stalled:
            return (
                f"no step has repaired {fault.fault} ({fault.message}) and the budget of {self.policy.attempts} "
                f"attempts per rung is spent: the next attempt is at {next_try}, later ones come with growing delays"
            )
        return f"the last repair failed ({fault.fault}: {fault.message}): the next attempt is at {next_try}"


def _delay(policy: RecoverySpec, failures: int, seed: str) -> float:
    """Doubling, with jitter so that groups that fail together don't come back together; whole seconds."""
    fraction = int.from_bytes(hashlib.sha256(f"{seed}/{failures}".encode()).digest()[:4]) / 2**32
    return float(math.ceil(exponential(failures, policy.initial, policy.most) * (0.8 + 0.2 * fraction)))
