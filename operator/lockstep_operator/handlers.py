"""What kopf does for the operator: it watches, keeps the indexes, starts and ends what works beside it.

Only `index` and `on.event` handlers are used: they leave the objects alone (no finalizers, no annotations), so that
models and their children can be deleted while the operator is away. All are coroutines, since kopf runs plain functions
in threads. Nothing is imported from kopf's private modules, and which pod this is it learns from POD_ID.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Any, Final

import kopf

from lockstep_operator.cluster.client import RESOURCES
from lockstep_operator.cluster.indexes import BUDGET, INDEXED, Indexes, entry, leaves
from lockstep_operator.types.names import KIND, ModelKey, key_of_child, label_of

Changed = Callable[[ModelKey], None]
OF_ANYBODY: Final = (KIND, BUDGET)  # watched whatever their labels


def registry(
    work: Callable[[Indexes], AbstractAsyncContextManager[Changed]], *, nodes: bool = False
) -> kopf.OperatorRegistry:
    """`work` is what runs as long as kopf watches; it yields whom to tell of every model that may have changed.
    `nodes`: whether they are watched, too."""
    handlers = kopf.OperatorRegistry()

    async def start(memo: kopf.Memo, **kwargs: Any) -> None:
        indexes = memo.indexes = Indexes()
        indexes.bind({kind: kwargs[kind] for kind in INDEXED})
        memo.budgets = {}  # UID of somebody else's → what was last heard of it
        memo.work = AsyncExitStack()
        memo.changed = await memo.work.enter_async_context(work(indexes))

    async def stop(memo: kopf.Memo, **_: Any) -> None:
        await memo.work.aclose()

    kopf.on.startup(registry=handlers, errors=kopf.ErrorsMode.PERMANENT)(start)
    kopf.on.cleanup(registry=handlers)(stop)
    kopf.on.login(registry=handlers)(_login)
    for kind in INDEXED:
        labels = None if kind in OF_ANYBODY else {label_of(kind): kopf.PRESENT}
        kopf.index(*_resource(kind), labels=labels, registry=handlers, id=kind)(_indexer(kind))
        changed: Callable[..., Any] = _CHANGED.get(kind, _child_changed)
        kopf.on.event(*_resource(kind), labels=labels, registry=handlers, id=kind)(changed)
    if nodes:
        kopf.on.event("", "v1", "nodes", registry=handlers, id="Node")(_node_changed)
    return handlers


def _indexer(kind: str) -> Callable[..., Any]:
    async def index(body: Mapping[str, Any], **_: Any) -> Mapping[ModelKey, bytes]:
        return entry(kind, body)

    return index


async def _model_changed(memo: kopf.Memo, namespace: str, name: str, **_: Any) -> None:
    memo.changed(ModelKey(namespace, name))


async def _child_changed(memo: kopf.Memo, namespace: str, name: str, body: Mapping[str, Any], **kwargs: Any) -> None:
    """A name that is free again may be one that another model waits for."""
    if key := key_of_child(body):
        memo.changed(key)
    if kwargs["type"] == "DELETED":
        for other in kwargs[KIND]:
            if other != key and other.namespace == namespace and name.startswith(f"{other.name}-"):
                memo.changed(other)


async def _budget_changed(memo: kopf.Memo, namespace: str, body: Mapping[str, Any], **kwargs: Any) -> None:
    """Somebody else's may select the pods of any model of its namespace. Its status changes with every pod's readiness,
    which concerns nobody here."""
    if key := key_of_child(body):
        memo.changed(key)
        return
    metadata = body["metadata"]
    version = metadata.get("generation"), kwargs["type"] == "DELETED"
    if memo.budgets.get(metadata["uid"]) == version:
        return
    memo.budgets[metadata["uid"]] = version
    for key in kwargs[KIND]:
        if key.namespace == namespace:
            memo.changed(key)


async def _node_changed(memo: kopf.Memo, name: str, body: Mapping[str, Any], **kwargs: Any) -> None:
    indexes: Indexes = memo.indexes
    if indexes.heard_of_node(name, leaves=leaves(body) and kwargs["type"] != "DELETED"):
        for key in indexes.on_node(name):
            memo.changed(key)


_CHANGED: Final[Mapping[str, Callable[..., Any]]] = {KIND: _model_changed, BUDGET: _budget_changed}


def _resource(kind: str) -> tuple[str, str, str]:
    """API group, version and plural."""
    api_version, plural = RESOURCES[kind]
    group, _, version = api_version.rpartition("/")
    return group, version, plural


async def _login(**details: Any) -> kopf.ConnectionInfo | None:
    return kopf.login_with_service_account(**details) or kopf.login_with_kubeconfig(**details)


def kopf_settings() -> kopf.OperatorSettings:
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.peering.standalone = True
    settings.scanning.disabled = True  # needs no rights to look at namespaces and CRDs
    for kind in INDEXED:
        if kind not in OF_ANYBODY:
            settings.watching.label_selectors[_resource(kind)] = label_of(kind)  # the API server filters
    logging.getLogger("kopf").setLevel(logging.WARNING)  # it tells of every event that it hands on
    return settings
