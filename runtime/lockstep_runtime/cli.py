"""The command line: `lockstep serve MODEL …`. Every flag is also an environment variable `LOCKSTEP_<FLAG>`.

A flag is named after the field of `ServeConfig`, `EngineLimits` or `Watchdog` that it sets.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn, get_args

import click

import lockstep_runtime
from lockstep_runtime import log
from lockstep_runtime.chaos import client, pending
from lockstep_runtime.config import (
    TOKEN_VARIABLE,
    Backend,
    Device,
    DType,
    EngineLimits,
    ReasoningParser,
    ServeConfig,
    Strategy,
    ToolCallParser,
    UsageError,
    Vision,
    Watchdog,
    WeightCache,
)
from lockstep_runtime.flags import (
    COUNT,
    FACTOR,
    INDEX,
    PORT,
    SECONDS,
    SOME_SECONDS,
    TOKENS,
    Command,
    byte_size,
    flag,
    switch,
)
from lockstep_runtime.host import descriptors, discovery
from lockstep_runtime.host.addresses import LOOPBACK, join, loopback, reach
from lockstep_runtime.protocol.status import API_PORT, BUS_PORT, STATUS_PORT
from lockstep_runtime.report.command import command
from lockstep_runtime.sources.choice import choose, other_variables
from lockstep_runtime.sources.repository import COMMIT
from lockstep_runtime.supervisor import accelerator
from lockstep_runtime.supervisor.ports import Ports, open_ports

FORMER_CPU: Final = "gloo"  # as the backend cpu was called, though torch's gloo was never used

logger = logging.getLogger(__name__)


def _flags(command: Callable[..., None]) -> Callable[..., None]:
    limits, watchdog, host = EngineLimits(), Watchdog(), socket.gethostname()
    or_free = "on one machine, where that is taken, a free one"
    model, ranks, engine, repair, network = "model", "ranks", "engine", "watchdog and recovery", "network"
    pod = "identity (set by the operator)"
    for decorate in reversed([
        flag(model, "served-name", str, None, "the name that clients call; default: the last part of MODEL"),
        flag(model, "revision", str, None, "branch, tag or commit of a hub id", "model_revision"),
        flag(model, "commit", str, None, "what the revision is, already decided: the hub isn't asked", "model_commit"),
        flag(model, "source", str, None,
              "a hub: name=NAME,endpoint=URL and, if need be, token-variable, token-file, cache, default; MODEL may "
              "then be NAME:org/name; repeat it for more; in the variable put spaces between", "sources",
              multiple=True, metavar="SOURCE"),
        flag(model, "download-dir", str, None, "where hub models are kept; default: the hub client's cache"),
        flag(model, "dtype", click.Choice(get_args(DType)), "auto", "of weights and cache"),
        flag(model, "reasoning-parser", click.Choice(get_args(ReasoningParser)), "auto",
              "what parts reasoning from the answer; auto: qwen3 where the tokenizer has <think> and </think>"),
        flag(model, "tool-call-parser", click.Choice(get_args(ToolCallParser)), "auto",
              "what parts calls of tools from the answer; auto: as the model's chat template writes them"),
        flag(ranks, "tensor-parallel-size", COUNT, 1, "ranks that the model is split over"),
        flag(ranks, "ranks-per-pod", COUNT, None, "ranks that run here; default: all of them"),
        flag(ranks, "backend", click.Choice([*get_args(Backend), FORMER_CPU]), "auto",
              "of the collectives; gloo is the former name of cpu"),
        flag(ranks, "device", click.Choice(get_args(Device)), "auto",
              "auto: cuda where there are GPUs, else cpu; cuda with backend cpu lets ranks share a GPU, slowly"),
        flag(ranks, "threads-per-rank", COUNT, None, "CPU threads; default: the cores, divided by the ranks here"),
        flag(engine, "max-model-len", TOKENS, None, "tokens, prompt and answer; default: the model's"),
        flag(engine, "max-sequences", COUNT, limits.max_sequences, "sequences that run at once"),
        flag(engine, "max-batch-tokens", TOKENS, limits.max_batch_tokens, "tokens in one step"),
        flag(engine, "kv-cache-memory", byte_size, None, "per rank, such as 2Gi; default: what there is",
              "kv_cache_bytes", metavar="SIZE"),
        flag(engine, "prefix-caching/--no-prefix-caching", bool, limits.prefix_caching,
              "whether requests that begin alike share what is computed for their beginnings"),
        flag(engine, "max-waiting", COUNT, limits.max_waiting, "queued requests before new ones are turned away"),
        flag(engine, "max-pixels", COUNT, None,
              "that an image is resized to at most; default: the model's; at most what it has positions for"),
        flag(engine, "min-pixels", COUNT, None, "that an image is resized to at least; default: the model's"),
        flag(engine, "allow-image-host", str, None,
              "a host from which images are fetched by their URLs, if its addresses are public ones; repeat it for "
              "more; in the variable put spaces between; default: images must come as data URIs", "image_hosts",
              multiple=True, metavar="HOST"),
        flag(repair, "step-timeout", SOME_SECONDS, None, "a step's deadline; default: learned from the steps before"),
        flag(repair, "watchdog-floor", SOME_SECONDS, watchdog.floor, "the shortest deadline that is learned", "floor"),
        flag(repair, "watchdog-factor", FACTOR, watchdog.factor, "how many times the expected time a step may take",
              "factor"),
        flag(repair, "recovery-strategy", click.Choice(get_args(Strategy)), "Ladder",
              "Ladder heals in the group; RecyclePods aborts, reports Poisoned and waits for the operator"),
        flag(repair, "weight-cache", click.Choice(get_args(WeightCache)), "Memory",
              "where a restarted rank finds its weights"),
        flag(repair, "allow-faults", switch, "false", "let `lockstep inject` break things", is_flag=False,
              flag_value="true", metavar="[true|false]"),
        flag(network, "host", str, LOOPBACK, "address to listen on, :: for every one of IPv4 and IPv6"),
        flag(network, "cors-allow-origin", str, None,
              "a web page's origin that may call the API from a browser, such as https://chat.example.com, or *; "
              "repeat it for more; in the variable put spaces between", "cors_allow_origins",
              multiple=True, metavar="ORIGIN"),
        flag(network, "port", PORT, API_PORT, "of the HTTP API", "api_port"),
        flag(network, "bus-port", PORT, None, f"between the engine and its ranks; default: {BUS_PORT}, or, {or_free}"),
        flag(network, "status-port", PORT, None,
              f"of the supervisor's /healthz and /status; default: {STATUS_PORT}, or, {or_free}"),
        flag(network, "grace-seconds", SECONDS, 30.0, "for running requests after SIGTERM"),
        flag(network, "lame-duck-seconds", SECONDS, 0.0, "new requests are still taken for so long after SIGTERM"),
        flag(pod, "model-name", str, "local", "the TensorParallelModel's name"),
        flag(pod, "group", INDEX, 0, "the group's number"),
        flag(pod, "spec-revision", str, "", "the rollout revision"),
        flag(pod, "pod-index", INDEX, 0, "this pod's number; 0 is the leader"),
        flag(pod, "pod", str, host, "this pod's name"),
        flag(pod, "node", str, host, "this node's name"),
        flag(pod, "leader", str, None, "host name of pod 0; default: this machine"),
    ]):  # fmt: skip
        command = decorate(command)
    return command


def config_from(options: Mapping[str, Any]) -> ServeConfig:
    """The configuration that the options of `lockstep serve` ask for, each named as its field.

    Raises:
        UsageError: the options contradict each other.
    """
    given = {name: value for name, value in options.items() if value is not None}
    size = given["tensor_parallel_size"]
    ranks_per_pod = given.setdefault("ranks_per_pod", size)
    if size % ranks_per_pod:
        raise UsageError(f"--ranks-per-pod {ranks_per_pod} does not divide --tensor-parallel-size {size}")
    if given["backend"] == FORMER_CPU:
        given["backend"] = "cpu"
    if given["backend"] == "nccl" and given["device"] == "cpu":
        raise UsageError("--backend nccl computes on GPUs: leave out --device cpu, or choose --backend cpu")
    pods = size // ranks_per_pod
    if given["pod_index"] >= pods:
        raise UsageError(f"--pod-index {given['pod_index']}: a group of {pods} pods has the indexes 0 to {pods - 1}")
    folder = _is_folder(given["model"])
    given["model"], given["source"] = choose(given["model"], given.pop("sources", ()), is_folder=folder)
    if (commit := given.get("model_commit")) and not COMMIT.fullmatch(commit):
        raise UsageError(f"--commit {commit!r}: a commit is 40 hexadecimal digits; for branches and tags: --revision")
    given["served_name"] = given.get("served_name") or given["model"].rstrip("/").rsplit("/", 1)[-1]
    given["leader"] = given.get("leader") or loopback()
    limits = {name: given.pop(name) for name in EngineLimits.__struct_fields__ if name in given}
    vision = {name: given.pop(name) for name in Vision.__struct_fields__ if name in given}
    watchdog = {name: given.pop(name) for name in Watchdog.__struct_fields__ if name in given}
    return ServeConfig(limits=EngineLimits(**limits), vision=Vision(**vision), watchdog=Watchdog(**watchdog), **given)


def _is_folder(model: str) -> bool:
    """One that may not be entered, and may be given that right later, is told of where it is read."""
    try:
        return Path(model).expanduser().is_dir()
    except OSError:
        return False


def token_for(config: ServeConfig, environment: Mapping[str, str]) -> str:
    """The group's token: given, or, where all ranks are here, one that nobody else needs to know.

    Raises:
        UsageError: several pods need one, and none was given.
    """
    token = environment.get(TOKEN_VARIABLE, "")
    if token:
        return token
    if config.pods > 1:
        raise UsageError(f"a group of several pods needs the same secret in {TOKEN_VARIABLE} in each of them")
    return secrets.token_urlsafe(32)


def unnamed_ports(options: Mapping[str, Any], config: ServeConfig) -> list[str]:
    """The ports that may be chosen: in a group of several pods the others must know them."""
    return [name for name in ("bus_port", "status_port") if options[name] is None and config.pods == 1]


async def _supervise(ports: Ports, token: str) -> int:
    from lockstep_runtime.supervisor.run import Supervisor

    return await Supervisor(ports.config, token).run(ports.status)


def check_faults(config: ServeConfig, environment: Mapping[str, str]) -> None:
    """
    Raises:
        UsageError: the fault to inject is malformed, or can't happen here.
    """
    if config.allow_faults and (once := environment.get(pending.ONCE_VARIABLE)):
        try:
            fault = pending.parse_once(once)
        except ValueError as error:
            raise UsageError(str(error)) from None
        if fault.rank in config.ranks and (why_not := pending.why_not(fault)):
            raise UsageError(f"{pending.ONCE_VARIABLE}={once!r}: {why_not}")


def _serve(options: Mapping[str, Any]) -> int:
    config = accelerator.settle(config_from(options), gpus=accelerator.has_gpus(os.environ))
    check_faults(config, os.environ)
    for variable in other_variables(config.source, options["sources"]):
        os.environ.pop(variable, None)
    token = token_for(config, os.environ)
    ports = open_ports(config, may_choose=unnamed_ports(options, config))
    log.configure("supervisor")
    if options["backend"] == FORMER_CPU:
        logger.warning("--backend %s is deprecated: it is called cpu now", FORMER_CPU)
    descriptors.raise_limit()
    _tell_ports(ports.config, token="" if os.environ.get(TOKEN_VARIABLE) else token)
    import setproctitle

    setproctitle.setproctitle(f"lockstep: supervisor model={config.model_name} group={config.group}")
    return asyncio.run(_supervise(ports, token))


def _tell_ports(config: ServeConfig, *, token: str) -> None:
    """Log where the status is; `inject` and `report` find it in a file. `token`: one that was made here."""
    url = f"http://{join(reach(config.host), config.status_port)}"
    logger.info("the status is at %s/status", url)
    if config.is_leader:
        discovery.leave(
            discovery.Running(
                pid=os.getpid(), model=config.served_name, port=config.api_port, status_url=url, token=token,
                faults=config.allow_faults,
            )
        )  # fmt: skip


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(lockstep_runtime.__version__, message="lockstep %(version)s")
def lockstep() -> None:
    """Serve large language models split over several ranks, and keep them serving."""


@lockstep.command(
    cls=Command,
    short_help="serve a model over an OpenAI-compatible HTTP API",
    epilog="Every flag can be given as an environment variable as well: --max-model-len is LOCKSTEP_MAX_MODEL_LEN. "
    "LOCKSTEP_API_KEY, or the lines of the file LOCKSTEP_API_KEY_FILE, are the keys that clients must send one of. "
    "LOCKSTEP_LOG_LEVEL (info) and LOCKSTEP_LOG_FORMAT (text, or json) shape the log.",
)
@click.argument("model")
@_flags
@click.pass_context
def serve(ctx: click.Context, /, **options: Any) -> None:
    """Serve MODEL over an OpenAI-compatible HTTP API.

    MODEL is a directory with config.json and safetensors, or a hub id such as Qwen/Qwen3-8B.
    """
    try:
        ctx.exit(_serve(options))
    except UsageError as error:
        click.echo(f"lockstep: {error}", err=True)
        ctx.exit(2)


lockstep.add_command(client.inject)
lockstep.add_command(command)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The console script; exit code 2 for a wrong command line."""
    lockstep.main(arguments, prog_name="lockstep")
