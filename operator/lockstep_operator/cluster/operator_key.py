"""The operator's key in its Secret: made at the first start, read at every other. No other Secret is ever read."""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
import secrets
from typing import Final

from lockstep_operator.cluster.client import RESOURCES, Kube, KubeError
from lockstep_operator.types.names import APP_LABELS
from lockstep_operator.types.observed import Object
from lockstep_operator.types.operator_key import KEY_BYTES, OperatorKey

log = logging.getLogger(__name__)

SECRET: Final = "Secret"  # noqa: S105 - a kind
FIELD: Final = "key"
RETRY_SECONDS: Final = 2.0


class NoKeyError(Exception):
    """There is a Secret of that name which holds none."""


def passing() -> OperatorKey:
    """One that nobody keeps."""
    return OperatorKey(secrets.token_bytes(KEY_BYTES))


async def obtained(kube: Kube, namespace: str, name: str) -> OperatorKey:
    """However long that takes. For an operator that leads: of two that begin at once, the Secret has one's key."""
    told = ""
    while True:
        try:
            return await _read_or_made(kube, namespace, name)
        except (KubeError, NoKeyError) as error:
            trouble = f"the key in Secret {namespace}/{name} can't be read or made: {error}"
        if trouble != told:
            log.warning("%s", trouble)
        told = trouble
        await asyncio.sleep(RETRY_SECONDS)


async def _read_or_made(kube: Kube, namespace: str, name: str) -> OperatorKey:
    seen = await kube.get(SECRET, namespace, name)
    if seen is not None:
        return _read(seen)
    made = passing()
    await kube.create(SECRET, _document(namespace, name, made))  # a conflict: the next look shows another's
    log.info("Secret %s/%s is made with a new key: the tokens of all models follow from it", namespace, name)
    return made


def _document(namespace: str, name: str, key: OperatorKey) -> Object:
    labels = {"app.kubernetes.io/name": APP_LABELS["app.kubernetes.io/name"], "app.kubernetes.io/component": "operator"}
    return {
        "apiVersion": RESOURCES[SECRET][0],
        "kind": SECRET,
        "metadata": {"namespace": namespace, "name": name, "labels": labels},
        "type": "Opaque",
        "immutable": True,
        "data": {FIELD: base64.b64encode(key.secret).decode()},
    }


def _read(secret: Object) -> OperatorKey:
    try:
        found = base64.b64decode((secret.get("data") or {}).get(FIELD, ""), validate=True)
    except binascii.Error:
        found = b""
    if len(found) < KEY_BYTES:
        raise NoKeyError(f"its field {FIELD} has fewer than {KEY_BYTES} bytes: delete it, and another is made")
    return OperatorKey(found)
