"""Executes actions, one write at a time, in the order given. One that fails does not stop the others."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from lockstep_operator.cluster.client import Kube, KubeError
from lockstep_operator.cluster.failures import Failures
from lockstep_operator.decisions import manifests
from lockstep_operator.decisions.actions import Action, Apply, Delete, MakeTokens
from lockstep_operator.decisions.drift import differences
from lockstep_operator.reporting.metrics import Metrics
from lockstep_operator.types.observed import Object, ObjectRef
from lockstep_operator.types.operator_key import OperatorKey
from lockstep_operator.types.spec import Model

log = logging.getLogger(__name__)

# No object has it: an apply that names it makes the object, or is a conflict where there is one.
UNMADE: Final = "1"


@dataclass(frozen=True, slots=True)
class Applied:
    done: tuple[Action, ...] = ()
    server_mutations: Mapping[ObjectRef, frozenset[str]] = field(
        default_factory=dict
    )  # differences that the API server made itself
    written: tuple[tuple[str, Object], ...] = ()  # kind, and the object as the API server has it now
    ending: bool = False  # the namespace is being deleted: nothing more can be done, nor needs to be

    @property
    def effective(self) -> list[Action]:
        """Without those that left the object unchanged."""
        return [a for a in self.done if not (isinstance(a, Apply) and self.server_mutations.get((a.kind, a.name)))]


class StaleError(Exception):
    """There is something already where the indexes had nothing."""


def due(actions: Sequence[Action], failures: Failures) -> list[Action]:
    """What `execute` would try now."""
    failing = failures.of.keys() & {action.target for action in actions}
    return [
        action
        for action in actions
        if not failures.waits(action.target, action.wish) and not failing.intersection(action.needs)
    ]


def makes(action: Action) -> bool:
    """Whether it can harm nothing that there is: the API server refuses it where there is something."""
    return isinstance(action, MakeTokens) or (isinstance(action, Apply) and not action.uid)


async def execute(
    kube: Kube,
    model: Model,
    actions: Sequence[Action],
    key: OperatorKey,
    failures: Failures,
    metrics: Metrics,
    *,
    live: bool,
) -> Applied:
    """Rejected writes are kept in `failures`, and retried when it says so. Unless it is `live` what they were decided
    on, StaleError is raised when they have nothing to do with what is so. The model's tokens follow from `key`."""
    done: list[Action] = []
    written: list[tuple[str, Object]] = []
    server_mutations: dict[ObjectRef, frozenset[str]] = {}
    failures.keep(action.target for action in actions)
    for action in actions:
        if failures.waits(action.target, action.wish) or any(needed in failures.of for needed in action.needs):
            continue
        log.info("%s: %s", model.key, action.reason)
        try:
            now_there = await _perform(kube, model, action, key)
        except KubeError as error:
            if error.namespace_ending:
                log.info("%s: its namespace is being deleted, and so is all that belongs to it", model.key)
                return Applied(tuple(done), server_mutations, ending=True)
            if not live and error.status == 409:
                raise StaleError from error
            failure = failures.failed(action.target, action.wish, action.reason, error)
            log.warning("%s: %s", model.key, failure.sentence)
            continue
        failures.succeeded(action.target)
        done.append(action)
        metrics.writes.labels(action.target[0], type(action).__name__).inc()
        if now_there is not None:
            written.append((action.target[0], now_there))
        if isinstance(action, Apply) and now_there is not None:
            server_mutations[action.target] = differences(action.manifest, now_there)
    return Applied(tuple(done), server_mutations, tuple(written))


async def _perform(kube: Kube, model: Model, action: Action, key: OperatorKey) -> Object | None:
    """The object afterwards, as far as it is known."""
    match action:
        case MakeTokens(groups_too=groups_too):
            await _make_tokens(kube, model, key, groups_too=groups_too)
        case Apply(kind=kind, manifest=manifest, uid=uid):
            return await _apply_exactly(kube, kind, manifest, uid)
        case Delete(kind=kind, name=name, uid=uid, grace=grace):
            await kube.delete(kind, model.namespace, name, uid, grace)
    return None


async def _make_tokens(kube: Kube, model: Model, key: OperatorKey, *, groups_too: bool) -> None:
    """Nobody may read what a Secret of these names holds, so the operator's is replaced. The quota is asked first: it
    may be what there is that exhausts it."""
    of_group = manifests.group_token(model, key.group_token(model.uid, model.tokens_id))
    of_operator = manifests.operator_token(model, key.operator_token(model.uid, model.tokens_id))
    try:
        await kube.create("Secret", of_operator)
    except KubeError as error:
        if not (error.already_exists or error.over_quota):
            raise
        await kube.delete("Secret", model.namespace, of_operator["metadata"]["name"])
        await kube.create("Secret", of_operator)
    if not groups_too:
        return
    try:
        await kube.create("Secret", of_group)
    except KubeError as error:
        if not error.already_exists:
            raise


async def _apply_exactly(kube: Kube, kind: str, manifest: Mapping[str, Any], uid: str) -> Object:
    """What there is then. Entries that others added to lists survive an apply, or make it invalid.

    `uid` is of the object that was observed: a later one of the same name is never written to. Without one nothing was
    observed, and nothing that is there is written to: two models may need the same name.
    """
    bound = {"uid": uid} if uid else {"resourceVersion": UNMADE}
    mine = {**manifest, "metadata": {**manifest["metadata"], **bound}}
    try:
        live = await kube.apply(kind, mine)
    except KubeError as error:
        if error.status != 422 or not uid:
            raise
        try:
            return await kube.overwrite(kind, manifest, uid)
        except KubeError as second:
            raise (error if second.status in (404, 422) else second) from None
    if "spec" not in manifest or not differences(manifest, live):
        return live
    return await kube.overwrite(kind, manifest, live["metadata"]["uid"])
