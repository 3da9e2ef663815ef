"""The pods of a group (pure): ours, with the user's template laid over them. All are of one template; a pod's index is
its identity."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, Final

from lockstep_operator.decisions import mesh
from lockstep_operator.decisions.rank_pod import pod_spec
from lockstep_operator.decisions.requests import fitted
from lockstep_operator.decisions.strategic_merge import merge
from lockstep_operator.settings import Settings
from lockstep_operator.types import names
from lockstep_operator.types.limits import Limits
from lockstep_operator.types.model_source import HuggingFace
from lockstep_operator.types.quantity import quantity
from lockstep_operator.types.spec import Model
from lockstep_operator.types.timestamps import format_rfc3339

THREADS_PER_GPU_RANK: Final = 4  # for what it does on the host: loading weights
THREADS: Final = "LOCKSTEP_THREADS_PER_RANK"
_REQUIRED: Final = "requiredDuringSchedulingIgnoredDuringExecution"
# Kubernetes' own 300 s are for pods that are soon replaced elsewhere; a group that lost one serves nobody meanwhile.
EVICTION_SECONDS: Final = 30
_NODE_TAINTS: Final = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")


def pod_template(
    model: Model,
    group: int,
    revision: str,
    settings: Settings,
    avoid: Collection[str] = (),
    limits: Limits = Limits(),  # noqa: B008 - frozen
    commit: str = "",
) -> dict[str, Any]:
    """A PodTemplateSpec: ours, with the user's laid over it and then our labels, which selectors rely on.

    `avoid` names nodes that the pods are kept away from, `limits` are the namespace's, `commit` is what the hub's model
    is pinned to. The model's template must have no flaw (see `template_check`).
    """
    ours: dict[str, Any] = {"metadata": {"labels": {}}, "spec": pod_spec(model, group, revision, settings, commit)}
    merged = _with_tolerations(_with_containers(merge(ours, model.template), model, limits))
    own = {**names.ENGINE_LABELS, **group_labels(model, group), names.REVISION_LABEL: revision}
    labels = {**merged["metadata"].get("labels", {}), **own}
    merged["metadata"] = {**merged["metadata"], "labels": labels}
    given = merged["metadata"].get("annotations") or {}
    if annotations := {**mesh.pod_annotations(model), **given, **_requests(model)}:
        merged["metadata"]["annotations"] = annotations
    if avoid:
        merged["spec"] = {**merged["spec"], "affinity": _away_from(avoid, merged["spec"].get("affinity") or {})}
    return merged


def _requests(model: Model) -> dict[str, str]:
    """That the pods follow: they are replaced when one is new."""
    resolve_at = model.source.resolve_at if isinstance(model.source, HuggingFace) else None
    times = {names.RESTARTED_ANNOTATION: model.restarted_at, names.RESOLVE_ANNOTATION: resolve_at}
    return {name: format_rfc3339(time) for name, time in times.items() if time is not None}


def _with_containers(template: dict[str, Any], model: Model, limits: Limits) -> dict[str, Any]:
    containers = [
        _threaded(_fitted(one, model, limits), model) if one["name"] == names.CONTAINER else one
        for one in template["spec"]["containers"]
    ]
    return {**template, "spec": {**template["spec"], "containers": containers}}


def _with_tolerations(template: dict[str, Any]) -> dict[str, Any]:
    """With a short wait for a node that doesn't respond, unless the user's tolerations cover it."""
    given = template["spec"].get("tolerations") or []
    ours = [
        {"key": taint, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": EVICTION_SECONDS}
        for taint in _NODE_TAINTS
        if not any(_tolerates(toleration, taint) for toleration in given)
    ]
    return {**template, "spec": {**template["spec"], "tolerations": [*given, *ours]}}


def _tolerates(toleration: Mapping[str, Any], taint: str) -> bool:
    """As the DefaultTolerationSeconds admission sees it: no key means any, no effect means any."""
    return toleration.get("key") in (None, "", taint) and toleration.get("effect") in (None, "", "NoExecute")


def _fitted(container: dict[str, Any], model: Model, limits: Limits) -> dict[str, Any]:
    """With requests of ours that neither the user's limits nor the namespace's refuse."""
    written = (model.template.get("spec") or {}).get("containers") or []
    own: Mapping[str, Any] = next((one for one in written if one["name"] == names.CONTAINER), {})
    asked = ((own.get("resources") or {}).get("requests")) or {}
    ours = [name for name in ("cpu", "memory") if name not in asked]
    resources = fitted(container.get("resources") or {}, ours, limits)
    return {**container, "resources": resources} if resources else container


def _threaded(container: dict[str, Any], model: Model) -> dict[str, Any]:
    """Each rank on CPUs computes with as many threads as it asks for CPUs: a pod sees all cores of its node, and ranks
    that take them all wait for each other's threads. One on a GPU needs few."""
    environment = container.get("env") or []
    asked = quantity(((container.get("resources") or {}).get("requests") or {}).get("cpu", ""))
    if asked is None or any(entry.get("name") == THREADS for entry in environment):
        return container
    threads = THREADS_PER_GPU_RANK if model.on_gpus else max(1, math.ceil(asked / model.ranks_per_pod))
    return {**container, "env": [*environment, {"name": THREADS, "value": str(threads)}]}


def _away_from(nodes: Collection[str], affinity: Mapping[str, Any]) -> dict[str, Any]:
    """The affinity with these nodes ruled out. A pod may go where any term matches, so each term needs it."""
    fields = [{"key": "metadata.name", "operator": "NotIn", "values": [node]} for node in sorted(nodes)]
    by_node = affinity.get("nodeAffinity") or {}
    required = by_node.get(_REQUIRED) or {}
    terms = [
        {**term, "matchFields": [*(term.get("matchFields") or []), *fields]}
        for term in required.get("nodeSelectorTerms") or [{}]
    ]
    return {**affinity, "nodeAffinity": {**by_node, _REQUIRED: {**required, "nodeSelectorTerms": terms}}}


def model_labels(model: Model) -> dict[str, str]:
    """Of every object of the model."""
    return {**names.APP_LABELS, names.INSTANCE_LABEL: model.name, names.MODEL_LABEL: model.name}


def group_labels(model: Model, group: int) -> dict[str, str]:
    return {**model_labels(model), names.GROUP_LABEL: str(group)}
