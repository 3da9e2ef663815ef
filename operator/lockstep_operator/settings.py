"""What the operator is told at its start: flags, or variables of the environment."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

LOG_LEVELS: Final = ("debug", "info", "warning", "error")
PULL_POLICIES: Final = ("Always", "IfNotPresent", "Never")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    runtime_image: str
    pull_policy: str = "IfNotPresent"
    namespaces: tuple[str, ...] = ()  # none: all of them
    operator_namespace: str | None = None
    port: int = 8080
    concurrency: int = 8
    resync_seconds: float = 60.0
    log_level: str = "info"


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
        namespaces=() if parsed.all_namespaces else tuple(namespaces),
        operator_namespace=parsed.operator_namespace or None,
        port=parsed.port,
        concurrency=parsed.concurrency,
        resync_seconds=parsed.resync_seconds,
        log_level=parsed.log_level,
    )


def _parser(environment: Mapping[str, str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lockstep-operator", description="Serves TensorParallelModel objects.")

    def add(flag: str, default: str | None, description: str, **more: object) -> None:
        variable = "LOCKSTEP_" + flag.lstrip("-").replace("-", "_").upper()
        value = environment.get(variable) or default  # argparse converts and checks strings, also from variables
        parser.add_argument(flag, default=value, help=f"{description} [{variable}]", **more)  # type: ignore[arg-type]

    add("--runtime-image", None, "image of the rank pods")
    add("--runtime-image-pull-policy", "IfNotPresent", "its pull policy", type=_one_of(PULL_POLICIES))
    add("--operator-namespace", None, "where the operator runs, for the NetworkPolicies")
    add("--port", "8080", "of /metrics, /healthz and /readyz", type=_positive_int)
    add("--concurrency", "8", "models reconciled at the same time", type=_positive_int)
    add("--resync-seconds", "60", "every model is looked at again after so long", type=_positive_float)
    add("--log-level", "info", "least severe level to log", type=_one_of(LOG_LEVELS))
    scope = parser.add_mutually_exclusive_group()
    scope.add_argument(
        "--namespace", action="append", help="serve only this one; may be repeated [LOCKSTEP_NAMESPACES]"
    )
    scope.add_argument("--all-namespaces", action="store_true", help="serve every namespace (the default)")
    return parser


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


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
