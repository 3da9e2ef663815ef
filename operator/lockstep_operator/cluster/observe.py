"""What is so: as the API server says when it is asked, or as the indexes have it while nothing is to be done."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Final, Protocol

from lockstep_operator.cluster.client import Kube, KubeError
from lockstep_operator.cluster.indexes import BUDGET, CHILD_KINDS, LABELLED_KINDS, Indexes, bare
from lockstep_operator.cluster.namespace_limits import NamespaceLimits
from lockstep_operator.cluster.newer import Newer
from lockstep_operator.types.limits import Limits
from lockstep_operator.types.names import (
    KIND,
    MODEL_LABEL,
    REPORTER,
    ModelKey,
    label_of,
    selector,
)
from lockstep_operator.types.observed import Object, ObjectRef, Pod, expected_names, parse_pod
from lockstep_operator.types.spec import Model

# So old may a live look be at most, whatever the watches and the census (which finds what they miss) have told.
RESTING_SECONDS: Final = 12 * 3600.0
UNREADY_SECONDS: Final = 300.0
OBSTRUCTED_SECONDS: Final = 60.0  # where another's object has a name that the model needs: no watch tells when it goes
LIMITS_SECONDS: Final = 60.0  # so old may be the limits that a model meets which isn't Ready; the census has all others
WARNINGS_SECONDS: Final = 15.0  # between two reads of what explains the same pods

Children = Mapping[ObjectRef, Object]


class Source(Protocol):
    """Where a pass reads. Every method may raise KubeError."""

    live: ClassVar[bool]  # only then may the pass change or delete anything

    async def resource(self, key: ModelKey) -> Object | None: ...

    async def children(self, model: Model, groups: Collection[int]) -> Children:
        """By kind and name, with others' budgets in the namespace; `groups` are those that there are to be."""
        ...

    async def pods(self, model: Model) -> tuple[Pod, ...]:
        """Pods that belong to the model's groups."""
        ...

    async def limits(self, namespace: str) -> Limits:
        """What the namespace allows a container."""
        ...


@dataclass(slots=True)
class LastLook:
    """What is remembered of the last live look at a model, because no index holds it. Times are unix seconds."""

    at: float
    newer: Newer = field(default_factory=Newer)
    unlabelled: Children = field(default_factory=dict)  # that have a name the model needs: another's, or damaged
    gone: Mapping[str, str] = field(default_factory=dict)  # that the indexes had nevertheless: UID → resource version
    dirty: bool = False  # the pass deleted something, or it didn't come to its end
    warnings: Mapping[str, str] = field(default_factory=dict)
    warnings_of: frozenset[str] = frozenset()  # UIDs that were asked about
    warnings_at: float = 0.0

    def serves(self, key: ModelKey, *, ready: bool, now: float) -> bool:
        """Whether a pass may begin with the indexes. Models are spread, so that not all are read at once."""
        longest = RESTING_SECONDS if ready else OBSTRUCTED_SECONDS if self.unlabelled else UNREADY_SECONDS
        spread = 0.75 + zlib.crc32(str(key).encode()) / 2**34
        return not self.dirty and not self.newer.overdue(now) and now - self.at < longest * spread

    def wrote(self, written: Iterable[tuple[str, Object]], now: float) -> None:
        """By kind, as the API server has it now."""
        for kind, item in written:
            self.newer.note(kind, bare(kind, item), now)

    def wrote_status(self, before: Object, after: Object, now: float) -> None:
        """The model as the API server has it after the write."""
        if before["metadata"]["resourceVersion"] != after["metadata"]["resourceVersion"]:
            self.newer.note(KIND, bare(KIND, after), now)

    async def explained(self, kube: Kube, namespace: str, uids: Iterable[str], now: float) -> Mapping[str, str]:
        """The newest Warning about each object, or what was read lately."""
        asked = frozenset(uids)
        if not asked <= self.warnings_of or now - self.warnings_at > WARNINGS_SECONDS:
            self.warnings = await read_warnings(kube, namespace, asked) if asked else {}
            self.warnings_of, self.warnings_at = asked, now
        return self.warnings


