"""What the API server refuses of a TensorParallelModel, in words that say what to change; and what it takes.

The table is held against the CRD: a rule without an accepted and a refused example fails.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import pytest
import yaml
from tests.support import kubectl
from tests.support.chart import CRD_SOURCE
from tests.support.cluster_model import Model, Object, manifest

pytestmark = pytest.mark.usefixtures("at_rest")  # manifests are only judged, so the served model is left alone

HOST: Final[Object] = {"hostPath": {"path": "/models/a"}}
HUB: Final[Object] = {"huggingFace": {"repo": "Qwen/Qwen3-8B"}}
CLAIM: Final[Object] = {"persistentVolumeClaim": {"claimName": "models"}}
IMAGE: Final[Object] = {"image": {"reference": "registry.example/qwen:1", "pullPolicy": "IfNotPresent"}}


def spec(**fields: Any) -> Object:
    return {"model": HOST, "tensorParallelSize": 2} | fields


def claim(path: str) -> Object:
    return spec(model={"persistentVolumeClaim": {"claimName": "models", "path": path}})


def cache(**kinds: Any) -> Object:
    return spec(model=HUB | {"cache": kinds})


def watchdog(**fields: Any) -> Object:
    return spec(watchdog=fields)


def rollout(**fields: Any) -> Object:
    return spec(rollout=fields)


def budget(**fields: Any) -> Object:
    return spec(recovery={"budget": fields})


def backoff(**fields: Any) -> Object:
    return spec(recovery={"backoff": fields})


def network(**fields: Any) -> Object:
    return spec(network=fields)


def group_metadata(**fields: Any) -> Object:
    return spec(groupMetadata=fields)


def ports(**numbers: int) -> Object:
    return spec(ports=numbers)


CLAIMS: Final[Object] = {"spec": {"resourceClaims": [{"name": "gpus", "resourceClaimTemplateName": "gpus"}]}}
ANYBODY: Final[Object] = {"namespaceSelector": {"matchExpressions": [{"key": "team", "operator": "Exists"}]}}
GPU: Final[Object] = {"resourceName": "nvidia.com/gpu"}


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule of the schema by a part of its message, with specs on both sides of it."""

    words: str
    accepted: tuple[Object, ...]
    refused: tuple[Object, ...]


