"""The operator's ladder by itself, for many random schedules: one group, its pods, the status, and two operators.

`LOCKSTEP_SIM_SCHEDULES` is how many, `LOCKSTEP_SIM_FIRST` the first seed; a failure names its seed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, Final

import msgspec
import pytest
from tests.support.kube_world import well
from tests.support.operator_models import NOW, group, pod, recovery_of

from lockstep_operator.decisions.recovery_budget import PROVED_SECONDS
from lockstep_operator.decisions.recovery_policy import RecoveryDecision, RecoveryInput, decide
from lockstep_operator.groups.group import Group
from lockstep_operator.groups.pod_issues import PodIssue
from lockstep_operator.types.names import ModelKey
from lockstep_operator.types.observed import GroupReport, Pod
from lockstep_operator.types.reasons import Reason
from lockstep_operator.types.recovery_state import RecoveryAction, RecoveryState, Rung, to_status
from lockstep_operator.types.spec_blocks import RecoverySpec
from lockstep_runtime.protocol.status import Fault, FaultRecord, GroupState

SCHEDULES: Final = int(os.environ.get("LOCKSTEP_SIM_SCHEDULES", "1000"))
FIRST: Final = int(os.environ.get("LOCKSTEP_SIM_FIRST", "0"))
CHUNK: Final = 250
KEY: Final = ModelKey("team", "chat")
NODES: Final = ("n0", "n1", "n2")


@dataclass(slots=True)
class Life:
    """One group, as long as a schedule lasts. What is written to the status is kept as JSON, as the API server does."""

    random: Random
    policy: RecoverySpec
    size: int
    now: float = NOW
    status: str = "null"
    version: int = 0
    faults: int = 0
    sick_pods: set[str] = field(default_factory=set)
    sick_node: str = ""
    sick_until: float = 0.0
    pods: list[Pod] = field(default_factory=list)
    plans: list[tuple[RecoveryAction, RecoveryState]] = field(default_factory=list)
    made: int = 0
    known: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.pods = [self._pod(index) for index in range(self.size)]

    # --- the cluster ---

    def _pod(self, index: int) -> Pod:
        self.made += 1
        avoided = recovery_of(json.loads(self.status)).avoided
        node = self.random.choice([node for node in NODES if node not in avoided] or [""])
        raw = {"metadata": {}, "spec": {"nodeName": node}, "status": {}}
        phase = "Running" if node else "Pending"
        return pod(0, index, uid=f"pod-{self.made}", raw=raw, phase=phase, created=self.now, ready=False)

    @property
    def ill(self) -> bool:
        return (
            self.now < self.sick_until
            or any(one.uid in self.sick_pods for one in self.pods)
            or any(one.node == self.sick_node for one in self.pods)
        )

    @property
    def group(self) -> Group:
        ready = not self.ill and all(one.phase == "Running" for one in self.pods)
        pods = tuple(replace(one, ready=ready or one.index > 0) for one in self.pods)
        return replace(group(size=self.size), pods=pods)

    def report(self) -> GroupReport | None:
        if self.pods[0].phase != "Running" or self.pods[0].deleting is not None:
            return None
        said = well(KEY, 0, self.pods[0].uid, "new", self.size)
        if self.ill:
            generation = tuple(one.uid for one in self.pods)
            if generation != self.known:
                self.known, self.faults = generation, self.faults + 1
            fault = FaultRecord(id=self.faults, fault=Fault.HANG, rank=self.size - 1, message="stopped", at=0, epoch=1)
            said = msgspec.structs.replace(said, state=GroupState.POISONED, faults=[fault])
        return GroupReport(status=said)

    def end_pods(self) -> None:
        """The kubelet ends what was deleted, and the StatefulSet makes it anew."""
        self.pods = [self._pod(one.index) if one.deleting is not None else one for one in self.pods]

    def befall(self) -> None:
        match self.random.randrange(4):
            case 0:
                self.sick_pods = {self.random.choice(self.pods).uid}
            case 1:
                self.sick_pods = {one.uid for one in self.pods}
            case 2:
                self.sick_node = self.random.choice(NODES)
            case _:
                self.sick_until = self.now + self.random.expovariate(1 / 400)

    # --- an operator ---

    def look(self, *, seen: tuple[str, int] | None = None, lost: bool = False) -> RecoveryDecision:
        """One pass. `seen` is a status read before others wrote; `lost` ends the operator before its writes."""
        status, version = seen or (self.status, self.version)
        pending = any(one.phase == "Pending" for one in self.pods)
        trouble = PodIssue(Reason.UNSCHEDULABLE, "no node") if pending else None
        situation = RecoveryInput(
            seed="uid/0",
            group=self.group,
            state=recovery_of(json.loads(status)),
            report=self.report(),
            issue=trouble,
        )
        verdict = decide(self.policy, situation, self.now)
        if lost:
            return verdict
        self._delete(verdict)
        if version == self.version:
            self._write(verdict.state)
        return verdict

    def _delete(self, verdict: RecoveryDecision) -> None:
        going = {target.uid for target in verdict.targets}
        planned = {uid for plan, _ in self.plans for uid in plan.pods}
        assert going <= planned, "a pod went without a written plan"
        self.pods = [replace(one, deleting=self.now + 5) if one.uid in going else one for one in self.pods]

    def _write(self, memory: RecoveryState) -> None:
        document = json.dumps(to_status(memory))
        if document == self.status:
            return
        self.status, self.version = document, self.version + 1
        assert all(count <= self.policy.attempts for count in memory.attempts_used.values()), "a budget is overdrawn"
        if memory.action and memory.action.pods and (not self.plans or memory.action != self.plans[-1][0]):
            self._check_pace(memory, memory.action)
            self.plans.append((memory.action, memory))

    def _check_pace(self, memory: RecoveryState, plan: RecoveryAction) -> None:
        if self.plans and memory.failures > 1 and "used again" not in plan.reason:
            next_try = self.plans[-1][1].next_try
            assert next_try is None or plan.since >= next_try, "a step came before its time"

    # --- the end ---

    def recover(self) -> None:
        self.sick_until, self.sick_node = self.now, ""
        for _ in range(200):
            before = self.version
            self.look()
            self.end_pods()
            self.now += PROVED_SECONDS
            quiet = self.version == before and not self.ill
            if quiet and recovery_of(json.loads(self.status)) == RecoveryState():
                return
        raise AssertionError(f"not recovered: {self.status}")


def live(seed: int) -> Life:
    """A whole schedule. Raises AssertionError where something does not hold."""
    random = Random(seed)
    policy = RecoverySpec(
        strategy=random.choice([None, "RecyclePods"]), attempts=random.randint(1, 3),
        window=random.choice([60.0, 900.0]), initial=random.choice([1.0, 10.0]), most=random.choice([10.0, 120.0]),
    )  # fmt: skip
    life = Life(random, policy, size=random.choice([1, 2, 4]))
    earlier = (life.status, life.version)
    for _ in range(80):
        move = random.random()
        if move < 0.08:
            life.befall()
        elif move < 0.35:
            life.end_pods()
        elif move < 0.45:
            earlier = (life.status, life.version)
        elif move < 0.55:
            life.look(seen=earlier)  # an operator that read long ago
        elif move < 0.6:
            life.look(lost=True)
        else:
            life.look()
        life.now += random.choice([0.2, 1, 5, 60, 300])
    life.recover()
    return life


FAILED: Final = (6781,)  # an operator was away until no node had to be avoided any more, and a pod avoided them all


def chunks() -> Iterator[Any]:
    for seed in FAILED:
        yield pytest.param(seed, 1, id=f"seed {seed}, which once failed")
    for first in range(FIRST, FIRST + SCHEDULES, CHUNK):
        yield pytest.param(first, min(CHUNK, FIRST + SCHEDULES - first), id=f"seeds from {first}")


@pytest.mark.parametrize(("first", "count"), [*chunks()])
def test_budgets_hold_and_every_schedule_ends_well(first: int, count: int) -> None:
    rungs: set[Rung] = set()
    for seed in range(first, first + count):
        try:
            rungs |= {plan.rung for plan, _ in live(seed).plans}
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
    assert count < CHUNK or rungs == {*Rung}, "schedules that reach every rung"