@dataclass(frozen=True, slots=True)
class Live:
    """Asks the API server for everything: what is decided on it is as good as it can be."""

    kube: Kube
    known_limits: NamespaceLimits
    live: ClassVar[bool] = True

    async def resource(self, key: ModelKey) -> Object | None:
        return await self.kube.get(KIND, key.namespace, key.name)

    async def children(self, model: Model, groups: Collection[int]) -> Children:
        lists = await asyncio.gather(
            *(
                self.kube.find(kind, model.namespace, labels=f"{label_of(kind)}={model.name}")
                for kind in LABELLED_KINDS
            ),
            self.kube.find(BUDGET, model.namespace),
        )
        found = {
            (kind, child["metadata"]["name"]): child
            for kind, children in zip(CHILD_KINDS, lists, strict=True)
            for child in children
        }
        missing = [(kind, name) for kind, name, _ in expected_names(model, groups) if (kind, name) not in found]
        objects = await asyncio.gather(*(self.kube.get(kind, model.namespace, name) for kind, name in missing))
        return found | {key: child for key, child in zip(missing, objects, strict=True) if child is not None}

    async def pods(self, model: Model) -> tuple[Pod, ...]:
        objects = await self.kube.find("Pod", model.namespace, labels=selector(model.name))
        return tuple(pod for raw in objects if (pod := parse_pod(raw)))

    async def limits(self, namespace: str) -> Limits:
        return await self.known_limits.read(namespace)


@dataclass(frozen=True, slots=True)
class Indexed:
    """Asks nothing that the last live look answers; only limits are read anew if the model isn't `ready`."""

    known_limits: NamespaceLimits
    indexes: Indexes
    last: LastLook
    ready: bool
    live: ClassVar[bool] = False

    async def resource(self, key: ModelKey) -> Object | None:
        return resource_of(key, self.indexes, self.last)

    async def children(self, model: Model, groups: Collection[int]) -> Children:
        indexed = self.last.newer.over(self.indexes.children(model.key, self.last.gone), CHILD_KINDS)
        return {**self.last.unlabelled, **indexed}

    async def pods(self, model: Model) -> tuple[Pod, ...]:
        indexed = {("Pod", raw["metadata"]["name"]): raw for raw in self.indexes.pods(model.key, self.last.gone)}
        found = self.last.newer.over(indexed, ("Pod",))
        return tuple(pod for name in sorted(found) if (pod := parse_pod(found[name])))

    async def limits(self, namespace: str) -> Limits:
        return await self.known_limits.recent(namespace, float("inf") if self.ready else LIMITS_SECONDS)


def resource_of(key: ModelKey, indexes: Indexes, last: LastLook) -> Object | None:
    """The newest that is known."""
    indexed = indexes.model(key)
    if indexed is None:  # it is gone
        return None
    return last.newer.over({(KIND, key.name): indexed}, (KIND,))[KIND, key.name]


def last_look(
    model: Model,
    groups: Collection[int],
    resource: Object,
    children: Children,
    pods: Collection[Pod],
    indexed: Mapping[str, str],
    now: float,
) -> LastLook:
    """What is to be remembered of a live look. `indexed` are the versions that the indexes had before it, by UID."""
    watched = {ref: child for ref, child in children.items() if ref[0] in CHILD_KINDS and _labelled(child, model)}
    seen = {child["metadata"]["uid"] for child in children.values()} | {pod.uid for pod in pods}
    newer = Newer()
    for kind, item in [
        (KIND, resource),
        *((ref[0], child) for ref, child in watched.items()),
        *(("Pod", pod.raw) for pod in pods),
    ]:
        if indexed.get(item["metadata"]["uid"]) != item["metadata"]["resourceVersion"]:
            newer.note(kind, bare(kind, item), now)
    needed = {(kind, name) for kind, name, _ in expected_names(model, groups)}
    return LastLook(
        at=now,
        newer=newer,
        unlabelled={key: child for key, child in children.items() if key in needed and not _labelled(child, model)},
        gone={uid: version for uid, version in indexed.items() if uid not in seen},
        dirty=True,
    )


def _labelled(child: Object, model: Model) -> bool:
    return (child["metadata"].get("labels") or {}).get(MODEL_LABEL) == model.name


async def read_warnings(kube: Kube, namespace: str, uids: Iterable[str]) -> dict[str, str]:
    """The newest Warning Event of others about each object, where there is one. They only explain: what can't be read
    is left out."""
    wanted = list(uids)
    lists = await asyncio.gather(
        *(kube.find("Event", namespace, fields=f"involvedObject.uid={uid},type=Warning") for uid in wanted),
        return_exceptions=True,
    )
    for answer in lists:
        if isinstance(answer, BaseException) and not isinstance(answer, KubeError):
            raise answer
    others = [
        [event for event in events if event.get("reportingComponent") != REPORTER] if isinstance(events, list) else []
        for events in lists
    ]
    return {uid: _newest(events) for uid, events in zip(wanted, others, strict=True) if events}


def _newest(events: list[Object]) -> str:
    def when(event: Object) -> str:
        series = event.get("series") or {}
        times = (event.get("lastTimestamp"), event.get("eventTime"), series.get("lastObservedTime"))
        return max((time for time in times if time), default="")

    newest = max(events, key=when)
    return f"{newest.get('reason', '')}: {newest.get('message', '')}"