RULES: Final = (
    Rule(
        "ranksPerPod must divide tensorParallelSize",
        (spec(tensorParallelSize=4, ranksPerPod=2), spec(ranksPerPod=2), spec()),
        (spec(tensorParallelSize=4, ranksPerPod=3), spec(ranksPerPod=4)),
    ),
    Rule(
        "backend cpu computes on CPUs",
        (spec(backend="cpu"), spec(backend="gloo"), spec(accelerator=GPU), spec(accelerator=GPU, backend="auto")),
        (spec(backend="cpu", accelerator=GPU), spec(backend="gloo", accelerator=GPU)),
    ),
    Rule(
        "maxUnavailable 0 needs maxSurge of 1 or more",
        (
            rollout(maxUnavailable=0, maxSurge=1),
            rollout(maxUnavailable="0%", maxSurge="25%"),
            rollout(maxUnavailable="50%", maxSurge=0),
            rollout(maxSurge=2),
        ),
        (
            rollout(maxUnavailable=0),
            rollout(maxUnavailable="0%", maxSurge=0),
            rollout(maxUnavailable=0, maxSurge="0%"),
        ),
    ),
    Rule(
        "backend nccl needs GPUs",
        (spec(backend="nccl", accelerator=GPU), spec(backend="auto"), spec(backend="nccl", template=CLAIMS)),
        (spec(backend="nccl"), spec(backend="nccl", template={"spec": {"nodeSelector": {"gpu": "yes"}}})),
    ),
    Rule(
        "the operator's own labels can't be set",
        (group_metadata(labels={"gang": "a", "example.com/b": ""}), group_metadata(labels={})),
        (group_metadata(labels={"lockstep.dev/group": "1"}), group_metadata(labels={"app.kubernetes.io/name": "x"})),
    ),
    Rule(
        "a label's value must be at most 63 letters",
        (group_metadata(labels={"gang": "chat-$(group)", "size": "$(pods)"}), group_metadata(labels={"a": "b" * 63})),
        (group_metadata(labels={"gang": "$(name)"}), group_metadata(labels={"a": "b" * 64})),
    ),
    Rule(
        "the operator's own annotations can't be set",
        (group_metadata(annotations={"a": "any $(text)"}),),
        (group_metadata(annotations={"lockstep.dev/applied": "x"}),),
    ),
    Rule(
        "api (8000 when unset), bus (7400) and status (7401)",
        (ports(api=9000, bus=9001, status=9002), ports(bus=7500), ports(api=7400, bus=8000)),
        (ports(api=7400), ports(bus=7401), ports(api=9000, status=9000)),
    ),
    Rule(
        "set exactly one of huggingFace, persistentVolumeClaim, hostPath and image",
        (spec(model=HOST), spec(model=HUB), spec(model=CLAIM), spec(model=IMAGE)),
        (spec(model={}), spec(model=HOST | HUB), spec(model=HOST | HUB | CLAIM), spec(model=HUB | IMAGE)),
    ),
    Rule(
        "source must be the name of one of the operator's sources",
        (spec(model={"huggingFace": {"repo": "a/b", "source": "corp-2"}}),),
        (
            spec(model={"huggingFace": {"repo": "a/b", "source": "Corp"}}),
            spec(model={"huggingFace": {"repo": "a/b", "source": "https://hub"}}),
        ),
    ),
    Rule(
        "minPixels must not be more than maxPixels",
        (spec(vision={"minPixels": 7, "maxPixels": 7}), spec(vision={"minPixels": 9}), spec(vision={})),
        (spec(vision={"minPixels": 8, "maxPixels": 7}),),
    ),
    Rule(
        "path is a folder within the image",
        (spec(model={"image": {"reference": "r/m:1", "path": "a/b"}}),),
        (
            spec(model={"image": {"reference": "r/m:1", "path": "/a"}}),
            spec(model={"image": {"reference": "r/m:1", "path": "../a"}}),
        ),
    ),
    Rule(
        "cache keeps downloads of huggingFace",
        (cache(emptyDir={}),),
        (spec(model=HOST | {"cache": {"emptyDir": {}}}), spec(model=CLAIM | {"cache": {"emptyDir": {}}})),
    ),
    Rule(
        "set exactly one of persistentVolumeClaim, hostPath and emptyDir",
        (
            cache(emptyDir={"sizeLimit": "40Gi"}),
            cache(hostPath={"path": "/c"}),
            cache(persistentVolumeClaim={"claimName": "c"}),
        ),
        (cache(), cache(emptyDir={}, hostPath={"path": "/c"})),
    ),
    Rule(
        "repo must be the id of a repository",
        (spec(model={"huggingFace": {"repo": "gpt2"}}), spec(model=HUB)),
        (
            spec(model={"huggingFace": {"repo": "https://example.org/Qwen/Qwen3"}}),
            spec(model={"huggingFace": {"repo": "/models/qwen"}}),
            spec(model={"huggingFace": {"repo": "../qwen"}}),
        ),
    ),
    Rule(
        "path is a folder within the volume",
        (claim(""), claim("Qwen3-8B"), claim("a/b..c")),
        (claim("/Qwen3-8B"), claim("../other"), claim("a/../../b")),
    ),
    Rule(
        "path is a folder of the node",
        (spec(), cache(hostPath={"path": "/var/cache"})),
        (
            spec(model={"hostPath": {"path": "models"}}),
            spec(model={"hostPath": {"path": "/models/../etc"}}),
            cache(hostPath={"path": "cache"}),
            cache(hostPath={"path": "/../cache"}),
        ),
    ),
    Rule(
        "resourceName must be domain/name",
        (spec(accelerator=GPU), spec(accelerator={"resourceName": "amd.com/gpu"})),
        (spec(accelerator={"resourceName": "gpu"}), spec(accelerator={"resourceName": "cpu/"})),
    ),
    Rule(
        "stepTimeout is a fixed deadline",
        (watchdog(stepTimeout="30s"), watchdog(floor="500ms", factor=2.5), watchdog(factor=3), watchdog()),
        (watchdog(stepTimeout="30s", floor="1s"), watchdog(stepTimeout="30s", factor=3)),
    ),
    Rule(
        "floor must not be longer than 120s",
        (watchdog(floor="120s"), watchdog(floor="2m"), watchdog(floor="1m30s")),
        (watchdog(floor="121s"), watchdog(floor="1h")),
    ),
    Rule(
        "max must not be shorter than initial",
        (backoff(max="10s"), backoff(initial="20s", max="20s"), backoff(initial="20m"), backoff()),
        (backoff(max="9s"), backoff(initial="1m", max="59s")),
    ),
    Rule(
        "from is written to the NetworkPolicy",
        (network(policy="Managed", **{"from": []}), network(policy="None"), network(**{"from": [ANYBODY]})),
        (network(policy="None", **{"from": []}), network(policy="None", **{"from": [ANYBODY]})),
    ),
    Rule("a peer needs", (network(**{"from": [{"podSelector": {}}]}),), (network(**{"from": [ANYBODY, {}]}),)),
    Rule(
        "ipBlock stands alone",
        (network(**{"from": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}}]}),),
        (network(**{"from": [{"ipBlock": {"cidr": "10.0.0.0/8"}, "podSelector": {}}]}),),
    ),
    Rule(
        "progressDeadline must be a duration",
        (spec(progressDeadline="1s"), spec(progressDeadline="1h30m")),
        (spec(progressDeadline="0s"), spec(progressDeadline="999ms")),
    ),
    Rule("stepTimeout must be a duration", (watchdog(stepTimeout="1ms"),), (watchdog(stepTimeout="0s"),)),
    Rule("floor must be a duration", (watchdog(floor="0.5s"),), (watchdog(floor="0.01ms"),)),
    Rule("window must be a duration", (budget(window="1h30m"),), (budget(window="0h"),)),
    Rule("initial must be a duration", (backoff(initial="1s"),), (backoff(initial="0ms"),)),
    Rule("max must be a duration", (backoff(max="1h"),), (backoff(initial="1ms", max="0s"),)),
)
NAMES: Final = (
    ("metadata.name must have at most 40 characters", "a" * 40, "a" * 41),
    ("metadata.name becomes the name of a Service", "a-1", "1-a"),
    ("metadata.name becomes the name of a Service", "abc", "a.b"),
)

