"""Operators and a fake cluster, run in any order that a test or a random generator wants."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from random import Random
from typing import Any

from tests.support.kube_fake import FakeKube, Killed, is_ready, resource, revision_of
from tests.support.kube_watch import KubeWatch

from lockstep_operator.cluster.client import Kube
from lockstep_operator.cluster.failures import REFUSED_MOST
from lockstep_operator.controller import Controller
from lockstep_operator.groups.status_poller import PollTarget
from lockstep_operator.reconcile import ReconcileOutcome, Reconciler
from lockstep_operator.reporting.metrics import Metrics
from lockstep_operator.settings import Settings
from lockstep_operator.types.names import ModelKey
from lockstep_operator.types.observed import GroupReport, Object
from lockstep_operator.types.operator_key import OperatorKey
from lockstep_operator.workqueue import WorkQueue
from lockstep_runtime.protocol.status import GroupState, GroupStatus, RankState, RankStatus

KEY = OperatorKey(b"of the operators" * 2)
SETTINGS = Settings(runtime_image="runtime:1", operator_namespace="lockstep-system")
START = 1_800_000_000.0


class Groups:
    """Every group whose first pod is Ready says that it is well; tests may put other words in its mouth."""

    def __init__(self, kube: FakeKube) -> None:
        self._kube = kube
        self.said: dict[tuple[ModelKey, int], GroupReport] = {}
        self.watched: dict[ModelKey, Mapping[int, PollTarget]] = {}

    def watch(self, key: ModelKey, targets: Mapping[int, PollTarget]) -> None:
        self.watched[key] = dict(targets)

    def reports(self, key: ModelKey, leaders: Mapping[int, str]) -> dict[int, GroupReport]:
        return {group: report for group, uid in leaders.items() if (report := self._report(key, group, uid))}

    def _report(self, key: ModelKey, group: int, uid: str) -> GroupReport | None:
        if (key, group) in self.said:
            return self.said[key, group]
        pods = [pod for pod in self._kube.of_kind("Pod") if pod["metadata"]["uid"] == uid]
        return GroupReport(status=well(key, group, uid, revision_of(pods[0]))) if pods and is_ready(pods[0]) else None


def well(key: ModelKey, group: int, incarnation: str, revision: str, size: int = 2) -> GroupStatus:
    """A group of `size` pods of one rank each that serves."""
    ranks = [
        RankStatus(
            rank=rank, pod_index=rank, state=RankState.READY, pod=f"{key.name}-{group}-{rank}", node="node-1", epoch=1
        )
        for rank in range(size)
    ]
    return GroupStatus(
        model=key.name, group=group, incarnation=incarnation, revision=1, spec_revision=revision, epoch=1,
        state=GroupState.READY, ranks=ranks,
    )  # fmt: skip


class KilledAtWrite:
    """The operator's process ends once: `when` is "before" or "after" its write of this number, from 0."""

    def __init__(self, kube: FakeKube, when: str, number: int) -> None:
        self._left = number
        if when == "before":
            kube.before_write = self._die
        else:
            kube.after_write = self._die

    @property
    def happened(self) -> bool:
        """False: there were fewer writes."""
        return self._left < 0

    def _die(self, verb: str, kind: str, name: str) -> None:
        self._left -= 1
        if self._left == -1:
            raise Killed


