"""One look at one model: observe, decide, apply, report. Nothing is remembered that can't be found again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

from lockstep_operator import events, spec, status
from lockstep_operator.apply import Applied, carry_out
from lockstep_operator.decide import Decision, decide
from lockstep_operator.group_client import Target
from lockstep_operator.groups import groups_of
from lockstep_operator.kube import Kube, KubeError, Object
from lockstep_operator.metrics import Metrics
from lockstep_operator.names import API_VERSION, KIND, ModelKey, token_name
from lockstep_operator.observe import Observed, Report, read_children, read_pods, read_warnings, token_of
from lockstep_operator.settings import Settings
from lockstep_operator.troubles import unexplained

log = logging.getLogger(__name__)

UNSETTLED_SECONDS: Final = 10.0  # a model that isn't Ready is looked at again, for what sends no event


class Groups(Protocol):
    """How groups are asked; see `group_client`."""

    def watch(self, key: ModelKey, targets: Mapping[int, Target]) -> None: ...

    def reports(self, key: ModelKey, leaders: Mapping[int, str]) -> dict[int, Report]: ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """`again` is in how many seconds to look once more at the latest; None when the model is gone."""

    again: float | None
    wrote: bool = False
    refused: bool = False


class Reconciler:
    """Safe to run for several models at once, but not twice at the same time for one."""

    def __init__(
        self, kube: Kube, groups: Groups, settings: Settings, metrics: Metrics, now: Callable[[], float]
    ) -> None:
        self._kube = kube
        self._groups = groups
        self._settings = settings
        self._metrics = metrics
        self._now = now
        self._tolerated: dict[ModelKey, dict[tuple[str, str], frozenset[str]]] = {}  # saves writes, no more

    async def reconcile(self, key: ModelKey) -> Outcome:
        """Raises KubeError when the API server can't do something now."""
        resource = await self._kube.get(KIND, key.namespace, key.name)
        if resource is None or "deletionTimestamp" in resource["metadata"]:
            self.forget(key)
            return Outcome(again=None)
        try:
            model = spec.parse(resource)
        except spec.SpecError as error:
            return await self._report_invalid(key, resource, str(error))
        observed = await self._observe(model, resource)
        decision = decide(model, observed, self._now(), self._settings)
        self._groups.watch(key, targets(decision, observed))
        applied = await carry_out(self._kube, model, decision.actions, self._metrics)
        self._tolerated.setdefault(key, {}).update(applied.tolerated)
        return await self._report(model, resource, observed, decision, applied)

    def forget(self, key: ModelKey) -> None:
        self._groups.watch(key, {})
        self._metrics.forget(key)
        self._tolerated.pop(key, None)

    async def _observe(self, model: spec.Model, resource: Object) -> Observed:
        children = await read_children(self._kube, model)
        observed = Observed(
            status=resource.get("status") or {},
            resource_version=resource["metadata"].get("resourceVersion", ""),
            token=token_of(children.get(("Secret", token_name(model.name)))),
            children=children,
            pods=await read_pods(self._kube, model),
            tolerated=self._tolerated.get(model.key, {}),
        )
        groups = groups_of(model, observed)
        leaders = {group.index: group.leader.uid for group in groups if group.leader}
        asked = unexplained(groups, self._now())
        warnings = await read_warnings(self._kube, model.namespace, asked) if asked else {}
        return replace(observed, warnings=warnings, reports=self._groups.reports(model.key, leaders))

    async def _report(
        self, model: spec.Model, resource: Object, observed: Observed, decision: Decision, applied: Applied
    ) -> Outcome:
        now = self._now()
        built = status.build(model, observed, decision, applied.refused, now)
        memories = status.memories_of(decision, observed)
        seen = events.Pass(observed=observed, new=built, done=applied.effective, memories=memories, now=now)
        for occurrence in events.occurrences(seen):
            await self._record(events.manifest(model, occurrence, now))
        document, due = status.worth_writing(observed.status, built, now)
        if document is not None:
            await self._write_status(resource, document)
        self._metrics.model(model.key, built)
        self._metrics.repaired(model.key, seen.repairs)
        self._metrics.stepped(model.key, observed.reports)
        if applied.done:
            return Outcome(again=0.0, wrote=True, refused=bool(applied.refused))
        settled = (
            self._settings.resync_seconds if _ready(built) else min(UNSETTLED_SECONDS, self._settings.resync_seconds)
        )
        again = min(seconds for seconds in (settled, due, decision.again) if seconds is not None)
        planned = decision.again == 0.0  # a step is written now, and taken in the next pass
        return Outcome(again=again, wrote=planned, refused=bool(applied.refused))

    async def _report_invalid(self, key: ModelKey, resource: Object, message: str) -> Outcome:
        old = resource.get("status") or {}
        built = status.invalid(resource["metadata"].get("generation", 1), old, message, self._now())
        document, _ = status.worth_writing(old, built, self._now())
        if document is not None:
            await self._write_status(resource, document)
        self._metrics.model(key, built)
        return Outcome(again=self._settings.resync_seconds)

    async def _write_status(self, resource: Object, document: Mapping[str, Any]) -> None:
        """Counts and budgets are made from what was read: what someone else wrote since is never overwritten."""
        identity = ("name", "namespace", "uid", "resourceVersion")
        metadata = {name: resource["metadata"][name] for name in identity}
        manifest = {"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "status": document}
        await self._kube.apply_status(KIND, manifest)
        self._metrics.writes.labels(KIND, "Status").inc()

    async def _record(self, event: Mapping[str, Any]) -> None:
        """Events are a courtesy: one that can't be written stops nothing."""
        try:
            await self._kube.create("Event", event)
            self._metrics.writes.labels("Event", "Create").inc()
        except KubeError as error:
            if not error.already_exists:
                log.warning("an Event could not be written: %s", error)


def targets(decision: Decision, observed: Observed) -> dict[int, Target]:
    """Whom to ask: the first pod of every group that has an address."""
    if observed.token is None:
        return {}
    return {
        group.index: Target(leader.uid, leader.ip, observed.token)
        for group in decision.groups
        if (leader := group.leader) and leader.ip and leader.deleting is None
    }


def _ready(built: Mapping[str, Any]) -> bool:
    return any(condition["type"] == "Ready" and condition["status"] == "True" for condition in built["conditions"])
