"""The pods of a group (pure): ours, with the user's template laid over them. All are of one template; a pod's index is
its identity."""

from __future__ import annotations

import json
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


# What differs between groups, in a template that is kept for all of them.
GROUP: Final = "<lockstep.dev/group>"
REVISION: Final = "<lockstep.dev/revision>"
TOKENS: Final = "<lockstep.dev/tokens>"

Rendering = Mapping[str, Any]  # JSON, as a ControllerRevision keeps it


def rendered(model: Model, settings: Settings) -> dict[str, Any]:
    """What the pods of a model are made from: ours, with the user's template laid over it and then our labels, which
    selectors rely on; and what must be known to place them. Where they run is no part of it (see `placed`).

    The model's template must have no flaw (see `template_check`).
    """
    ours: dict[str, Any] = {"metadata": {"labels": {}}, "spec": pod_spec(model, GROUP, REVISION, TOKENS, settings)}
    merged = _with_tolerations(merge(ours, model.template))
    own = {**names.ENGINE_LABELS, **model_labels(model), names.GROUP_LABEL: GROUP, names.REVISION_LABEL: REVISION}
    merged["metadata"] = {
        **merged["metadata"],
        "labels": {**merged["metadata"].get("labels", {}), **own},
        "annotations": {**mesh.pod_annotations(model), **(merged["metadata"].get("annotations") or {})},
    }
    made = {
        "pods": model.pods_per_group,
        "ranksPerPod": model.ranks_per_pod,
        "guessed": _guessed(model),
        **({"threads": THREADS_PER_GPU_RANK} if model.on_gpus else {}),
        "tokens": model.tokens_id,
        "takesCommit": isinstance(model.source, HuggingFace) and _arguments(merged) == _arguments(ours),
        "template": merged,
    }
    return with_requests(json.loads(json.dumps(made, default=str)), model)


def with_requests(rendering: Rendering, model: Model) -> dict[str, Any]:
    """With the requests that the pods follow: they are replaced when one is new."""
    resolve_at = model.source.resolve_at if isinstance(model.source, HuggingFace) else None
    times = {
        names.RESTARTED_ANNOTATION: model.restarted_at,
        names.RESOLVE_ANNOTATION: resolve_at,
        names.NEW_TOKENS_ANNOTATION: model.new_tokens_at,
    }
    template = rendering["template"]
    given = template["metadata"].get("annotations") or {}
    requests = {name: format_rfc3339(time) for name, time in times.items() if time is not None}
    annotations = {name: value for name, value in given.items() if name not in times} | requests
    metadata = {name: value for name, value in template["metadata"].items() if name != "annotations"}
    if annotations:
        metadata["annotations"] = annotations
    tokens = {"tokens": model.tokens_id} if has_tokens(rendering) else {}
    return {**rendering, **tokens, "template": {**template, "metadata": metadata}}


def has_tokens(rendering: Rendering) -> bool:
    """Whether this operator can speak to its pods: those of older versions have tokens that nobody may read."""
    return "tokens" in rendering


def placed(
    rendering: Rendering,
    group: int,
    revision: str,
    avoid: Collection[str] = (),
    limits: Limits = Limits(),  # noqa: B008 - frozen
    commit: str = "",
) -> dict[str, Any]:
    """The PodTemplateSpec of a group. `avoid` names nodes that the pods are kept away from, `limits` are the
    namespace's, `commit` is what the hub's model is pinned to: running pods are left alone when they change."""
    parts = {GROUP: str(group), REVISION: revision, TOKENS: rendering.get("tokens", "")}
    template = _filled(rendering["template"], parts)
    told = [f"--commit={commit}"] if commit and rendering["takesCommit"] else []
    spec = template["spec"]
    containers = [
        _threaded(_fitted(_told(one, told), rendering, limits), rendering) if one["name"] == names.CONTAINER else one
        for one in spec["containers"]
    ]
    affinity = {"affinity": _away_from(avoid, spec.get("affinity") or {})} if avoid else {}
    return {**template, "spec": {**spec, "containers": containers, **affinity}}


def pod_template(
    model: Model,
    group: int,
    revision: str,
    settings: Settings,
    avoid: Collection[str] = (),
    limits: Limits = Limits(),  # noqa: B008 - frozen
    commit: str = "",
) -> dict[str, Any]:
    """As it is when it is rendered now."""
    return placed(rendered(model, settings), group, revision, avoid, limits, commit)


def _filled(value: Any, parts: Mapping[str, str]) -> Any:
    if isinstance(value, Mapping):
        return {name: _filled(item, parts) for name, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, parts) for item in value]
    if isinstance(value, str):
        for placeholder, text in parts.items():
            value = value.replace(placeholder, text)
    return value


def _own_container(template: Mapping[str, Any]) -> Mapping[str, Any]:
    containers = (template.get("spec") or {}).get("containers") or []
    return next((one for one in containers if one["name"] == names.CONTAINER), {})


def _arguments(template: Mapping[str, Any]) -> object:
    container = _own_container(template)
    return container.get("command"), container.get("args")


def _guessed(model: Model) -> list[str]:
    """Requests of ours: the user's template has none."""
    asked = (_own_container(model.template).get("resources") or {}).get("requests") or {}
    return [name for name in ("cpu", "memory") if name not in asked]


def _told(container: dict[str, Any], arguments: list[str]) -> dict[str, Any]:
    return {**container, "args": [*container["args"], *arguments]} if arguments else container


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


def _fitted(container: dict[str, Any], rendering: Rendering, limits: Limits) -> dict[str, Any]:
    """With requests of ours that neither the user's limits nor the namespace's refuse."""
    resources = fitted(container.get("resources") or {}, rendering["guessed"], limits)
    return {**container, "resources": resources} if resources else container


def _threaded(container: dict[str, Any], rendering: Rendering) -> dict[str, Any]:
    """Each rank on CPUs computes with as many threads as it asks for CPUs: a pod sees all cores of its node, and ranks
    that take them all wait for each other's threads. One on a GPU needs few."""
    environment = container.get("env") or []
    asked = quantity(((container.get("resources") or {}).get("requests") or {}).get("cpu", ""))
    if asked is None or any(entry.get("name") == THREADS for entry in environment):
        return container
    threads = rendering.get("threads") or max(1, math.ceil(asked / rendering["ranksPerPod"]))
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
