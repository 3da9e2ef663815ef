"""The operator's metrics, in a registry of their own."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from lockstep_operator.names import ModelKey

STATES = ("Ready", "Progressing", "Stalled")


class Metrics:
    """Models are counted by what their newest status says."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.reconciles = Counter(
            "lockstep_operator_reconciles", "Reconciliations by result", ["result"], registry=self.registry
        )
        self.seconds = Histogram(
            "lockstep_operator_reconcile_seconds", "Duration of reconciliations", registry=self.registry
        )
        self.writes = Counter(
            "lockstep_operator_writes",
            "Writes to the API server by kind and action",
            ["kind", "action"],
            registry=self.registry,
        )
        self.queued = Gauge("lockstep_operator_queued_models", "Models that wait for a look", registry=self.registry)
        self._models = Gauge("lockstep_operator_models", "Models by state", ["state"], registry=self.registry)
        self._groups = Gauge("lockstep_operator_groups", "Groups that exist", registry=self.registry)
        self._ready = Gauge("lockstep_operator_groups_ready", "Groups that take requests", registry=self.registry)
        self._known: dict[ModelKey, tuple[str, int, int]] = {}
        self._publish()

    def model(self, key: ModelKey, status: Mapping[str, Any]) -> None:
        true = {condition["type"] for condition in status.get("conditions") or [] if condition["status"] == "True"}
        state = next((name for name in ("Ready", "Stalled") if name in true), "Progressing")
        self._known[key] = (state, status.get("replicas", 0), status.get("readyReplicas", 0))
        self._publish()

    def forget(self, key: ModelKey) -> None:
        self._known.pop(key, None)
        self._publish()

    def _publish(self) -> None:
        tally = Tally(state for state, _, _ in self._known.values())
        for state in STATES:
            self._models.labels(state).set(tally[state])
        self._groups.set(sum(groups for _, groups, _ in self._known.values()))
        self._ready.set(sum(ready for _, _, ready in self._known.values()))
