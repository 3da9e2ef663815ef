"""What the operator is told at its start: flags, or variables of the environment."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

LOG_LEVELS: Final = ("debug", "info", "warning", "error")
LOG_FORMATS: Final = ("text", "json")
POLICIES: Final = ("Managed", "None")
CACHE_GROUP: Final = 65532
Peer = Mapping[str, Any]  # a NetworkPolicyPeer
PULL_POLICIES: Final = ("Always", "IfNotPresent", "Never")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    runtime_image: str
    pull_policy: str = "IfNotPresent"
    pull_secrets: tuple[str, ...] = ()  # of the models' namespaces
    fs_group: int | None = CACHE_GROUP  # of files on a cache volume, so that the pod's user may write them; None: unset
    network_policy: str = "Managed"  # for models that don't say
    api_from: tuple[Peer, ...] = ()  # may use the API of models that don't say, beside their own namespace
    scrape_from: tuple[Peer, ...] = ()  # may reach the API's port of every model: it serves /metrics, too
    namespaces: tuple[str, ...] = ()  # none: all of them
    operator_namespace: str | None = None
    port: int = 8080
    concurrency: int = 8
    resync_seconds: float = 60.0
    log_level: str = "info"
    log_format: str = "text"


def read_settings(arguments: Sequence[str], environment: Mapping[str, str]) -> Settings:
    """Raises SystemExit with a usage message when something is missing or malformed."""
    parsed = _parser(environment).parse_args(arguments)
    if not parsed.runtime_image:
        raise SystemExit(
            "lockstep-operator: --runtime-image (or LOCKSTEP_RUNTIME_IMAGE) must name the image of the rank pods"
        )
    namespaces = parsed.namespace or _listed(environment.get("LOCKSTEP_NAMESPACES", ""))
    return Settings(
        runtime_image=parsed.runtime_image,
        pull_policy=parsed.runtime_image_pull_policy,
        pull_secrets=parsed.runtime_image_pull_secrets,
        fs_group=parsed.fs_group,
        network_policy=parsed.network_policy,
        api_from=parsed.api_from,
        scrape_from=parsed.scrape_from,
        namespaces=() if parsed.all_namespaces else tuple(namespaces),
        operator_namespace=parsed.operator_namespace or None,
        port=parsed.port,
        concurrency=parsed.concurrency,
        resync_seconds=parsed.resync_seconds,
        log_level=parsed.log_level,
        log_format=parsed.log_format,
    )


def _parser(environment: Mapping[str, str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lockstep-operator", description="Serves TensorParallelModel objects.")

    def add(flag: str, default: str | None, description: str, **more: object) -> None:
        variable = "LOCKSTEP_" + flag.lstrip("-").replace("-", "_").upper()
        value = environment.get(variable) or default  # argparse converts and checks strings, also from variables
        parser.add_argument(flag, default=value, help=f"{description} [{variable}]", **more)  # type: ignore[arg-type]

    add("--runtime-image", None, "image of the rank pods")
    add("--runtime-image-pull-policy", "IfNotPresent", "its pull policy", type=_one_of(PULL_POLICIES))
    add("--runtime-image-pull-secrets", "", "with which it is pulled, comma-separated", type=_names)
    add("--fs-group", str(CACHE_GROUP), "group of files on a cache volume, or none", type=_group)
    add("--network-policy", "Managed", "default of spec.network.policy: Managed or None", type=_one_of(POLICIES))
    add("--api-from", "[]", "who else may use models' API: NetworkPolicyPeers, as JSON", type=_peers)
    add("--scrape-from", "[]", "who may scrape every model: NetworkPolicyPeers, as JSON", type=_peers)
    add("--operator-namespace", None, "where the operator runs, for the NetworkPolicies")
    add("--port", "8080", "of /metrics, /healthz and /readyz", type=_positive_int)
    add("--concurrency", "8", "models reconciled at the same time", type=_positive_int)
    add("--resync-seconds", "60", "every model is looked at again after so long", type=_positive_float)
    add("--log-level", "info", "least severe level to log", type=_one_of(LOG_LEVELS))
    add("--log-format", "text", "of the operator's and the rank pods' logs: text or json", type=_one_of(LOG_FORMATS))
    scope = parser.add_mutually_exclusive_group()
    scope.add_argument(
        "--namespace", action="append", help="serve only this one; may be repeated [LOCKSTEP_NAMESPACES]"
    )
    scope.add_argument("--all-namespaces", action="store_true", help="serve every namespace (the default)")
    return parser


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _names(text: str) -> tuple[str, ...]:
    return tuple(_listed(text))


def _group(text: str) -> int | None:
    return None if text == "none" else _positive_int(text)


def _peers(text: str) -> tuple[Peer, ...]:
    try:
        peers = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from None
    if not isinstance(peers, list) or not all(isinstance(peer, dict) and peer for peer in peers):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of NetworkPolicyPeers")
    return tuple(peers)


def _one_of(words: Sequence[str]) -> Callable[[str], str]:
    """Not argparse's `choices`: those are not checked where the value comes from a variable."""

    def check(text: str) -> str:
        if text not in words:
            raise argparse.ArgumentTypeError(f"{text} is none of {', '.join(words)}")
        return text

    return check


def _positive_int(text: str) -> int:
    return int(_positive_float(text))


def _positive_float(text: str) -> float:
    number = float(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number
