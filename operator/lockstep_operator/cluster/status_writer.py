"""Writes of a model's status and of its Events."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from lockstep_operator.cluster.client import Kube, KubeError
from lockstep_operator.cluster.served_schema import ServedSchema
from lockstep_operator.reporting import document, events
from lockstep_operator.reporting.metrics import Metrics
from lockstep_operator.types.names import API_VERSION, KIND, ModelKey
from lockstep_operator.types.observed import Object

log = logging.getLogger(__name__)


class StatusWriter:
    def __init__(self, kube: Kube, schema: ServedSchema, metrics: Metrics) -> None:
        self._kube = kube
        self._schema = schema
        self._metrics = metrics

    async def write(self, resource: Object, status: Mapping[str, Any]) -> Object | None:
        """The model with the status, or with the part of it that recovery needs; None if the API server takes neither.
        Counts and budgets were computed from `resource`: if somebody has written since, nothing is overwritten. Raises
        KubeError for what may pass soon."""
        try:
            return await self._apply(resource, status)
        except KubeError as error:
            if error.transient:
                raise
            if error.status == 404:
                return resource  # the model was deleted meanwhile: there is nothing to write to
            lacking = error.unknown_fields and self._schema.lacks(error.unknown_fields)
            return await self._write_less(
                resource, self._schema.fitting(status) if lacking else document.essential(status)
            )

    async def _write_less(self, resource: Object, status: Mapping[str, Any]) -> Object | None:
        try:
            return await self._apply(resource, status)
        except KubeError as error:
            if error.transient:
                raise
            log.error("the API server rejects a status in every form, so it is kept in memory only: %s", error)
            return None

    async def _apply(self, resource: Object, status: Mapping[str, Any]) -> Object:
        metadata = {name: resource["metadata"][name] for name in ("name", "namespace", "uid", "resourceVersion")}
        manifest = {"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "status": status}
        written = await self._kube.apply_status(KIND, manifest)
        self._metrics.writes.labels(KIND, "Status").inc()
        return written

    async def record(self, resource: Object, drafts: Iterable[events.EventDraft], now: float) -> None:
        """Write Events about the model. One that can't be written stops nothing."""
        metadata = resource["metadata"]
        key = ModelKey(metadata["namespace"], metadata["name"])
        for draft in drafts:
            try:
                await self._kube.create("Event", events.manifest(key, metadata["uid"], draft, now))
                self._metrics.writes.labels("Event", "Create").inc()
            except KubeError as error:
                if not (error.already_exists or error.namespace_ending):
                    log.warning("an Event could not be written: %s", error)
