"""What the operator is told at its start: flags, or variables of the environment."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import click
from click.core import ParameterSource

LOG_LEVELS: Final = ("debug", "info", "warning", "error")
LOG_FORMATS: Final = ("text", "json")
LIVE_PAGES: Final = ("Local", "Cluster", "Off")
POLICIES: Final = ("Managed", "None")
CACHE_GROUP: Final = 65532
HUGGING_FACE: Final = "huggingface"  # the source that is always there
Peer = Mapping[str, Any]  # a NetworkPolicyPeer
PULL_POLICIES: Final = ("Always", "IfNotPresent", "Never")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A hub that models may be of. `token_secret`: name and key, of a Secret in each model's namespace that may be
    absent. `cache`: as spec.model.cache, for models that say nothing."""

    name: str
    endpoint: str | None = None
    token_secret: tuple[str, str] | None = None
    cache: Mapping[str, Any] | None = None
    default: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    runtime_image: str
    pull_policy: str = "IfNotPresent"
    pull_secrets: tuple[str, ...] = ()  # of the models' namespaces
    fs_group: int | None = CACHE_GROUP  # of files on a cache volume, so that the pod's user may write them; None: unset
    network_policy: str = "Managed"  # for models that don't say
    api_from: tuple[Peer, ...] = ()  # may use the API of models that don't say, beside their own namespace
    scrape_from: tuple[Peer, ...] = ()  # may reach the API's port of every model: it serves /metrics, too
    sources: tuple[ModelSource, ...] = ()  # beside huggingface
    watch_nodes: bool = False  # so that groups leave cordoned ones
    namespaces: tuple[str, ...] = ()  # none: all of them
    operator_namespace: str | None = None
    lease: str | None = None  # in that namespace: only its holder works
    key_secret: str | None = None  # in that namespace: the key that models' tokens follow from; None: a passing one
    port: int = 8080
    live_page: str = "Local"  # whom it is served to
    live_port: int = 8081
    live_host: str | None = None  # an address of ours, where other operators reach it
    concurrency: int = 8
    update_concurrency: int = 1  # models whose runtime is updated by itself at the same time
    resync_seconds: float = 60.0
    node_conditions: bool = False  # suspect nodes get the condition LockstepSuspect
    log_level: str = "info"
    log_format: str = "text"
    tracing_endpoint: str | None = None  # of the collector that rank pods and the operator send traces to

    @property
    def live_url(self) -> str:
        """Of the live page, for other operators; empty if they can't reach it."""
        if self.live_page != "Cluster" or not self.live_host:
            return ""
        return f"http://{f'[{self.live_host}]' if ':' in self.live_host else self.live_host}:{self.live_port}"


_COUNT: Final = click.IntRange(min=1)


class _Name(click.types.StringParamType):
    """Of a namespace. Several are comma-separated in a variable."""

    envvar_list_splitter: ClassVar[str | None] = ","


def _names(ctx: click.Context, param: click.Parameter, value: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in value.split(",") if part.strip())


def _group(ctx: click.Context, param: click.Parameter, value: str) -> int | None:
    return None if value == "none" else _COUNT(value, param, ctx)


