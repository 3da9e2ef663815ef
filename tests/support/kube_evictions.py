"""Evictions as the API server of Kubernetes 1.34 answers them, with budgets counted as their controller does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.support.kube_fake import FakeKube, is_ready, owned

from lockstep_operator.cluster.client import KubeError
from lockstep_operator.decisions.disruption import BUDGET, selected
from lockstep_operator.types.names import GROUP_LABEL
from lockstep_operator.types.observed import Object


def evict(kube: FakeKube, namespace: str, name: str) -> None:
    """As `kubectl drain` asks. Raises KubeError: 429 while a budget is against it, 500 where there are two."""
    pod = kube.objects["Pod", namespace, name]
    budgets = [one for one in _in_namespace(kube, BUDGET, namespace) if _covers(one, pod)]
    if "deletionTimestamp" not in pod["metadata"]:
        if len(budgets) > 1:
            words = "This pod has more than one PodDisruptionBudget, which the eviction subresource does not support."
            raise KubeError(500, "InternalError", words)
        for budget in budgets:
            _ask(kube, budget, pod)
    kube.remove("Pod", namespace, name)


def _ask(kube: FakeKube, budget: Object, pod: Object) -> None:
    spec, namespace = budget["spec"], pod["metadata"]["namespace"]
    if not is_ready(pod) and spec.get("unhealthyPodEvictionPolicy") == "AlwaysAllow":
        return
    covered = [one for one in _in_namespace(kube, "Pod", namespace) if _covers(budget, one)]
    healthy = sum(is_ready(one) and "deletionTimestamp" not in one["metadata"] for one in covered)
    needed = spec["minAvailable"] if "minAvailable" in spec else _expected(kube, covered) - spec["maxUnavailable"]
    if healthy <= needed:
        words = "Cannot evict pod as it would violate the pod's disruption budget."
        cause = f"The disruption budget {budget['metadata']['name']} needs {needed} healthy pods and has {healthy}"
        raise KubeError(429, "TooManyRequests", f"{words} {cause} currently")


def _expected(kube: FakeKube, covered: list[Object]) -> int:
    """How many pods there are to be, by the workloads of those that there are."""
    workloads = [one for one in kube.of_kind("StatefulSet") if any(owned(pod, one) for pod in covered)]
    return sum(one["spec"]["replicas"] for one in workloads)


def _in_namespace(kube: FakeKube, kind: str, namespace: str) -> list[Object]:
    return [one for one in kube.of_kind(kind) if one["metadata"]["namespace"] == namespace]


def _covers(budget: Object, pod: Object) -> bool:
    return selected(budget["spec"].get("selector"), pod["metadata"]["labels"])


def incomplete(kube: FakeKube) -> Callable[[Object], bool]:
    """For `World.broken`: a pod isn't Ready unless all pods of its group run and stay, as their supervisors have it."""

    def of_group(pod: Object) -> bool:
        mates = [one for one in kube.of_kind("Pod") if _group(one) == _group(pod)]
        wanted = sum(one["spec"]["replicas"] for one in kube.of_kind("StatefulSet") if owned(pod, one))
        running = [one for one in mates if one["status"]["phase"] == "Running"]
        return len(running) != wanted or any("deletionTimestamp" in one["metadata"] for one in mates)

    return of_group


def _group(pod: Object) -> tuple[Any, ...]:
    metadata = pod["metadata"]
    return metadata["namespace"], metadata["labels"].get(GROUP_LABEL), metadata["ownerReferences"][0]["uid"]
