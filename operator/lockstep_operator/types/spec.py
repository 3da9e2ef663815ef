"""The custom resource as the operator understands it: parsed once, with the defaults that the CRD names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from lockstep_operator.settings import HUGGING_FACE, ModelSource
from lockstep_operator.types import template_check
from lockstep_operator.types.durations import duration
from lockstep_operator.types.names import RESOLVE_ANNOTATION, RESTARTED_ANNOTATION, ModelKey
from lockstep_operator.types.timestamps import parse_rfc3339

_SOURCES: Final = ("huggingFace", "persistentVolumeClaim", "hostPath", "image")
DEFAULT_ATTEMPTS: Final = 3
DEFAULT_WINDOW: Final = 3600.0
DEFAULT_INITIAL: Final = 10.0
DEFAULT_MAX: Final = 600.0
DEFAULT_PROGRESS: Final = 600.0


class SpecError(ValueError):
    """The spec can't be served as written; the message says what to change. The CRD's schema refuses most."""


@dataclass(frozen=True, slots=True)
class SecretKey:
    name: str
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HuggingFace:
    """A repository of a hub. `source`: the hub's name, `endpoint`: its address, None as the runtime has it.
    `resolve_at`: when it was last asked that the revision be resolved anew, in unix seconds."""

    repo: str
    revision: str | None = None
    token: SecretKey | None = None
    token_is_optional: bool = False
    source: str = HUGGING_FACE
    endpoint: str | None = None
    resolve_at: float | None = None

    @property
    def is_fixed(self) -> bool:
        """The revision is a commit already."""
        return re.fullmatch(r"[0-9a-f]{40}", self.revision or "") is not None


@dataclass(frozen=True, slots=True)
class Claim:
    """A persistent volume claim, and a folder within it ("" is its root)."""

    name: str
    path: str = ""


@dataclass(frozen=True, slots=True)
class HostPath:
    path: str


@dataclass(frozen=True, slots=True)
class EmptyDir:
    size_limit: str | None = None


@dataclass(frozen=True, slots=True)
class Image:
    """An OCI image that is mounted as a volume, and a folder within it ("" is its root)."""

    reference: str
    pull_policy: str | None = None
    path: str = ""


Source = HuggingFace | Claim | HostPath | Image
Cache = Claim | HostPath | EmptyDir


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Limits of the engine, and its parsers of answers; None leaves them to the runtime."""

    max_model_len: int | None = None
    max_sequences: int | None = None
    max_batch_tokens: int | None = None
    kv_cache_memory: str | None = None
    prefix_caching: bool | None = None
    reasoning_parser: str | None = None
    tool_call_parser: str | None = None


@dataclass(frozen=True, slots=True)
class Vision:
    """Bounds of an image's pixels; None leaves them to the model."""

    max_pixels: int | None = None
    min_pixels: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Watchdog:
    """Of the runtime's step deadlines; None leaves them to the runtime."""

    step_timeout: float | None = None  # seconds; fixed, without learning
    floor: float | None = None  # seconds
    factor: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoverySpec:
    """What is done about groups that can't recover by themselves, and how often. Times in seconds."""

    strategy: str | None = None  # Ladder (also when None) or RecyclePods
    observe: bool = False  # report what would be done, and do nothing
    weight_cache: str | None = None  # Memory (also when None) or Off
    attempts: int = DEFAULT_ATTEMPTS  # of each of the operator's rungs, for each group
    window: float = DEFAULT_WINDOW  # of healthy time, in which a spent budget is whole again
    initial: float = DEFAULT_INITIAL  # between the first attempt and the second
    most: float = DEFAULT_MAX  # between later ones


@dataclass(frozen=True, slots=True)
class Network:
    """Who may reach the API; None leaves it to the operator's settings."""

    policy: str | None = None  # Managed or None, the word
    peers: tuple[Mapping[str, Any], ...] | None = None  # NetworkPolicyPeers


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
    max_unavailable: int = 1
    template: Mapping[str, Any] = field(default_factory=dict)
    flaw: str = ""  # what is wrong with the pods' template, as a sentence: existing pods stay, and are repaired
    progress_deadline: float = DEFAULT_PROGRESS  # seconds
    restarted_at: float | None = None  # unix seconds of the last request to restart the groups one by one

    @property
    def name(self) -> str:
        return self.key.name

    @property
    def namespace(self) -> str:
        return self.key.namespace

    @property
    def pods_per_group(self) -> int:
        return self.tensor_parallel_size // self.ranks_per_pod

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
    source, default_cache, unknown = _source(model, sources, resolve_at)
    template = spec.get("template") or {}
    return Model(
        key=ModelKey(metadata["namespace"], metadata["name"]),
        uid=metadata["uid"],
        generation=metadata.get("generation", 1),
        source=source,
        served_name=model.get("servedName", metadata["name"]),
        cache=_cache(model.get("cache") or default_cache),
        tensor_parallel_size=size,
        ranks_per_pod=per_pod,
        replicas=spec.get("replicas", 1),
        dtype=spec.get("dtype", "auto"),
        backend=spec.get("backend", "auto"),
        accelerator=(spec.get("accelerator") or {}).get("resourceName"),
        engine=_engine(spec.get("engine") or {}),
        vision=_vision(spec.get("vision") or {}),
        watchdog=_watchdog(spec.get("watchdog") or {}),
        recovery=_recovery(spec.get("recovery") or {}),
        api_key=_secret_key(spec.get("apiKeySecretRef")),
        network=_network(spec.get("network") or {}),
        max_unavailable=(spec.get("rollout") or {}).get("maxUnavailable", 1),
        template=template,
        flaw=template_check.flaw(template) or flaw or other_flaw or unknown,
        progress_deadline=_duration(spec, "progressDeadline") or DEFAULT_PROGRESS,
        restarted_at=restarted_at,
    )


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


