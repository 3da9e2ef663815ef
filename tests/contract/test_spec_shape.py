"""Which fields of the spec shape pods: a change of the others must move no runtime and restart nothing.

`spec.shape` hashes the document but for a list of fields that shape no pods; here the list is held against what is
rendered, field by field of the CRD, so that a new one can't be forgotten.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import pytest
import yaml
from tests.support.chart import CHART

from lockstep_operator.decisions.pod_template import rendered
from lockstep_operator.settings import ModelSource, Settings
from lockstep_operator.types.spec import parse, shape

SETTINGS: Final = Settings(runtime_image="runtime:1")
HUBS: Final = (ModelSource(name="huggingface"), ModelSource(name="corp", endpoint="https://hub"))
HUB: Final = {"huggingFace": {"repo": "org/name"}}
CLAIM: Final = {"persistentVolumeClaim": {"claimName": "models"}}
IMAGE: Final = {"image": {"reference": "registry/model:1"}}
NODE: Final = {"hostPath": {"path": "/models/chat"}}
# Values of each field that are no default, or two; and what else the spec must say for them to mean something.
EXAMPLES: Final[dict[str, Any]] = {
    "model.huggingFace.repo": ["org/name", "org/other"],
    "model.huggingFace.source": ["corp"],
    "model.huggingFace.revision": ["v1"],
    "model.huggingFace.tokenSecretRef.name": ["a", "b"],
    "model.huggingFace.tokenSecretRef.key": ["a", "b"],
    "model.persistentVolumeClaim.claimName": ["a", "b"],
    "model.persistentVolumeClaim.path": ["a"],
    "model.hostPath.path": ["/a", "/b"],
    "model.image.reference": ["a:1", "b:1"],
    "model.image.pullPolicy": ["Always"],
    "model.image.path": ["a"],
    "model.servedName": ["another"],
    "model.cache.persistentVolumeClaim.claimName": ["a", "b"],
    "model.cache.hostPath.path": ["/a", "/b"],
    "model.cache.emptyDir.sizeLimit": ["1Gi"],
    "tensorParallelSize": [4],
    "ranksPerPod": [2],
    "replicas": [3],
    "dtype": ["float32"],
    "backend": ["nccl"],
    "accelerator.resourceName": ["nvidia.com/gpu"],
    "engine.maxModelLen": [100],
    "engine.maxSequences": [3],
    "engine.maxBatchTokens": [64],
    "engine.kvCacheMemory": ["1Gi"],
    "engine.prefixCaching": [False],
    "engine.reasoningParser": ["None"],
    "engine.toolCallParser": ["None"],
    "vision.maxPixels": [4096],
    "vision.minPixels": [1024],
    "watchdog.stepTimeout": ["20s"],
    "watchdog.floor": ["3s"],
    "watchdog.factor": [7],
    "recovery.strategy": ["RecyclePods"],
    "recovery.mode": ["Observe"],
    "recovery.weightCache": ["Off"],
    "recovery.budget.attempts": [1],
    "recovery.budget.window": ["1h"],
    "recovery.backoff.initial": ["9s"],
    "recovery.backoff.max": ["9m"],
    "apiKeySecretRef.name": ["a", "b"],
    "apiKeySecretRef.key": ["a", "b"],
    "disruption.budget": ["None"],
    "network.policy": ["None"],
    "network.mesh": ["Istio"],
    "network.from": [[{"podSelector": {}}]],
    "ports.api": [9000],
    "ports.bus": [9001],
    "ports.status": [9002],
    "progressDeadline": ["9m"],
    "rollout.maxUnavailable": [2],
    "rollout.maxSurge": [1],
    "rollout.partition": [1],
    "runtime.update": ["Auto"],
    "revisionHistoryLimit": [7],
    "groupMetadata.labels": [{"a": "b"}],
    "groupMetadata.annotations": [{"a": "b"}],
    "template.metadata": [{"labels": {"a": "b"}}],
    "template.spec": [{"nodeSelector": {"a": "b"}}],
}
SOURCES: Final = {"huggingFace": HUB, "persistentVolumeClaim": CLAIM, "image": IMAGE, "hostPath": NODE, "cache": HUB}


def fields(schema: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[str]:
    """Leaves of the schema; what users write in Kubernetes' own words is one."""
    properties = {} if path and path[0] == "template" and len(path) > 1 else schema.get("properties") or {}
    if not properties:
        yield ".".join(path)
    for name, inner in properties.items():
        yield from fields(inner, (*path, name))


def of_crd() -> list[str]:
    crd = yaml.safe_load((CHART / "files" / "crd.yaml").read_text())
    schema = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return sorted(fields(schema["properties"]["spec"]))


def put(spec: Mapping[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    name, *rest = path
    return {**spec, name: put(spec.get(name) or {}, rest, value) if rest else value}


def specs(field: str) -> Iterator[dict[str, Any]]:
    """Two that differ in this field."""
    path = field.split(".")
    model = SOURCES.get(path[1], NODE) if path[0] == "model" else NODE
    base: dict[str, Any] = {"model": model, "tensorParallelSize": 2, "replicas": 2}
    if path[-2:-1] and path[-2].endswith("SecretRef"):
        base = put(base, path[:-1], {"name": "tokens", "key": "token"})
    for value in EXAMPLES[field]:
        yield put(base, path, value)
    if len(EXAMPLES[field]) == 1:
        yield base


def test_every_field_of_the_spec_is_tried() -> None:
    missing = [field for field in of_crd() if field not in EXAMPLES]
    assert missing == [], (
        f"{', '.join(f'spec.{field}' for field in missing)}: give EXAMPLES a value of it, so that the next test tells "
        "whether it belongs into _SHAPELESS of types/spec.py (it shapes no pods) or not"
    )
    assert sorted(EXAMPLES) == of_crd(), "and what is no field any more needs no value"


@pytest.mark.parametrize("field", of_crd())
def test_what_shapes_pods_is_in_the_shape_and_nothing_else(field: str) -> None:
    one, other = specs(field)
    metadata = {"namespace": "team", "name": "chat", "uid": "1"}
    pods = [rendered(parse({"metadata": metadata, "spec": spec}, HUBS), SETTINGS) for spec in (one, other)]
    differ = pods[0] != pods[1]
    assert (shape(one) != shape(other)) == differ, (
        f"spec.{field} shapes pods, yet types/spec.py lists it in _SHAPELESS: a change of it would reach no pod"
        if differ
        else f"spec.{field} shapes no pods: list it in _SHAPELESS or _SHAPELESS_PARTS of types/spec.py, or a change of "
        "it takes a newer runtime along and restarts the groups"
    )
