"""The objects of a model (pure builders, one per kind). Fields that they don't set are left to others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

from lockstep_operator.decisions import group_metadata, mesh
from lockstep_operator.decisions.pod_template import Rendering, group_labels, model_labels, placed
from lockstep_operator.settings import Settings
from lockstep_operator.types import names
from lockstep_operator.types.limits import Limits
from lockstep_operator.types.spec import Model
from lockstep_operator.types.timestamps import format_rfc3339
from lockstep_runtime.protocol.status import API_PORT

Manifest = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A rendering that a ControllerRevision keeps. `shape`: hash of what the spec said of its pods; `requested`: unix
    seconds of the last request to update the runtime that was followed."""

    revision: str
    number: int  # the newest of a model has the highest
    shape: str
    requested: float | None
    rendering: Rendering


IP_FAMILIES: Final = "PreferDualStack"  # both where the cluster has both, else its only one


def revision(model: Model, rendering: Rendering) -> str:
    """Hash of all that shapes a pod, its queue included: pods of another revision must be replaced."""
    queue = group_metadata.admission(model)
    parts: Manifest = {"rendering": rendering}
    return _hash({**parts, "queue": queue} if queue else parts)


def group_token(model: Model, token: str) -> Manifest:
    """Pods have it for as long as they live, so it never changes."""
    return {**_token(model, names.group_token_name(model.name, model.tokens_id), token), "immutable": True}


def operator_token(model: Model, token: str) -> Manifest:
    """Replaced where it is another: the kubelet brings it to the pods that there are."""
    return _token(model, names.operator_token_name(model.name, model.tokens_id), token)


def _token(model: Model, name: str, token: str) -> Manifest:
    return {**_object("v1", "Secret", name, model), "type": "Opaque", "stringData": {names.TOKEN_KEY: token}}


def service_account(model: Model) -> Manifest:
    """Rank pods never speak to the API server: no credentials are mounted."""
    return _sealed(
        {
            **_object("v1", "ServiceAccount", names.account_name(model.name), model),
            "automountServiceAccountToken": False,
        }
    )


def serving_service(model: Model) -> Manifest:
    """Leads to the first pod of every Ready group, whatever its revision."""
    spec = {
        "type": "ClusterIP",
        "ipFamilyPolicy": IP_FAMILIES,
        "selector": {names.MODEL_LABEL: model.name, names.POD_INDEX_LABEL: "0"},
        "ports": [{"name": "http", "port": API_PORT, "targetPort": "api", "protocol": "TCP", "appProtocol": "http"}],
    }
    return _sealed({**_object("v1", "Service", model.name, model), "spec": spec})


def headless_service(model: Model, group: int) -> Manifest:
    """Gives the group's pods names before they are Ready: they need each other to become it."""
    spec = {
        "clusterIP": "None",
        "ipFamilyPolicy": IP_FAMILIES,
        "publishNotReadyAddresses": True,
        "selector": {names.MODEL_LABEL: model.name, names.GROUP_LABEL: str(group)},
        "ports": [
            {"name": "bus", "port": model.ports.bus, "targetPort": "bus", "protocol": "TCP", "appProtocol": "tcp"},
            {
                "name": "status",
                "port": model.ports.status,
                "targetPort": "status",
                "protocol": "TCP",
                "appProtocol": "http",
            },
        ],
    }
    return _sealed({**_object("v1", "Service", names.group_name(model.name, group), model, group), "spec": spec})


def has_network_policy(model: Model, settings: Settings) -> bool:
    return (model.network.policy or settings.network_policy) == "Managed"


def network_policy(model: Model, group: int, settings: Settings) -> Manifest:
    """Named peers may use the API, the operator may read the status, only the group's own pods reach the other ports.

    The kubelet's probes come from the pod's own node, which no policy blocks.
    """
    members = {"matchLabels": {names.MODEL_LABEL: model.name, names.GROUP_LABEL: str(group)}}
    clients, operator = _clients(model, settings), _operator(settings)
    rules: list[Mapping[str, Any]] = [{"from": [{"podSelector": members}]}]
    if clients:  # an empty list would let in everybody
        rules.append({"from": clients, "ports": [{"port": model.ports.api, "protocol": "TCP"}]})
    if operator:
        rules.append({"from": operator, "ports": [{"port": model.ports.status, "protocol": "TCP"}]})
    rules += mesh.rules(model, [*clients, *operator])
    policy = _object("networking.k8s.io/v1", "NetworkPolicy", names.group_name(model.name, group), model, group)
    return _sealed({**policy, "spec": {"podSelector": members, "policyTypes": ["Ingress"], "ingress": rules}})


def _clients(model: Model, settings: Settings) -> list[Mapping[str, Any]]:
    peers = model.network.peers
    own_namespace: Mapping[str, Any] = {"podSelector": {}}
    return [*([own_namespace, *settings.api_from] if peers is None else peers), *settings.scrape_from]


