"""What kopf's watches have brought, by model, so that a pass at rest asks the API server nothing.

An index may lag behind, and kopf keeps objects that were deleted while a watch was down for so long that it had to list
anew. So nothing is changed or deleted on the word of an index: a pass that would reads everything live first. What is
made where the index has nothing, and a status of what is seen, need no such look: the API server refuses the one where
there is something, and the other where somebody has written since.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final

import msgspec

from lockstep_operator.cluster.client import RESOURCES
from lockstep_operator.cluster.newer import version_of
from lockstep_operator.types.names import KIND, ModelKey, label_of
from lockstep_operator.types.observed import Object, ObjectRef

LABELLED_KINDS: Final = ("StatefulSet", "ControllerRevision", "Service", "ServiceAccount", "NetworkPolicy")
BUDGET: Final = "PodDisruptionBudget"  # of others, too: two that select one pod are one too many
CHILD_KINDS: Final = (*LABELLED_KINDS, BUDGET)
INDEXED: Final = (KIND, "Pod", *CHILD_KINDS)

NOBODYS: Final = ""  # the model of an object that has no label of one
# Taints of autoscalers before they drain a node: Karpenter's and the Cluster Autoscaler's.
LEAVING: Final = ("karpenter.sh/disrupted", "ToBeDeletedByClusterAutoscaler")

Index = Mapping[ModelKey, Collection[bytes]]  # kopf.Index is one


def entry(kind: str, body: Mapping[str, Any]) -> dict[ModelKey, bytes]:
    """What the index of this kind holds of an object: by its model, without the record of who set which field.

    As JSON, which is read anew in each pass: objects would take six times the memory, for all models at all times.
    """
    document = bare(kind, body)
    return {key_of(kind, document["metadata"]): msgspec.json.encode(document)}


def bare(kind: str, body: Mapping[str, Any]) -> Object:
    """The object without the record of who set which field."""
    metadata = {name: value for name, value in body["metadata"].items() if name != "managedFields"}
    return {**body, "apiVersion": RESOURCES[kind][0], "kind": kind, "metadata": metadata}


def key_of(kind: str, metadata: Mapping[str, Any]) -> ModelKey:
    """The model of an object that is watched; of NOBODYS name if it has no label of one."""
    model = metadata["name"] if kind == KIND else (metadata.get("labels") or {}).get(label_of(kind), NOBODYS)
    return ModelKey(metadata["namespace"], model)


class _Metadata(msgspec.Struct, rename="camel"):
    uid: str
    resource_version: str


class _Versioned(msgspec.Struct):
    metadata: _Metadata


class _Place(msgspec.Struct, frozen=True, rename="camel"):
    node_name: str = ""


class _Placed(msgspec.Struct):
    spec: _Place = _Place()


def leaves(node: Mapping[str, Any]) -> bool:
    """Whether nothing new is put on the node because it is to be emptied: it is cordoned, or its autoscaler says so."""
    spec = node.get("spec") or {}
    return bool(spec.get("unschedulable")) or any(taint.get("key") in LEAVING for taint in spec.get("taints") or [])


class Indexes:
    """Empty until `bind`, which kopf's start calls with its indexes by kind."""

    def __init__(self) -> None:
        self._of: Mapping[str, Index] = {}
        self._leaving: set[str] = set()

    def bind(self, indexes: Mapping[str, Index]) -> None:
        self._of = indexes

    @property
    def leaving_nodes(self) -> frozenset[str]:
        """Nodes that are being drained, or soon will be."""
        return frozenset(self._leaving)

    def heard_of_node(self, name: str, *, leaves: bool) -> bool:
        """Whether that is news."""
        if leaves is (name in self._leaving):
            return False
        (self._leaving.add if leaves else self._leaving.discard)(name)
        return True

    def on_node(self, name: str) -> set[ModelKey]:
        """The models that have pods there."""
        pods = self._of.get("Pod", {})
        return {key for key in [*pods] if any(_node_of(pod) == name for pod in pods[key])}

    def models(self) -> list[ModelKey]:
        return [*self._of.get(KIND, {})]

    def all_versions(self, kind: str) -> dict[ModelKey, frozenset[tuple[str, str]]]:
        """UIDs and resource versions of all objects of a kind, by their model."""
        index: Index = self._of.get(kind, {})
        return {key: frozenset(map(_uid_and_version, index[key])) for key in [*index]}

    def model(self, key: ModelKey) -> Object | None:
        """The custom resource; the newest where one of the same name was made after it had been deleted."""
        return max(self._objects(KIND, key), key=version_of, default=None)

    def children(self, key: ModelKey, gone: Mapping[str, str] = MappingProxyType({})) -> dict[ObjectRef, Object]:
        """By kind and name, with the budgets of others in the namespace. `gone` are UIDs and the versions in which they
        are not to be believed in."""
        others = self._by_name(BUDGET, ModelKey(key.namespace, NOBODYS), gone)
        own = {(kind, name): child for kind in CHILD_KINDS for name, child in self._by_name(kind, key, gone).items()}
        return {(BUDGET, name): child for name, child in others.items()} | own

    def pods(self, key: ModelKey, gone: Mapping[str, str] = MappingProxyType({})) -> list[Object]:
        """By name, without what is `gone`."""
        found = self._by_name("Pod", key, gone)
        return [found[name] for name in sorted(found)]

    def versions(self, key: ModelKey) -> dict[str, str]:
        """UID → resource version of the model and all that belongs to it, and of budgets that may."""
        others = ModelKey(key.namespace, NOBODYS)
        found = [item["metadata"] for kind in INDEXED for item in self._objects(kind, key)]
        found += [item["metadata"] for item in self._objects(BUDGET, others)]
        return {metadata["uid"]: metadata["resourceVersion"] for metadata in found}

    def _by_name(self, kind: str, key: ModelKey, gone: Mapping[str, str]) -> dict[str, Object]:
        """The newest of each name: one that was made again may be there beside the one before it."""
        found = [
            item
            for item in self._objects(kind, key)
            if gone.get(item["metadata"]["uid"]) != item["metadata"]["resourceVersion"]
        ]
        return {item["metadata"]["name"]: item for item in sorted(found, key=version_of)}

    def _objects(self, kind: str, key: ModelKey) -> Iterator[Object]:
        index: Index = self._of.get(kind, {})
        yield from map(msgspec.json.decode, index.get(key, ()))


def _uid_and_version(document: bytes) -> tuple[str, str]:
    metadata = msgspec.json.decode(document, type=_Versioned).metadata
    return metadata.uid, metadata.resource_version


def _node_of(pod: bytes) -> str:
    return msgspec.json.decode(pod, type=_Placed).spec.node_name