def _source(
    model: Mapping[str, Any], sources: Sequence[ModelSource], resolve_at: float | None
) -> tuple[Source, Mapping[str, Any] | None, str]:
    """With the cache that its source has by default, and what is wrong with it."""
    match {kind: model[kind] for kind in _SOURCES if kind in model}:
        case {"huggingFace": hub, **rest} if not rest:
            return _of_a_hub(hub, sources, resolve_at)
        case {"persistentVolumeClaim": claim, **rest} if not rest:
            return Claim(claim["claimName"], claim.get("path", "").strip("/")), None, ""
        case {"hostPath": host, **rest} if not rest:
            return HostPath(host["path"]), None, ""
        case {"image": image, **rest} if not rest:
            return Image(image["reference"], image.get("pullPolicy"), image.get("path", "").strip("/")), None, ""
        case _:
            raise SpecError("model must name exactly one of huggingFace, persistentVolumeClaim, hostPath and image")


def _of_a_hub(
    hub: Mapping[str, Any], sources: Sequence[ModelSource], resolve_at: float | None
) -> tuple[HuggingFace, Mapping[str, Any] | None, str]:
    known = {HUGGING_FACE: ModelSource(name=HUGGING_FACE), **{one.name: one for one in sources}}
    default = next((one.name for one in sources if one.default), HUGGING_FACE)
    name = hub.get("source", default)
    flaw = "" if name in known else (
        f"model.huggingFace.source is {name}, and the operator knows {', '.join(known)} (models.sources of its chart)"
    )  # fmt: skip
    source = known.get(name) or ModelSource(name=name)
    own = _secret_key(hub.get("tokenSecretRef"))
    return (
        HuggingFace(
            repo=hub["repo"],
            revision=hub.get("revision"),
            token=own or (SecretKey(*source.token_secret) if source.token_secret else None),
            token_is_optional=own is None,
            source=name,
            endpoint=source.endpoint,
            resolve_at=None if resolve_at is None else float(int(resolve_at)),  # as the status has it
        ),
        source.cache,
        flaw,
    )


def _cache(cache: Mapping[str, Any] | None) -> Cache:
    match cache or {}:
        case {"persistentVolumeClaim": claim}:
            return Claim(claim["claimName"])
        case {"hostPath": host}:
            return HostPath(host["path"])
        case {"emptyDir": {"sizeLimit": limit}}:
            return EmptyDir(str(limit))
        case _:
            return EmptyDir()


def _engine(engine: Mapping[str, Any]) -> EngineLimits:
    memory = engine.get("kvCacheMemory")
    return EngineLimits(
        max_model_len=engine.get("maxModelLen"),
        max_sequences=engine.get("maxSequences"),
        max_batch_tokens=engine.get("maxBatchTokens"),
        kv_cache_memory=None if memory is None else str(memory),
        prefix_caching=engine.get("prefixCaching"),
        reasoning_parser=engine.get("reasoningParser"),
        tool_call_parser=engine.get("toolCallParser"),
    )


def _vision(vision: Mapping[str, Any]) -> Vision:
    return Vision(max_pixels=vision.get("maxPixels"), min_pixels=vision.get("minPixels"))


def _watchdog(watchdog: Mapping[str, Any]) -> Watchdog:
    return Watchdog(
        step_timeout=_duration(watchdog, "stepTimeout"),
        floor=_duration(watchdog, "floor"),
        factor=watchdog.get("factor"),
    )


def _recovery(recovery: Mapping[str, Any]) -> RecoverySpec:
    budget, backoff = recovery.get("budget") or {}, recovery.get("backoff") or {}
    found = RecoverySpec(
        strategy=recovery.get("strategy"),
        observe=recovery.get("mode") == "Observe",
        weight_cache=recovery.get("weightCache"),
        attempts=budget.get("attempts", DEFAULT_ATTEMPTS),
        window=_duration(budget, "window") or DEFAULT_WINDOW,
        initial=_duration(backoff, "initial") or DEFAULT_INITIAL,
        most=_duration(backoff, "max") or DEFAULT_MAX,
    )
    return replace(found, most=max(found.initial, found.most)) if "max" not in backoff else found


def _network(network: Mapping[str, Any]) -> Network:
    peers = network.get("from")
    return Network(policy=network.get("policy"), peers=None if peers is None else tuple(peers))


def _duration(block: Mapping[str, Any], name: str) -> float | None:
    if name not in block:
        return None
    try:
        return duration(block[name])
    except ValueError as error:
        raise SpecError(f"{name}: {error}") from None


def _secret_key(reference: Mapping[str, Any] | None) -> SecretKey | None:
    return SecretKey(reference["name"], reference["key"]) if reference else None
