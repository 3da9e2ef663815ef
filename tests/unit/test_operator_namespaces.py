"""Which namespaces are watched: those that grant the operator what it needs, and no others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from tests.support.kube_world import World

from lockstep_operator.cluster import namespaces
from lockstep_operator.cluster.client import KubeError
from lockstep_operator.cluster.indexes import INDEXED
from lockstep_operator.cluster.namespaces import Namespaces
from lockstep_operator.reporting.metrics import Metrics
from lockstep_operator.types.observed import Object

FORBIDDEN = KubeError(403, "Forbidden", "pods is forbidden: it cannot list resource")
UNAVAILABLE = KubeError(503, "ServiceUnavailable", "etcd is away")


class Lists:
    """The API server's lists: what a namespace refuses is in `refused`, by namespace and kind."""

    def __init__(self) -> None:
        self.refused: dict[tuple[str, str], KubeError] = {}

    async def find(self, kind: str, namespace: str, *, labels: str = "", fields: str = "") -> list[Object]:
        assert fields, "all objects of a namespace would come"
        if error := self.refused.get((namespace, kind)):
            raise error
        return []


def made(*names: str) -> tuple[Lists, Namespaces, Metrics]:
    lists, metrics = Lists(), Metrics()
    kube: Any = lists  # only lists are asked for
    return lists, Namespaces(names, kube, metrics), metrics


def served(metrics: Metrics) -> dict[str, float]:
    samples = [sample for family in metrics.registry.collect() for sample in family.samples]
    return {s.labels["namespace"]: s.value for s in samples if s.name == "lockstep_operator_namespace_served"}


@pytest.mark.parametrize("kind", INDEXED)
async def test_each_kind_that_is_watched_must_be_granted(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    lists, known, metrics = made("a", "b")
    lists.refused["a", kind] = FORBIDDEN
    await known.look()
    await known.look()
    assert (known.serves("a"), known.serves("b"), known.serves("c")) == (False, True, False)
    assert served(metrics) == {"a": 0, "b": 1}
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == 1, "once, not at every look"
    assert "namespace a can't be served" in told[0]
    assert "cannot list resource" in told[0]


async def test_an_api_server_that_can_not_say_changes_nothing() -> None:
    lists, known, metrics = made("a")
    await known.look()
    lists.refused["a", "Pod"] = UNAVAILABLE
    await known.look()
    assert known.serves("a")
    lists.refused["a", "Pod"] = FORBIDDEN
    await known.look()
    lists.refused["a", "Pod"] = UNAVAILABLE
    await known.look()
    assert not known.serves("a")
    assert served(metrics) == {"a": 0}


async def test_a_change_of_what_can_be_watched_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(namespaces, "LOOK_SECONDS", 0.01)
    lists, known, _ = made("a", "b")
    await known.look()

    async def after(change: Callable[[], object]) -> set[str]:
        watching = asyncio.create_task(known.other_than(known.served))
        await asyncio.sleep(0.1)
        assert not watching.done(), "nothing has changed"
        change()
        async with asyncio.timeout(10):
            await watching
        return {*known.served}

    def refuse(namespace: str) -> None:
        lists.refused[namespace, "StatefulSet"] = FORBIDDEN

    assert await after(lambda: refuse("a")) == {"b"}
    assert await after(lambda: refuse("b")) == set()
    assert await after(lists.refused.clear) == {"a", "b"}


async def test_without_names_the_whole_cluster_is_served_and_nothing_asked() -> None:
    known = Namespaces((), World().kube, Metrics())
    await known.look()
    assert known.serves("any")
