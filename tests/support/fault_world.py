"""A cluster whose groups fall ill, so that only what the illness sits in being replaced makes them well.

On top of `kube_world`: groups that say `Poisoned` with rising fault numbers, nodes that fail or vanish, and an API
server that loses, delays and refuses. `watch_over` checks after every pass what must hold at every moment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final

import msgspec
from tests.support.kube_fake import FakeKube, Identity, Killed, clone, is_ready, revision_of
from tests.support.kube_watch import KubeWatch
from tests.support.kube_world import Groups, World, well
from tests.support.operator_models import recovery_of

from lockstep_operator.cluster.client import KubeError
from lockstep_operator.decisions.recovery_budget import PROVED_SECONDS
from lockstep_operator.types.names import GROUP_LABEL, MODEL_LABEL, POD_INDEX_LABEL, REVISION_LABEL, ModelKey
from lockstep_operator.types.observed import GroupReport, Object
from lockstep_operator.types.recovery_state import RecoveryAction, RecoveryState
from lockstep_operator.types.spec import parse
from lockstep_runtime.protocol.status import Fault, FaultRecord, GroupState

RECYCLE_GRACE: Final = 5
WELL: Final = "well"


@dataclass(slots=True)
class Illness:
    """Of one group, as long as one of these pods exists, or one of its pods runs on the node, or until the time."""

    rank: int | None
    pods: frozenset[str] = frozenset()
    node: str = ""
    until: float = 0.0
    seen: dict[tuple[str, frozenset[str]], float] = field(default_factory=dict)  # leader and pods: each try is a fault


class SickGroups(Groups):
    """A group that is ill says so as soon as its first pod runs; one whose first pod hangs says nothing."""

    def __init__(self, kube: FakeKube, now: Callable[[], float]) -> None:
        super().__init__(kube)
        self._now = now
        self.ill: dict[tuple[ModelKey, int], Illness] = {}
        self.hanging: dict[str, float] = {}  # UID of a first pod → since when

    def pods(self, key: ModelKey, group: int) -> list[Object]:
        labels = {MODEL_LABEL: key.name, GROUP_LABEL: str(group)}
        pods = [pod for pod in self._kube.of_kind("Pod") if pod["metadata"]["namespace"] == key.namespace]
        return [pod for pod in pods if labels.items() <= pod["metadata"]["labels"].items()]

    def is_ill(self, key: ModelKey, group: int) -> bool:
        illness = self.ill.get((key, group))
        if illness is None:
            return False
        pods = self.pods(key, group)
        return (
            self._now() < illness.until
            or any(pod["metadata"]["uid"] in illness.pods for pod in pods)
            or any(pod["spec"].get("nodeName") == illness.node for pod in pods if illness.node)
        )

    def broken(self, pod: Object) -> bool:
        """Whether the pod can't become Ready: the first one of a group that is ill, and one that hangs."""
        labels, metadata = pod["metadata"]["labels"], pod["metadata"]
        if labels[POD_INDEX_LABEL] != "0":
            return False
        key = ModelKey(metadata["namespace"], labels[MODEL_LABEL])
        return metadata["uid"] in self.hanging or self.is_ill(key, int(labels[GROUP_LABEL]))

    def _report(self, key: ModelKey, group: int, uid: str) -> GroupReport | None:
        if uid in self.hanging:
            return GroupReport(unreachable_since=self.hanging[uid], error="timed out")
        pods = self.pods(key, group)
        leader = next((pod for pod in pods if pod["metadata"]["uid"] == uid), None)
        if leader is None or leader["status"]["phase"] != "Running":
            return None
        if not self.is_ill(key, group):
            return GroupReport(status=well(key, group, uid, revision_of(leader))) if is_ready(leader) else None
        illness = self.ill[key, group]
        try_ = (uid, frozenset(pod["metadata"]["uid"] for pod in pods))
        at = illness.seen.setdefault(try_, self._now())
        number = list(illness.seen).index(try_) + 1
        fault = FaultRecord(id=number, fault=Fault.HANG, rank=illness.rank, message="it stopped", at=at, epoch=number)
        status = well(key, group, uid, revision_of(leader))
        return GroupReport(status=msgspec.structs.replace(status, state=GroupState.POISONED, faults=[fault], since=at))


