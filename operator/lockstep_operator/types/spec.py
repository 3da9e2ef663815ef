"""The custom resource as the operator understands it: parsed once, with the defaults that the CRD names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from lockstep_operator.settings import ModelSource
from lockstep_operator.types import template_check
from lockstep_operator.types.intervention import Intervention, parse_intervention
from lockstep_operator.types.model_source import Cache, EmptyDir, Source, parse_cache, parse_source
from lockstep_operator.types.names import (
    NEW_TOKENS_ANNOTATION,
    QUEUE_LABEL,
    QUEUE_PRIORITY_LABEL,
    RESOLVE_ANNOTATION,
    RESTARTED_ANNOTATION,
    ROLLBACK_ANNOTATION,
    UPDATE_ANNOTATION,
    ModelKey,
)
from lockstep_operator.types.spec_blocks import (
    Disruption,
    EngineLimits,
    GroupMetadata,
    Network,
    Ports,
    RecoverySpec,
    Rollout,
    Vision,
    Watchdog,
    parse_disruption,
    parse_engine,
    parse_group_metadata,
    parse_network,
    parse_ports,
    parse_recovery,
    parse_rollout,
    parse_vision,
    parse_watchdog,
)
from lockstep_operator.types.spec_values import SecretKey, SpecError, seconds, secret_key
from lockstep_operator.types.timestamps import format_rfc3339, parse_rfc3339

DEFAULT_PROGRESS: Final = 600.0
DEFAULT_HISTORY: Final = 3
# What doesn't shape pods. What is not named here moves the runtime when it changes: a test holds it against the pods.
_SHAPELESS: Final = frozenset(
    {"replicas", "rollout", "progressDeadline", "runtime", "revisionHistoryLimit", "groupMetadata", "disruption"}
)
_SHAPELESS_PARTS: Final = {
    "recovery": frozenset({"mode", "budget", "backoff"}),
    "network": frozenset({"policy", "from"}),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A TensorParallelModel."""

    key: ModelKey
    uid: str
    generation: int
    source: Source
    served_name: str
    tensor_parallel_size: int
    cache: Cache = field(default_factory=EmptyDir)
    ranks_per_pod: int = 1
    replicas: int = 1
    dtype: str = "auto"
    backend: str = "auto"
    accelerator: str | None = None
    engine: EngineLimits = field(default_factory=EngineLimits)
    vision: Vision = field(default_factory=Vision)
    watchdog: Watchdog = field(default_factory=Watchdog)
    recovery: RecoverySpec = field(default_factory=RecoverySpec)
    api_key: SecretKey | None = None
    network: Network = field(default_factory=Network)
    ports: Ports = field(default_factory=Ports)
    disruption: Disruption = field(default_factory=Disruption)
    intervention: Intervention = field(default_factory=Intervention)
    group_metadata: GroupMetadata = field(default_factory=GroupMetadata)
    rollout: Rollout = field(default_factory=Rollout)
    template: Mapping[str, Any] = field(default_factory=dict)
    flaw: str = ""  # what is wrong with the pods' template, as a sentence: existing pods stay, and are repaired
    progress_deadline: float = DEFAULT_PROGRESS  # seconds
    shape: str = ""  # hash of what the spec says of its pods
    auto_update: bool = False  # of the runtime
    history_limit: int = DEFAULT_HISTORY  # renderings that nothing uses any more
    update_requested: float | None = None  # unix seconds of the last request to update the runtime
    rollback_to: str = ""  # revision
    restarted_at: float | None = None  # unix seconds of the last request to restart the groups one by one
    new_tokens_at: float | None = None  # the same, of pods with new tokens

    @property
    def name(self) -> str:
        return self.key.name

    @property
    def namespace(self) -> str:
        return self.key.namespace

    @property
    def tokens_id(self) -> str:
        """Which tokens its pods are to have: others after each request, and for each model of the same name."""
        asked = "" if self.new_tokens_at is None else format_rfc3339(self.new_tokens_at)
        return hashlib.sha256(f"{self.uid}/{asked}".encode()).hexdigest()[:10]

    @property
    def pods_per_group(self) -> int:
        return self.tensor_parallel_size // self.ranks_per_pod

    @property
    def on_gpus(self) -> bool:
        """Whether ranks compute on GPUs: an accelerator's, or what the pods claim (dynamic resource allocation)."""
        return self.accelerator is not None or self.backend == "nccl"

    @property
    def ranks(self) -> int:
        """Of all groups together."""
        return self.tensor_parallel_size * self.replicas