def _peers(ctx: click.Context, param: click.Parameter, value: str) -> tuple[Peer, ...]:
    try:
        peers = json.loads(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not JSON: {error}") from None
    if not isinstance(peers, list) or not all(isinstance(peer, dict) and peer for peer in peers):
        raise click.BadParameter(f"{value!r} is not a list of NetworkPolicyPeers")
    return tuple(peers)


_SOURCE_FIELDS: Final = frozenset({"name", "endpoint", "tokenSecretRef", "cache", "default"})
_CACHES: Final = frozenset({"persistentVolumeClaim", "hostPath", "emptyDir"})


def _sources(ctx: click.Context, param: click.Parameter, value: str) -> tuple[ModelSource, ...]:
    try:
        found = tuple(_source(one) for one in json.loads(value))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise click.BadParameter(
            f"{value!r} is no list of sources as the chart's values.yaml describes them: {error}"
        ) from None
    names = [one.name for one in found]
    if len(set(names)) < len(names) or sum(one.default for one in found) > 1:
        raise click.BadParameter(f"{value!r}: names must differ, and one source at most may be the default")
    return found


def _source(block: Any) -> ModelSource:
    if unknown := block.keys() - _SOURCE_FIELDS:
        raise ValueError(f"{sorted(unknown)[0]} is no field of a source")
    name, endpoint, secret, cache = (
        block["name"],
        block.get("endpoint"),
        block.get("tokenSecretRef"),
        block.get("cache"),
    )
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", name):
        raise ValueError(f"the name {name!r} is not of lower-case letters, digits and '-'")
    if endpoint is None and name != HUGGING_FACE:
        raise ValueError(f"{name} has no endpoint")
    if endpoint is not None and not re.fullmatch(r"https?://[^\s,]+", endpoint):
        raise ValueError(f"the endpoint {endpoint!r} is no http(s) address")
    if cache is not None and (len(cache) != 1 or not cache.keys() <= _CACHES):
        raise ValueError(f"the cache of {name} is none of {', '.join(sorted(_CACHES))}")
    token_secret = (str(secret["name"]), str(secret["key"])) if secret else None
    return ModelSource(
        name=name, endpoint=endpoint, token_secret=token_secret, cache=cache, default=bool(block.get("default"))
    )


_option: Final = functools.partial(click.option, show_envvar=True)
_CONTEXT: Final = {"auto_envvar_prefix": "LOCKSTEP", "show_default": True}


@click.command("lockstep-operator", context_settings=_CONTEXT)
@_option("--runtime-image", required=True, help="Image of the rank pods.")
@_option(
    "--runtime-image-pull-policy", default="IfNotPresent", type=click.Choice(PULL_POLICIES), help="Its pull policy."
)
@_option("--runtime-image-pull-secrets", default="", callback=_names, help="Comma-separated names of Secrets.")
@_option("--fs-group", default=str(CACHE_GROUP), callback=_group, help="Of files on a cache volume, or none.")
@_option("--network-policy", default="Managed", type=click.Choice(POLICIES), help="Of models that don't say.")
@_option("--api-from", default="[]", callback=_peers, help="May use models' API: NetworkPolicyPeers, as JSON.")
@_option("--scrape-from", default="[]", callback=_peers, help="May scrape every model: NetworkPolicyPeers, as JSON.")
@_option("--sources", default="[]", callback=_sources, help="Hubs of models, as JSON: see the chart's models.sources.")
@_option(
    "--watch-nodes", default=False, type=bool, help="Move groups off cordoned nodes, which it must be able to list."
)
@_option("--operator-namespace", help="Where the operator runs, for the NetworkPolicies.")
@_option("--lease", help="Name of a Lease in the operator's namespace: of several operators, only its holder works.")
@_option("--key-secret", help="Name of a Secret in that namespace, made if missing: models' tokens follow from it.")
@_option("--port", default=8080, type=_COUNT, help="Of /metrics, /healthz and /readyz.")
@_option("--live-page", default="Local", type=click.Choice(LIVE_PAGES), help="Served to whom.")
@_option("--live-port", default=8081, type=_COUNT, help="Of the live page.")
@_option("--live-host", help="This pod's address: an operator that stands by passes readers of the page on to it.")
@_option("--concurrency", default=8, type=_COUNT, help="Models reconciled at the same time.")
@_option("--update-concurrency", default=1, type=_COUNT, help="Models with runtime.update Auto updated at a time.")
@_option("--resync-seconds", default=60.0, type=click.FloatRange(min=0, min_open=True), help="Between two passes.")
@_option("--node-conditions", is_flag=True, help="Give suspect nodes the condition LockstepSuspect.")
@_option("--log-level", default="info", type=click.Choice(LOG_LEVELS), help="Least severe level to log.")
@_option("--log-format", default="text", type=click.Choice(LOG_FORMATS), help="The rank pods' logs', too.")
@_option("--tracing-endpoint", help="Where rank pods and the operator send traces: http(s)://host:4318.")
@_option("--namespace", multiple=True, type=_Name(), envvar="LOCKSTEP_NAMESPACES", help="Serve only this one.")
@click.option("--all-namespaces", is_flag=True, allow_from_autoenv=False, help="Whatever LOCKSTEP_NAMESPACES says.")
@click.pass_context
def _command(context: click.Context, /, namespace: tuple[str, ...], all_namespaces: bool, **options: Any) -> Settings:
    """Serves TensorParallelModel objects."""
    if all_namespaces and context.get_parameter_source("namespace") is ParameterSource.COMMANDLINE:
        raise click.UsageError("--namespace is not allowed with --all-namespaces")
    if options["lease"] and not options["operator_namespace"]:
        raise click.UsageError("--lease needs --operator-namespace: that is where the Lease is")
    if options["key_secret"] and not options["operator_namespace"]:
        raise click.UsageError("--key-secret needs --operator-namespace: that is where the Secret is")
    image = {name: options.pop(f"runtime_image_{name}") for name in ("pull_policy", "pull_secrets")}
    named = tuple(name.strip() for name in namespace if name.strip())
    return Settings(**image, **options, namespaces=() if all_namespaces else named)


def read_settings(arguments: Sequence[str]) -> Settings:
    """From flags, else from variables of the environment, else as they are by default.

    Raises SystemExit after a usage message when something is missing or malformed, and after --help.
    """
    try:
        found = _command.main([*arguments], prog_name="lockstep-operator", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        raise SystemExit(error.exit_code) from None
    if not isinstance(found, Settings):
        raise SystemExit(found)
    return found
