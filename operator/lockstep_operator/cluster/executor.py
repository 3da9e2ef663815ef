"""Executes actions, one write at a time, in the order given. One that fails does not stop the others."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lockstep_operator.cluster.client import Kube, KubeError
from lockstep_operator.cluster.failures import Failures
from lockstep_operator.decisions import manifests
from lockstep_operator.decisions.actions import Action, Apply, CreateToken, Delete
from lockstep_operator.decisions.drift import differences
from lockstep_operator.groups.group import is_ours
from lockstep_operator.reporting.metrics import Metrics
from lockstep_operator.types.observed import ObjectRef
from lockstep_operator.types.spec import Model

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Applied:
    done: tuple[Action, ...] = ()
    server_mutations: Mapping[ObjectRef, frozenset[str]] = field(
        default_factory=dict
    )  # differences that the API server made itself
    ending: bool = False  # the namespace is being deleted: nothing more can be done, nor needs to be

    @property
    def effective(self) -> list[Action]:
        """Without those that left the object unchanged."""
        return [a for a in self.done if not (isinstance(a, Apply) and self.server_mutations.get((a.kind, a.name)))]


def is_due(actions: Sequence[Action], failures: Failures) -> bool:
    """Whether `execute` would try any of these now."""
    failing = failures.of.keys() & {action.target for action in actions}
    return any(
        not failures.waits(action.target, action.wish) and not failing.intersection(action.needs) for action in actions
    )


async def execute(kube: Kube, model: Model, actions: Sequence[Action], failures: Failures, metrics: Metrics) -> Applied:
    """Rejected writes are kept in `failures`, and retried when it says so."""
    done: list[Action] = []
    server_mutations: dict[ObjectRef, frozenset[str]] = {}
    failures.keep(action.target for action in actions)
    for action in actions:
        if failures.waits(action.target, action.wish) or any(needed in failures.of for needed in action.needs):
            continue
        log.info("%s: %s", model.key, action.reason)
        try:
            own = await _perform(kube, model, action)
        except KubeError as error:
            if error.namespace_ending:
                log.info("%s: its namespace is being deleted, and so is all that belongs to it", model.key)
                return Applied(tuple(done), server_mutations, ending=True)
            failure = failures.failed(action.target, action.wish, action.reason, error)
            log.warning("%s: %s", model.key, failure.sentence)
            continue
        failures.succeeded(action.target)
        done.append(action)
        metrics.writes.labels(action.target[0], type(action).__name__).inc()
        if isinstance(action, Apply):
            server_mutations[action.target] = own
    return Applied(tuple(done), server_mutations)


async def _perform(kube: Kube, model: Model, action: Action) -> frozenset[str]:
    match action:
        case CreateToken():
            try:
                await kube.create("Secret", manifests.token_secret(model, secrets.token_urlsafe(32)))
            except KubeError as error:
                if not error.already_exists:
                    raise
        case Apply(kind=kind, manifest=manifest, uid=""):
            return await _make(kube, model, kind, manifest)
        case Apply(kind=kind, manifest=manifest, uid=uid):
            return await _apply_exactly(kube, kind, manifest, uid)
        case Delete(kind=kind, name=name, uid=uid, grace=grace):
            await kube.delete(kind, model.namespace, name, uid, grace)
    return frozenset()


_making = asyncio.Lock()


async def _make(kube: Kube, model: Model, kind: str, manifest: Mapping[str, Any]) -> frozenset[str]:
    """Two models may need the same name, and an apply can't be limited to creation: the second must see what the first
    has created. One at a time, since both may be reconciled at once."""
    async with _making:
        live = await kube.get(kind, model.namespace, manifest["metadata"]["name"])
        if live is None:
            return await _apply_exactly(kube, kind, manifest, "")
    if is_ours(model, live):
        return await _apply_exactly(kube, kind, manifest, str(live["metadata"]["uid"]))
    raise KubeError(409, "Conflict", f"{kind} {manifest['metadata']['name']} was made by someone else meanwhile")


async def _apply_exactly(kube: Kube, kind: str, manifest: Mapping[str, Any], uid: str) -> frozenset[str]:
    """What is left of the differences. Entries that others added to lists survive an apply, or make it invalid.

    `uid` is of the object that was observed: a later one of the same name is never written to.
    """
    mine = {**manifest, "metadata": {**manifest["metadata"], "uid": uid}} if uid else manifest
    try:
        live = await kube.apply(kind, mine)
    except KubeError as error:
        if error.status != 422 or not uid:
            raise
        try:
            return differences(manifest, await kube.overwrite(kind, manifest, uid))
        except KubeError as second:
            raise (error if second.status in (404, 422) else second) from None
    left = differences(manifest, live)
    if not left or "spec" not in manifest:
        return left
    return differences(manifest, await kube.overwrite(kind, manifest, live["metadata"]["uid"]))