class FaultWorld(World):
    """`chance` of anything going wrong at the API server is a number from 0 to 1; 0 ends all trouble."""

    def __init__(self, random: Random, operators: int = 1, nodes: int = 3) -> None:
        super().__init__(operators, random)
        self.kube.nodes = [f"node-{number}" for number in range(nodes)]
        self.sick = SickGroups(self.kube, lambda: self.time)
        self.groups = self.sick
        self.broken = self.sick.broken
        self.operators = [self.operator() for _ in range(operators)]
        self.chance = 0.0
        self.kube.before_write = self.kube.after_write = self._trouble
        self.kube.before_read = self._read_trouble
        self.kube.pause = lambda: self.random.randrange(3) if self.chance else 0
        self._older: dict[Identity, Object] = {}
        self._plans: dict[int, list[tuple[RecoveryAction, RecoveryState]]] = {}
        self._deleted = 0

    def _trouble(self, verb: str, kind: str, name: str) -> None:
        """Before a write it is refused or delayed, after it the answer is lost; the operator may be killed in both."""
        del verb, kind, name
        if self.random.random() < self.chance:
            raise self.random.choice(
                [
                    Killed(),
                    KubeError(409, "Conflict", "the object has been modified"),
                    KubeError(429, "TooManyRequests", "later"),
                    KubeError(500, "InternalError", "a fault"),
                    KubeError(0, "TimeoutError", "no answer"),
                ]
            )
        if self.random.random() < self.chance:
            self.step()

    def _read_trouble(self) -> None:
        if self.random.random() < self.chance / 4:
            raise KubeError(503, "ServiceUnavailable", "later")

    def hear(self, watch: KubeWatch) -> None:
        """Now and then nothing, or too late to hear what has ended meanwhile."""
        if self.random.random() >= self.chance:
            watch.catch_up(relisted=self.random.random() < self.chance)

    def step(self) -> None:
        """One thing that the cluster does by itself."""
        if steps := self.kube.steps(self.broken):
            self.random.choice(steps)()

    async def look(self, key: ModelKey, operator: int = 0) -> None:
        """A pass, now and then on what was so a while ago."""
        if self.chance and self.random.random() < self.chance:
            self.kube.stale = self._older or None
        elif self.random.random() < 0.2:
            self._older = clone_all(self.kube.objects)
        try:
            await self.reconcile(key, operator)
        finally:
            self.kube.stale = None
        self.watch_over(key)

    # --- what must hold at every moment ---

    def watch_over(self, key: ModelKey) -> None:
        policy = parse(self.kube.objects["TensorParallelModel", key.namespace, key.name]).recovery
        for block in self.status(key).get("groups") or []:
            memory = recovery_of(block.get("recovery"))
            known = self._plans.setdefault(block["group"], [])
            if memory.action and not any(same(memory.action, plan) for plan, _ in known):
                self._new_plan(known, memory, memory.action)
            assert all(count <= policy.attempts for count in memory.attempts_used.values()), "a budget is overdrawn"
        self._only_planned_pods_go()

    def _new_plan(
        self, known: list[tuple[RecoveryAction, RecoveryState]], memory: RecoveryState, plan: RecoveryAction
    ) -> None:
        if known and memory.failures > 1 and "used again" not in plan.reason:
            before = known[-1][1]
            assert before.next_try is not None
            assert plan.since >= before.next_try, "a step came before its time"
        known.append((plan, memory))

    def _only_planned_pods_go(self) -> None:
        planned = {uid for plans in self._plans.values() for plan, _ in plans for uid in plan.pods}
        for kind, name, uid, grace in self.kube.deleted[self._deleted :]:
            assert (kind, grace) != ("Pod", RECYCLE_GRACE) or uid in planned, f"{name} went without a written plan"
        self._deleted = len(self.kube.deleted)

    @property
    def plans(self) -> Mapping[int, list[tuple[RecoveryAction, RecoveryState]]]:
        return self._plans

    # --- the end ---

    async def recovered(self, key: ModelKey, passes: int = 400) -> None:
        """All trouble is over: let time go by until everything serves and nothing is remembered or written."""
        self.chance = 0.0
        self.kube.lost_nodes.clear()
        self.sick.hanging.clear()
        for illness in self.sick.ill.values():
            illness.until = self.time
            illness.node = ""
        for _ in range(passes):
            before = len(self.kube.writes)
            for operator in range(len(self.operators)):
                await self.look(key, operator)
            steps = self.kube.steps(self.broken)
            for step in steps:
                step()
            self.time += 20 if steps else PROVED_SECONDS * 2
            remembered = any("recovery" in block for block in self.status(key).get("groups") or [])
            if not steps and not remembered and len(self.kube.writes) == before:
                return
        raise AssertionError(f"not recovered after {passes} passes: {self.status(key)}")


def same(one: RecoveryAction, other: RecoveryAction) -> bool:
    return (one.trigger, one.since, one.rung) == (other.trigger, other.since, other.rung)


def clone_all(objects: Mapping[Identity, Object]) -> dict[Identity, Object]:
    return {identity: clone(item) for identity, item in objects.items()}


def shape(world: World) -> dict[str, Any]:
    """What all objects of the operator are to look like, without what differs from one life to another."""
    found = {
        f"{kind}/{name}": item.get("spec")
        for (kind, _, name), item in world.kube.objects.items()
        if kind not in _TRANSIENT
    }
    return {name: _neutral(value) for name, value in sorted(found.items())}


_TRANSIENT: Final = frozenset({"Pod", "Event", "Lease", "TensorParallelModel"})


def _neutral(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: "any" if name == REVISION_LABEL else _neutral(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_neutral(item) for item in value if not _is_revision(item)]
    return value


def _is_revision(item: Any) -> bool:
    return isinstance(item, Mapping) and item.get("name") == "LOCKSTEP_SPEC_REVISION"