def deprecations(model: Model) -> list[str]:
    """A sentence for each value that a later version may refuse."""
    if model.backend == "gloo":
        return ["spec.backend: gloo is deprecated: it is called cpu now. Set cpu, or leave the field out."]
    return []


def parse(resource: Mapping[str, Any], sources: Sequence[ModelSource] = ()) -> Model:
    """Read a TensorParallelModel as the API server gives it. `sources` are the operator's. Raises SpecError."""
    metadata, spec = resource["metadata"], resource.get("spec") or {}
    model = spec.get("model") or {}
    size, per_pod = spec.get("tensorParallelSize", 0), spec.get("ranksPerPod", 1)
    if size < 1 or per_pod < 1 or size % per_pod:
        raise SpecError(f"ranksPerPod ({per_pod}) must divide tensorParallelSize ({size}), and both must be at least 1")
    annotations = metadata.get("annotations") or {}
    restarted_at, flaw = _requested(annotations, RESTARTED_ANNOTATION)
    resolve_at, other_flaw = _requested(annotations, RESOLVE_ANNOTATION)
    update_requested, third_flaw = _requested(annotations, UPDATE_ANNOTATION)
    new_tokens_at, fourth_flaw = _requested(annotations, NEW_TOKENS_ANNOTATION)
    source, default_cache, unknown = parse_source(model, sources, resolve_at)
    template = spec.get("template") or {}
    accelerator, backend = (spec.get("accelerator") or {}).get("resourceName"), spec.get("backend", "auto")
    template_flaw = template_check.flaw(template)
    if not template_flaw and backend == "nccl" and accelerator is None:
        template_flaw = template_check.claim_flaw(template)
    intervention = parse_intervention(annotations)
    return Model(
        key=ModelKey(metadata["namespace"], metadata["name"]),
        uid=metadata["uid"],
        generation=metadata.get("generation", 1),
        source=source,
        served_name=model.get("servedName", metadata["name"]),
        cache=parse_cache(model.get("cache") or default_cache),
        tensor_parallel_size=size,
        ranks_per_pod=per_pod,
        replicas=spec.get("replicas", 1),
        dtype=spec.get("dtype", "auto"),
        backend=backend,
        accelerator=accelerator,
        engine=parse_engine(spec.get("engine") or {}),
        vision=parse_vision(spec.get("vision") or {}),
        watchdog=parse_watchdog(spec.get("watchdog") or {}),
        recovery=parse_recovery(spec.get("recovery") or {}),
        api_key=secret_key(spec.get("apiKeySecretRef")),
        network=parse_network(spec.get("network") or {}),
        ports=parse_ports(spec.get("ports") or {}),
        disruption=parse_disruption(spec.get("disruption") or {}),
        intervention=intervention,
        group_metadata=parse_group_metadata(spec.get("groupMetadata") or {}, _inherited(metadata.get("labels") or {})),
        rollout=parse_rollout(spec.get("rollout") or {}, spec.get("replicas", 1)),
        template=template,
        flaw=template_flaw or flaw or other_flaw or third_flaw or fourth_flaw or unknown or intervention.flaw,
        progress_deadline=seconds(spec, "progressDeadline") or DEFAULT_PROGRESS,
        shape=shape(spec),
        auto_update=(spec.get("runtime") or {}).get("update") == "Auto",
        history_limit=spec.get("revisionHistoryLimit", DEFAULT_HISTORY),
        update_requested=update_requested,
        rollback_to=annotations.get(ROLLBACK_ANNOTATION, ""),
        restarted_at=restarted_at,
        new_tokens_at=new_tokens_at,
    )


def _inherited(labels: Mapping[str, str]) -> dict[str, str]:
    return {name: labels[name] for name in (QUEUE_LABEL, QUEUE_PRIORITY_LABEL) if labels.get(name)}


def shape(spec: Mapping[str, Any]) -> str:
    """Hash of what a spec says of its pods. It is of the document, not of what this version makes of it: another
    version finds the same."""
    said = {name: value for name, value in spec.items() if name not in _SHAPELESS}
    for name, shapeless in _SHAPELESS_PARTS.items():
        if name in said:
            said[name] = {part: value for part, value in said[name].items() if part not in shapeless}
    text = json.dumps({name: value for name, value in said.items() if value != {}}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _requested(annotations: Mapping[str, str], name: str) -> tuple[float | None, str]:
    """When something was requested, or what is wrong with the request."""
    requested = annotations.get(name)
    if not requested:
        return None, ""
    try:
        return parse_rfc3339(requested), ""
    except ValueError:
        return (
            None,
            f"annotation {name} must be a time such as 2030-01-31T12:00:00Z, and is {requested[:80]!r}",
        )