class World:
    def __init__(self, operators: int = 1, random: Random | None = None, settings: Settings = SETTINGS) -> None:
        self.settings = settings  # of operators that start from now on
        self.key = KEY  # of operators that start from now on
        self.time = START
        self.random = random or Random(0)
        self.kube = FakeKube(lambda: self.time)
        self.groups = Groups(self.kube)
        self.broken: Callable[[Object], bool] = lambda pod: False
        self.operators = [self.operator() for _ in range(operators)]

    def add(self, name: str = "chat", namespace: str = "team", **spec: Any) -> ModelKey:
        self.kube.put("TensorParallelModel", resource(name, namespace, **spec))
        return ModelKey(namespace, name)

    def edit(self, key: ModelKey, **spec: Any) -> None:
        self.kube.change("TensorParallelModel", key.namespace, key.name, lambda live: live["spec"].update(spec))

    def annotate(self, key: ModelKey, name: str, value: str | None) -> None:
        def edit(live: Object) -> None:
            annotations = live["metadata"].get("annotations") or {}
            rest = {known: text for known, text in annotations.items() if known != name}
            live["metadata"]["annotations"] = rest | ({} if value is None else {name: value})

        self.kube.change("TensorParallelModel", key.namespace, key.name, edit)

    def upgrade(self, **settings: Any) -> None:
        """Operators of another version, or with other settings, in place of those that there are."""
        self.settings = replace(self.settings, **settings)
        self.operators = [self.operator() for _ in self.operators]

    def status(self, key: ModelKey) -> Mapping[str, Any]:
        status: Mapping[str, Any] = (
            self.kube.objects["TensorParallelModel", key.namespace, key.name].get("status") or {}
        )
        return status

    def condition(self, key: ModelKey, name: str) -> Mapping[str, Any]:
        return next(item for item in self.status(key)["conditions"] if item["type"] == name)

    def events(self, about: str = "TensorParallelModel") -> list[tuple[str, str]]:
        """Of the objects of that kind."""
        found = [event for event in self.kube.of_kind("Event") if event["involvedObject"]["kind"] == about]
        return [(event["reason"], event["message"]) for event in found]

    async def reconcile(self, key: ModelKey, operator: int = 0) -> float | None:
        """One pass by an operator; one that is killed meanwhile is replaced by a new process that remembers nothing."""
        try:
            return await self.operators[operator].step(key)
        except Killed:
            self.operators[operator] = self.operator()
            return 0.0

    async def settle(self, *keys: ModelKey, passes: int = 400) -> None:
        """Let everything happen until nothing more does, also after the longest wait between two tries of a write.
        Fails when that doesn't come to pass."""
        waited = False
        for _ in range(passes):
            before = len(self.kube.writes)
            for key in keys:
                for operator in range(len(self.operators)):
                    await self.reconcile(key, operator)
            steps = self.kube.steps(self.broken)
            self.time += 1
            if steps:
                self.random.choice(steps)()
            elif len(self.kube.writes) == before:
                if waited:
                    return
                self.time += REFUSED_MOST
            waited = not steps and len(self.kube.writes) == before
        raise AssertionError(f"still busy after {passes} passes: {self.kube.writes[-10:]}")

    def serving(self, key: ModelKey, size: int = 2) -> int:
        """Groups of which every pod is Ready and stays, of one revision."""
        groups: dict[str, list[str]] = {}
        for pod in self.kube.of_kind("Pod"):
            labels = pod["metadata"]["labels"]
            alive = is_ready(pod) and "deletionTimestamp" not in pod["metadata"]
            if alive and (pod["metadata"]["namespace"], labels["lockstep.dev/model"]) == (key.namespace, key.name):
                groups.setdefault(labels["lockstep.dev/group"], []).append(revision_of(pod))
        return sum(len(pods) == size and len(set(pods)) == 1 for pods in groups.values())

    def operator(self) -> Controller:
        metrics, watch = Metrics(), KubeWatch(self.kube)
        reconciler = Reconciler(
            self.connection(), self.groups, self.settings, metrics, lambda: self.time, self.key, indexes=watch.indexes
        )

        async def reconcile(key: ModelKey) -> ReconcileOutcome:
            self.hear(watch)
            return await reconciler.reconcile(key)

        return Controller(WorkQueue(lambda: self.time), reconcile, metrics)

    def connection(self) -> Kube:
        """A new operator's, to the API server."""
        return self.kube

    def hear(self, watch: KubeWatch) -> None:
        """What an operator is told before a pass."""
        watch.catch_up()
