"""The blocks of a spec that describe how a model is run, each with its parser."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from lockstep_operator.types.spec_values import seconds
from lockstep_runtime.protocol.status import API_PORT, BUS_PORT, STATUS_PORT

DEFAULT_ATTEMPTS: Final = 3
DEFAULT_WINDOW: Final = 3600.0
DEFAULT_INITIAL: Final = 10.0
DEFAULT_MAX: Final = 600.0


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
    """Who may reach the API; None leaves it to the operator's settings. And through what mesh."""

    policy: str | None = None  # Managed or None, the word
    peers: tuple[Mapping[str, Any], ...] | None = None  # NetworkPolicyPeers
    mesh: str | None = None  # Istio; None, or the word, for none


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """That the pods listen on. The Service's own port is always the API's default."""

    api: int = API_PORT
    bus: int = BUS_PORT
    status: int = STATUS_PORT


@dataclass(frozen=True, slots=True)
class GroupMetadata:
    """Of each group's StatefulSet, with placeholders for what differs between groups."""

    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rollout:
    """How running groups are replaced, in groups."""

    max_unavailable: int = 1
    max_surge: int = 0
    partition: int = 0  # groups below it keep their revision


@dataclass(frozen=True, slots=True)
class Disruption:
    """Of pods, by whoever drains nodes."""

    has_budget: bool = True


def parse_engine(engine: Mapping[str, Any]) -> EngineLimits:
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


def parse_vision(vision: Mapping[str, Any]) -> Vision:
    return Vision(max_pixels=vision.get("maxPixels"), min_pixels=vision.get("minPixels"))


def parse_watchdog(watchdog: Mapping[str, Any]) -> Watchdog:
    return Watchdog(
        step_timeout=seconds(watchdog, "stepTimeout"),
        floor=seconds(watchdog, "floor"),
        factor=watchdog.get("factor"),
    )


def parse_recovery(recovery: Mapping[str, Any]) -> RecoverySpec:
    budget, backoff = recovery.get("budget") or {}, recovery.get("backoff") or {}
    found = RecoverySpec(
        strategy=recovery.get("strategy"),
        observe=recovery.get("mode") == "Observe",
        weight_cache=recovery.get("weightCache"),
        attempts=budget.get("attempts", DEFAULT_ATTEMPTS),
        window=seconds(budget, "window") or DEFAULT_WINDOW,
        initial=seconds(backoff, "initial") or DEFAULT_INITIAL,
        most=seconds(backoff, "max") or DEFAULT_MAX,
    )
    return replace(found, most=max(found.initial, found.most)) if "max" not in backoff else found


def parse_rollout(rollout: Mapping[str, Any], replicas: int) -> Rollout:
    """Percentages as Deployments have them: of `replicas`, rounded up for surge and down for what may be missing; and
    where that leaves neither, one group may be."""
    surge = _share(rollout.get("maxSurge", 0), replicas, up=True)
    unavailable = _share(rollout.get("maxUnavailable", 1), replicas, up=False)
    most = unavailable if surge else max(1, unavailable)
    return Rollout(max_unavailable=most, max_surge=surge, partition=rollout.get("partition", 0))


def _share(value: int | str, replicas: int, *, up: bool) -> int:
    if isinstance(value, int):
        return value
    percent = int(value.removesuffix("%"))
    return (percent * replicas + (99 if up else 0)) // 100


def parse_disruption(disruption: Mapping[str, Any]) -> Disruption:
    return Disruption(has_budget=disruption.get("budget") != "None")


def parse_network(network: Mapping[str, Any]) -> Network:
    peers = network.get("from")
    return Network(
        policy=network.get("policy"), peers=None if peers is None else tuple(peers), mesh=network.get("mesh")
    )


def parse_group_metadata(written: Mapping[str, Any], inherited: Mapping[str, str]) -> GroupMetadata:
    """`inherited` are labels of the model that its StatefulSets have too."""
    return GroupMetadata(
        labels={**inherited, **(written.get("labels") or {})}, annotations=dict(written.get("annotations") or {})
    )


def parse_ports(ports: Mapping[str, Any]) -> Ports:
    return Ports(**{name: ports[name] for name in ("api", "bus", "status") if name in ports})
