"""What kopf tells us: that something about a model may have changed. Everything else is found out by looking.

Only `on.event` handlers are used: they leave the objects alone (no finalizers, no annotations), so that models and
their children can be deleted while the operator is away.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Final

import kopf

from lockstep_operator.types.names import GROUP, MODEL_LABEL, PLURAL, VERSION, ModelKey, key_of_child

WATCHED: Final = (
    ("apps", "v1", "statefulsets"),
    ("", "v1", "pods"),
    ("", "v1", "services"),
    ("", "v1", "serviceaccounts"),
    ("networking.k8s.io", "v1", "networkpolicies"),
)


def registry(changed: Callable[[ModelKey], None]) -> kopf.OperatorRegistry:
    """Handlers that call `changed` with the key of every model of which something may have changed."""
    handlers = kopf.OperatorRegistry()

    async def model(namespace: str | None, name: str | None, **_: Any) -> None:
        if namespace and name:
            changed(ModelKey(namespace, name))

    async def child(body: Mapping[str, Any], **_: Any) -> None:
        if key := key_of_child(body):
            changed(key)

    kopf.on.login(registry=handlers)(_login)
    kopf.on.event(GROUP, VERSION, PLURAL, registry=handlers, id="model")(model)
    for group, version, plural in WATCHED:
        kopf.on.event(group, version, plural, labels={MODEL_LABEL: kopf.PRESENT}, registry=handlers, id="child")(child)
    return handlers


def _login(**details: Any) -> kopf.ConnectionInfo | None:
    return kopf.login_with_service_account(**details) or kopf.login_with_kubeconfig(**details)


def kopf_settings() -> kopf.OperatorSettings:
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.peering.standalone = True
    settings.scanning.disabled = True  # needs no rights to look at namespaces and CRDs
    for resource in WATCHED:
        settings.watching.label_selectors[resource] = MODEL_LABEL  # the API server filters
    logging.getLogger("kopf").setLevel(logging.WARNING)  # it tells of every event that it hands on
    return settings
