"""The operator's metrics, in a registry of their own."""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lockstep_operator.decisions.node_suspicion import NodeFault
from lockstep_operator.reporting.recovery_log import Repair
from lockstep_operator.types.model_status import ModelStatus, Savings
from lockstep_operator.types.names import ModelKey
from lockstep_operator.types.observed import GroupReport
from lockstep_operator.types.reasons import ConditionType
from lockstep_runtime.protocol.status import GroupStatus

STATES = ("Ready", "Progressing", "Stalled")
CONDITIONS = (ConditionType.READY, ConditionType.AVAILABLE, ConditionType.POISONED, ConditionType.STALLED)
NAMED_NODES = 1000  # faults of more than that are counted together
NODES_TEXT = "Faults of ranks that ran on the node, whatever model they were of"
SAVED = (
    ("healed_faults", "Faults that groups repaired by themselves, since the model was made"),
    ("kept_requests", "Requests that went on after such a fault"),
    ("paused_seconds", "Seconds that these repairs took"),
    ("avoided_restart_seconds", "What starting the group had taken last, once for each such fault where it is known"),
)
PHASE_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class _LastSteps(Collector):
    """Collected when scraped, so that the time advances while nothing happens."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self.at: dict[ModelKey, dict[int, float]] = {}

    def collect(self) -> Iterator[Metric]:
        family = GaugeMetricFamily(
            "lockstep_operator_seconds_since_last_step",
            "Seconds since the group's last step ended; it also rises without requests",
            labels=["namespace", "model", "group"],
        )
        now = self._now()
        for key, groups in self.at.items():
            for group, at in groups.items():
                family.add_metric([key.namespace, key.name, str(group)], max(0.0, now - at))
        yield family


class Metrics:
    """Models are counted by their newest status."""

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self.registry = CollectorRegistry()
        counter = partial(Counter, registry=self.registry)
        gauge = partial(Gauge, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry)
        self.reconciles = counter("lockstep_operator_reconciles", "Reconciliations by result", ["result"])
        self.seconds = histogram("lockstep_operator_reconcile_seconds", "Duration of reconciliations")
        self.writes = counter("lockstep_operator_writes", "Writes to the API server", ["kind", "action"])
        self.queued = gauge("lockstep_operator_queued_models", "Models waiting for a reconciliation")
        self._models = gauge("lockstep_operator_models", "Models by state", ["state"])
        self._groups = gauge("lockstep_operator_groups", "Groups that exist")
        self._ready = gauge("lockstep_operator_groups_ready", "Groups that accept requests")
        self._recoveries = counter(
            "lockstep_operator_recoveries",
            "Repaired faults, by fault and by the rung that worked",
            ["namespace", "model", "fault", "rung"],
        )
        self._phases = histogram(
            "lockstep_operator_recovery_seconds",
            "Duration of recoveries by phase; total is from the fault to serving again",
            ["phase"],
            buckets=PHASE_BUCKETS,
        )
        self._nodes = counter("lockstep_node_faults", NODES_TEXT, ["node", "fault"])
        self._named: set[str] = set()
        self._saved = {name: gauge(f"lockstep_operator_{name}", text, ["namespace", "model"]) for name, text in SAVED}
        self._conditions = gauge(
            "lockstep_operator_condition",
            "1 where the model's condition is True, else 0",
            ["namespace", "model", "condition"],
        )
        self._failing = gauge(
            "lockstep_operator_reconcile_failing",
            "1 where the model's latest reconciliation failed, else 0",
            ["namespace", "model"],
        )
        self._namespaces = gauge(
            "lockstep_operator_namespace_served",
            "1 where a configured namespace can be watched, else 0; absent when the operator serves the whole cluster",
            ["namespace"],
        )
        self.unserved_fields = gauge(
            "lockstep_operator_unserved_status_fields",
            "Fields of the status that the cluster's CRD lacks because it is older than the operator",
        )
        self.leader = gauge(
            "lockstep_operator_leader", "1 where this operator works, 0 where it stands by for the one that does"
        )
        self._steps = _LastSteps(now)
        self.registry.register(self._steps)
        self._counted: dict[ModelKey, set[tuple[str, str]]] = {}
        self._reconciled: set[ModelKey] = set()
        self._receipts: set[ModelKey] = set()
        self._known: dict[ModelKey, tuple[str, int, int]] = {}
        self._publish()

    def model(self, key: ModelKey, status: ModelStatus) -> None:
        state = next((name for name in ("Ready", "Stalled") if status.is_true(name)), "Progressing")
        self._known[key] = (state, status.replicas, status.ready_replicas)
        for condition in CONDITIONS:
            self._conditions.labels(key.namespace, key.name, condition).set(status.is_true(condition))
        self._save(key, status.savings)
        self._publish()

    def _save(self, key: ModelKey, saved: Savings | None) -> None:
        if saved is None:
            return
        values = (saved.faults, saved.requests, saved.paused_seconds, saved.restart_seconds)
        for (name, _), value in zip(SAVED, values, strict=True):
            self._saved[name].labels(key.namespace, key.name).set(value)
        self._receipts.add(key)

    def node_faults(self, faults: Iterable[NodeFault]) -> None:
        """Each once: those that the status just written is the first to hold."""
        for one in faults:
            known = one.node in self._named or len(self._named) < NAMED_NODES
            self._named |= {one.node} if known else set()
            self._nodes.labels(one.node if known else "others", one.fault).inc()

    def namespace(self, name: str, *, served: bool) -> None:
        self._namespaces.labels(name).set(served)

    def reconciled(self, key: ModelKey, *, failed: bool) -> None:
        self._failing.labels(key.namespace, key.name).set(failed)
        self._reconciled.add(key)

    def repaired(self, key: ModelKey, repairs: Iterable[Repair]) -> None:
        """Each repair once: those that the status just written is the first to hold."""
        for repair in repairs:
            self._recoveries.labels(key.namespace, key.name, repair.fault, repair.rung).inc()
            self._counted.setdefault(key, set()).add((repair.fault, repair.rung))
            for phase, seconds in repair.phases.items():
                self._phases.labels(phase).observe(seconds)
            self._phases.labels("total").observe(repair.finished - repair.noticed)

    def stepped(self, key: ModelKey, reports: Mapping[int, GroupReport]) -> None:
        known = {group: report.status.last_step_at for group, report in reports.items() if report.status}
        self._steps.at[key] = {group: at for group, at in known.items() if at is not None}

    def heard(self, key: ModelKey, group: int, status: GroupStatus) -> None:
        """A group's new report: measurements need no reconciliation."""
        if key in self._known and status.last_step_at is not None:
            self._steps.at.setdefault(key, {})[group] = status.last_step_at

    def forget(self, key: ModelKey) -> None:
        """Of a model that is gone, no series stays."""
        if self._known.pop(key, None):
            for condition in CONDITIONS:
                self._conditions.remove(key.namespace, key.name, condition)
        if key in self._reconciled:
            self._reconciled.remove(key)
            self._failing.remove(key.namespace, key.name)
        if key in self._receipts:
            self._receipts.remove(key)
            for one in self._saved.values():
                one.remove(key.namespace, key.name)
        for fault, rung in self._counted.pop(key, set()):
            self._recoveries.remove(key.namespace, key.name, fault, rung)
        self._steps.at.pop(key, None)
        self._publish()

    def _publish(self) -> None:
        tally = Tally(state for state, _, _ in self._known.values())
        for state in STATES:
            self._models.labels(state).set(tally[state])
        self._groups.set(sum(groups for _, groups, _ in self._known.values()))
        self._ready.set(sum(ready for _, _, ready in self._known.values()))
