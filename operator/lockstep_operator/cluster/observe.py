"""What is so: as the API server says when it is asked, or as the indexes have it while nothing is to be done."""

from __future__ import annotations

import asyncio
import base64
import zlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Protocol

from lockstep_operator.cluster.client import Kube, KubeError
from lockstep_operator.cluster.indexes import BUDGET, CHILD_KINDS, LABELLED_KINDS, Indexes
from lockstep_operator.types.limits import Limits, limits_of
from lockstep_operator.types.names import (
    KIND,
    MODEL_LABEL,
    REPORTER,
    TOKEN_KEY,
    ModelKey,
    label_of,
    selector,
    token_name,
)
from lockstep_operator.types.observed import Object, ObjectRef, Pod, expected_names, parse_pod
from lockstep_operator.types.spec import Model

# So old may a live look be at most, whatever the watches and the census (which finds what they miss) have told.
RESTING_SECONDS: Final = 12 * 3600.0
UNREADY_SECONDS: Final = 60.0
TOKEN_SECONDS: Final = 1200.0  # Secrets are read by name, never listed or watched

Children = Mapping[ObjectRef, Object]


class Source(Protocol):
    """Where a pass reads. Every method may raise KubeError."""

    live: ClassVar[bool]  # only then may the pass write

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
    limits: Limits = field(default_factory=Limits)
    unlabelled: Children = field(default_factory=dict)  # that have a name the model needs: another's, or damaged
    gone: Mapping[str, str] = field(default_factory=dict)  # that the indexes had nevertheless: UID → resource version
    secret: Object | None = None  # the token's
    secret_at: float = 0.0
    secret_for: str = ""  # resource version of the model when the Secret was read
    dirty: bool = False  # the pass wrote something, which the indexes may not have yet, or it didn't come to its end

    def serves(self, key: ModelKey, *, ready: bool, now: float) -> bool:
        """Whether a pass may begin with the indexes. Models are spread, so that not all are read at once."""
        longest = (RESTING_SECONDS if ready else UNREADY_SECONDS) * (0.75 + zlib.crc32(str(key).encode()) / 2**34)
        return not self.dirty and now - self.at < longest


@dataclass(frozen=True, slots=True)
class Live:
    """Asks the API server for everything: what is decided on it is as good as it can be."""

    kube: Kube
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
        """An older role may not let the operator ask: then nothing is known."""
        try:
            return limits_of(await self.kube.find("LimitRange", namespace))
        except KubeError as error:
            if error.status == 403:
                return Limits()
            raise


@dataclass(frozen=True, slots=True)
class Indexed:
    """Asks nothing that the last live look answers; only a token that was read long ago is read anew."""

    kube: Kube
    indexes: Indexes
    last: LastLook
    now: float
    live: ClassVar[bool] = False

    async def resource(self, key: ModelKey) -> Object | None:
        return self.indexes.model(key)

    async def children(self, model: Model, groups: Collection[int]) -> Children:
        found = {**self.last.unlabelled, **self.indexes.children(model.key, self.last.gone)}
        secret = await self._secret(model)
        if secret is not None:
            found["Secret", token_name(model.name)] = secret
        return found

    async def pods(self, model: Model) -> tuple[Pod, ...]:
        return tuple(pod for raw in self.indexes.pods(model.key, self.last.gone) if (pod := parse_pod(raw)))

    async def limits(self, namespace: str) -> Limits:
        return self.last.limits

    async def _secret(self, model: Model) -> Object | None:
        """Read anew when the model has changed in any way, too: so a person can have it looked at."""
        resource = self.indexes.model(model.key)
        version = resource["metadata"]["resourceVersion"] if resource else ""
        if self.last.secret_for != version or self.now - self.last.secret_at > TOKEN_SECONDS:
            self.last.secret = await self.kube.get("Secret", model.namespace, token_name(model.name))
            self.last.secret_at, self.last.secret_for = self.now, version
        return self.last.secret


def last_look(
    model: Model,
    groups: Collection[int],
    resource: Object,
    children: Children,
    pods: Iterable[Pod],
    limits: Limits,
    indexed: Mapping[str, str],
    now: float,
) -> LastLook:
    """What is to be remembered of a live look. `indexed` are the versions that the indexes had before it, by UID."""
    seen = {child["metadata"]["uid"] for child in children.values()} | {pod.uid for pod in pods}
    needed = {(kind, name) for kind, name, _ in expected_names(model, groups) if kind != "Secret"}
    return LastLook(
        at=now,
        limits=limits,
        unlabelled={key: child for key, child in children.items() if key in needed and not _labelled(child, model)},
        gone={uid: version for uid, version in indexed.items() if uid not in seen},
        secret=children.get(("Secret", token_name(model.name))),
        secret_at=now,
        secret_for=str(resource["metadata"].get("resourceVersion", "")),
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


def token_of(secret: Mapping[str, Any] | None) -> str | None:
    encoded = ((secret or {}).get("data") or {}).get(TOKEN_KEY)
    return base64.b64decode(encoded).decode(errors="replace") or None if encoded else None


def _newest(events: list[Object]) -> str:
    def when(event: Object) -> str:
        series = event.get("series") or {}
        times = (event.get("lastTimestamp"), event.get("eventTime"), series.get("lastObservedTime"))
        return max((time for time in times if time), default="")

    newest = max(events, key=when)
    return f"{newest.get('reason', '')}: {newest.get('message', '')}"