BAD_PEER: Final = {"podSelector": {"matchExpressions": [{"key": "team", "operator": "Is"}]}}

# What the schema's types and bounds refuse, with the words that name the field.
FIELDS: Final = (
    ("spec.tensorParallelSize", spec(tensorParallelSize=0)),
    ("bfloat16", spec(dtype="int8")),
    ("spec.replicas", spec(replicas=-1)),
    ("spec.engine.kvCacheMemory", spec(engine={"kvCacheMemory": "much"})),
    ("spec.vision.maxPixels", spec(vision={"maxPixels": 0})),
    ("unknown field", spec(tensorParalelSize=2)),
    ("Observe", spec(recovery={"mode": "Watch"})),
    ("spec.recovery.budget.attempts", spec(recovery={"budget": {"attempts": 0}})),
    ("spec.recovery.budget.window", spec(recovery={"budget": {"window": "an hour"}})),
    ("spec.watchdog.factor", spec(watchdog={"factor": 0.5})),
    ("spec.network.policy", spec(network={"policy": "Off"})),
    ("spec.network.from[0].ipBlock.cidr: Required", spec(network={"from": [{"ipBlock": {}}]})),
    ("spec.network.from[0].podSelector.matchExpressions[0].operator", spec(network={"from": [BAD_PEER]})),
    ("spec.model: Required", {"tensorParallelSize": 2}),
)


def messages(schema: Any) -> Iterator[str]:
    """The messages of all rules in the CRD's schema."""
    if isinstance(schema, dict):
        yield from (rule["message"] for rule in schema.get("x-kubernetes-validations", []))
        for part in schema.values():
            yield from messages(part)
    elif isinstance(schema, list):
        for part in schema:
            yield from messages(part)


def test_the_table_has_every_rule_of_the_schema() -> None:
    known = {rule.words for rule in RULES} | {words for words, _, _ in NAMES}
    untold = [
        text for text in messages(yaml.safe_load(CRD_SOURCE.read_text())) if not any(text.startswith(k) for k in known)
    ]

    assert untold == []


def test_what_is_right_is_taken(served: Model) -> None:
    specs = [accepted for rule in RULES for accepted in rule.accepted]
    right = [manifest(served.namespace, f"right-{number}", accepted) for number, accepted in enumerate(specs)]
    named = [manifest(served.namespace, name, spec()) for _, name, _ in NAMES]

    kubectl.apply_all([*right, *named], "--dry-run=server")


def test_what_is_wrong_is_refused_in_words_that_say_what_to_change(served: Model) -> None:
    specs = [(rule.words, refused) for rule in RULES for refused in rule.refused]
    wrong = [(words, manifest(served.namespace, "wrong", refused)) for words, refused in (*specs, *FIELDS)]
    wrong += [(words, manifest(served.namespace, name, spec())) for words, _, name in NAMES]

    refusals = kubectl.refusals([document for _, document in wrong])

    told = zip(wrong, refusals, strict=True)
    assert [(document, said) for (words, document), said in told if words not in said] == []


def test_what_is_applied_is_what_is_stored(served: Model) -> None:
    """But for the replicas, which the scale subresource can't do without: GitOps tools see no drift."""
    applied = served.read()["metadata"]["annotations"]["kubectl.kubernetes.io/last-applied-configuration"]

    assert yaml.safe_load(applied)["spec"] | {"replicas": 1} == served.read()["spec"]
