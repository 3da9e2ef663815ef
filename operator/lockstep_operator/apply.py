"""Carries out what was decided, one write at a time, in the order given."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lockstep_operator import desired
from lockstep_operator.decide import Action, Apply, CreateToken, Delete
from lockstep_operator.drift import differences
from lockstep_operator.kube import Kube, KubeError
from lockstep_operator.metrics import Metrics
from lockstep_operator.spec import Model

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Applied:
    done: tuple[Action, ...]
    refused: str  # the first permanent refusal, in a sentence; empty if none
    tolerated: dict[tuple[str, str], frozenset[str]]  # differences that the API server made itself

    @property
    def effective(self) -> list[Action]:
        """Without those that left the object as it was."""
        return [a for a in self.done if not (isinstance(a, Apply) and self.tolerated.get((a.kind, a.name)))]


async def carry_out(kube: Kube, model: Model, actions: Sequence[Action], metrics: Metrics) -> Applied:
    """Raises KubeError for what may succeed later; what is refused for good is told, and the rest still done."""
    done: list[Action] = []
    refused = ""
    tolerated: dict[tuple[str, str], frozenset[str]] = {}
    for action in actions:
        log.info("%s: %s", model.key, action.reason)
        try:
            own = await _perform(kube, model, action)
        except KubeError as error:
            if error.transient:
                raise
            refused = refused or f"the API server refuses a change ({action.reason}): {error}"
            log.warning("%s: %s", model.key, refused)
            continue
        done.append(action)
        metrics.writes.labels(_kind(action), type(action).__name__).inc()
        if isinstance(action, Apply):
            tolerated[action.kind, action.name] = own
    return Applied(tuple(done), refused, tolerated)


async def _perform(kube: Kube, model: Model, action: Action) -> frozenset[str]:
    match action:
        case CreateToken():
            try:
                await kube.create("Secret", desired.token_secret(model, secrets.token_urlsafe(32)))
            except KubeError as error:
                if not error.already_exists:
                    raise
        case Apply(kind=kind, manifest=manifest):
            return await _put_right(kube, kind, manifest)
        case Delete(kind=kind, name=name, uid=uid, grace=grace):
            await kube.delete(kind, model.namespace, name, uid, grace)
    return frozenset()


async def _put_right(kube: Kube, kind: str, manifest: Mapping[str, Any]) -> frozenset[str]:
    """What is left of the differences. Entries that others added to lists survive an apply, or make it invalid."""
    try:
        left = differences(manifest, await kube.apply(kind, manifest))
    except KubeError as error:
        if error.status != 422:
            raise
        try:
            return differences(manifest, await kube.overwrite(kind, manifest))
        except KubeError as second:
            raise (error if second.status in (404, 422) else second) from None
    return differences(manifest, await kube.overwrite(kind, manifest)) if left and "spec" in manifest else left


def _kind(action: Action) -> str:
    return "Secret" if isinstance(action, CreateToken) else action.kind