def disruption_budget(model: Model, least: int) -> Manifest:
    """Over the rank pods of all groups: one that is Ready may be evicted where more than these are. Those that aren't
    may always go: the rest of a group whose drain has begun.

    In `minAvailable`, since `maxUnavailable` counts what pods there are to be by those that there are: while no pod of
    a group exists, it knows nothing of the group.
    """
    members = {
        "matchLabels": {names.MODEL_LABEL: model.name},
        "matchExpressions": [{"key": names.GROUP_LABEL, "operator": "Exists"}],
    }
    spec = {"minAvailable": least, "unhealthyPodEvictionPolicy": "AlwaysAllow", "selector": members}
    return _sealed({**_object("policy/v1", "PodDisruptionBudget", model.name, model), "spec": spec})


def _operator(settings: Settings) -> list[Mapping[str, Any]]:
    """Empty, when nobody has said where it runs."""
    if not settings.operator_namespace:
        return []
    namespace = {"matchLabels": {"kubernetes.io/metadata.name": settings.operator_namespace}}
    pods = {"matchLabels": dict(names.OPERATOR_POD_LABELS)}
    return [{"namespaceSelector": namespace, "podSelector": pods}]


def stateful_set(
    model: Model,
    group: int,
    revision: str,
    rendering: Rendering,
    avoid: Collection[str] = (),
    limits: Limits = Limits(),  # noqa: B008 - frozen
    commit: str = "",
) -> Manifest:
    """One group, kept away from the nodes in `avoid`. OnDelete: the operator decides when its pods are replaced.

    See `placed` for what else the pods depend on.
    """
    name = names.group_name(model.name, group)
    spec: dict[str, Any] = {
        "serviceName": name,
        "replicas": rendering["pods"],
        "podManagementPolicy": "Parallel",
        "updateStrategy": {"type": "OnDelete"},
        "minReadySeconds": 0,
        "ordinals": {"start": 0},
        "persistentVolumeClaimRetentionPolicy": {"whenDeleted": "Retain", "whenScaled": "Retain"},
        "selector": {"matchLabels": {names.MODEL_LABEL: model.name, names.GROUP_LABEL: str(group)}},
        "template": placed(rendering, group, revision, avoid, limits, commit),
    }
    workload = _object("apps/v1", "StatefulSet", name, model, group)
    own = {**workload["metadata"]["labels"], names.REVISION_LABEL: revision}
    workload["metadata"]["labels"] = {**group_metadata.workload_labels(model, group), **own}
    room = group_metadata.room(model, spec["template"])
    admitted = {names.ADMITTED_ANNOTATION: _hash(room)} if room else {}
    workload["metadata"]["annotations"] = {**group_metadata.workload_annotations(model, group), **admitted}
    return _sealed({**workload, "spec": spec})


def template(model: Model, kept: Kept) -> Manifest:
    """What pods of a revision are made from, kept for as long as it may be needed."""
    base = _object("apps/v1", "ControllerRevision", names.template_name(model.name, kept.revision), model)
    labels = {**base["metadata"]["labels"], names.TEMPLATE_LABEL: model.name, names.REVISION_LABEL: kept.revision}
    asked = {} if kept.requested is None else {names.UPDATE_ANNOTATION: format_rfc3339(kept.requested)}
    metadata = {**base["metadata"], "labels": labels, "annotations": {names.SHAPE_ANNOTATION: kept.shape, **asked}}
    return {**base, "metadata": metadata, "data": kept.rendering, "revision": kept.number}


def shared(model: Model) -> list[Manifest]:
    """What all groups of a model have in common, apart from the tokens."""
    return [service_account(model), serving_service(model)]


def of_group(model: Model, group: int, settings: Settings) -> list[Manifest]:
    """What a group needs besides its StatefulSet, and before it."""
    policies = [network_policy(model, group, settings)] if has_network_policy(model, settings) else []
    return [headless_service(model, group), *policies]


def _object(api_version: str, kind: str, name: str, model: Model, group: int | None = None) -> Manifest:
    labels = model_labels(model) if group is None else group_labels(model, group)
    owner = {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "name": model.name,
        "uid": model.uid,
        "controller": True,
        "blockOwnerDeletion": False,
    }
    metadata = {"name": name, "namespace": model.namespace, "labels": labels, "ownerReferences": [owner]}
    return {"apiVersion": api_version, "kind": kind, "metadata": metadata}


def _sealed(manifest: Manifest) -> Manifest:
    """With the hash of itself: a field that is no longer wanted shows, though live objects have it still."""
    annotations = {**manifest["metadata"].get("annotations", {}), names.APPLIED_ANNOTATION: _hash(manifest)}
    return {**manifest, "metadata": {**manifest["metadata"], "annotations": annotations}}


def _hash(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:10]
