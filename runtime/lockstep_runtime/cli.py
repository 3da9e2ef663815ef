"""The command line: `lockstep serve MODEL …`. Every flag is also an environment variable `LOCKSTEP_<FLAG>`."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import re
import secrets
import socket
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn, get_args

import msgspec

import lockstep_runtime
from lockstep_runtime import log
from lockstep_runtime.chaos import client, pending
from lockstep_runtime.config import (
    TOKEN_VARIABLE,
    Backend,
    Device,
    DType,
    EngineLimits,
    ServeConfig,
    Strategy,
    Watchdog,
    WeightCache,
)
from lockstep_runtime.host import descriptors, discovery
from lockstep_runtime.host.addresses import LOOPBACK, join, listen, listen_somewhere, loopback, reach
from lockstep_runtime.protocol.status import API_PORT, BUS_PORT, STATUS_PORT
from lockstep_runtime.report import command
from lockstep_runtime.supervisor import accelerator

logger = logging.getLogger(__name__)

_UNITS: Final = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
                 "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}  # fmt: skip


class UsageError(Exception):
    """What was asked for can't be done; the sentence says what to change."""


def byte_size(text: str) -> int:
    """`2Gi`, `512Mi`, `1.5G` or a plain number, in bytes, as Kubernetes writes quantities."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kMGT]|[KMGT]i)?", text.strip())
    if not match or not (size := int(float(match[1]) * _UNITS[match[2] or ""])):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write it like 2Gi, 512Mi or 1500000000")
    return size


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _index(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port between 1 and 65535")
    return int(text)


def _seconds(text: str) -> float:
    if not re.fullmatch(r"\d+(\.\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return float(text)


def _some_seconds(text: str) -> float:
    if not (seconds := _seconds(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return seconds


def _factor(text: str) -> float:
    if not re.fullmatch(r"\d+(\.\d+)?", text) or float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return float(text)


def _switch(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in ("true", "1")


def build_parser(environment: Mapping[str, str]) -> argparse.ArgumentParser:
    """The whole command line; defaults come from the environment where it names them."""
    parser = argparse.ArgumentParser(
        prog="lockstep", description="Serve large language models split over several ranks, and keep them serving."
    )
    parser.add_argument("--version", action="version", version=f"lockstep {lockstep_runtime.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser(
        "serve",
        help="serve a model over an OpenAI-compatible HTTP API",
        description="Serve a model over an OpenAI-compatible HTTP API.",
        epilog="Every flag can be given as an environment variable as well: --max-model-len is LOCKSTEP_MAX_MODEL_LEN. "
        "LOCKSTEP_API_KEY, or the lines of the file LOCKSTEP_API_KEY_FILE, are the keys that clients must send one of. "
        "LOCKSTEP_LOG_LEVEL (info) and LOCKSTEP_LOG_FORMAT (text, or json) shape the log.",
    )
    serve.add_argument("model", help="a directory with config.json and safetensors, or a hub id such as Qwen/Qwen3-8B")
    _add_flags(serve, environment)
    client.add_parser(commands)
    command.add_parser(commands)
    return parser


def _one_of(*choices: str) -> Callable[[str], str]:
    """argparse's own `choices` are not held against defaults, and so not against the environment."""

    def parse(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(choices)}")
        return text

    return parse


class _Repeated(argparse.Action):
    """Collects what is given each time; what is given at all takes the default's place."""

    def __call__(self, _: object, options: argparse.Namespace, value: object, __: object = None) -> None:
        before = getattr(options, self.dest)
        setattr(options, self.dest, (value,) if before is self.default else (*before, value))


def _add_flags(serve: argparse.ArgumentParser, environment: Mapping[str, str]) -> None:
    def flag(group: Any, name: str, parse: Callable[[str], Any], default: Any, text: str, **more: Any) -> None:
        given = environment.get("LOCKSTEP_" + name.upper().replace("-", "_"))
        shown = "" if default is None else f" (default: {default})"
        group.add_argument(
            f"--{name}", type=parse, default=given if given is not None else default, help=text + shown, **more
        )

    model = serve.add_argument_group("model")
    flag(model, "served-name", str, None, "the name that clients call; default: the last part of MODEL")
    flag(model, "revision", str, None, "branch, tag or commit of a hub id")
    flag(model, "download-dir", str, None, "where hub models are kept; default: the hub client's cache")
    flag(model, "dtype", _one_of(*get_args(DType)), "auto", f"of weights and cache: {', '.join(get_args(DType))}")

    ranks = serve.add_argument_group("ranks")
    flag(ranks, "tensor-parallel-size", _positive, 1, "ranks that the model is split over", metavar="N")
    flag(ranks, "ranks-per-pod", _positive, None, "ranks that run here; default: all of them", metavar="K")
    flag(ranks, "backend", _one_of(*get_args(Backend)), "auto", f"of the collectives: {', '.join(get_args(Backend))}")
    flag(ranks, "device", _one_of(*get_args(Device)), "auto",
         "auto: cuda where there are GPUs, else cpu; cuda with gloo lets ranks share a GPU, slowly")  # fmt: skip
    flag(ranks, "threads-per-rank", _positive, None, "CPU threads; default: the cores, divided by the ranks here")

    engine = serve.add_argument_group("engine")
    defaults = EngineLimits()
    flag(engine, "max-model-len", _positive, None, "tokens, prompt and answer; default: the model's", metavar="TOKENS")
    flag(engine, "max-sequences", _positive, defaults.max_sequences, "sequences that run at once")
    flag(engine, "max-batch-tokens", _positive, defaults.max_batch_tokens, "tokens in one step")
    flag(engine, "kv-cache-memory", byte_size, None, "per rank, such as 2Gi; default: what there is", metavar="SIZE")
    flag(engine, "max-waiting", _positive, defaults.max_waiting, "queued requests before new ones are turned away")

    repair = serve.add_argument_group("watchdog and recovery")
    watchdog = Watchdog()
    flag(repair, "step-timeout", _some_seconds, None, "a step's deadline; default: learned from the steps before",
         metavar="SECONDS")  # fmt: skip
    flag(repair, "watchdog-floor", _some_seconds, watchdog.floor, "the shortest deadline that is learned",
         metavar="SECONDS")  # fmt: skip
    flag(repair, "watchdog-factor", _factor, watchdog.factor, "how many times the expected time a step may take")
    flag(repair, "recovery-strategy", _one_of(*get_args(Strategy)), "Ladder",
         "Ladder heals in the group; RecyclePods aborts, reports Poisoned and waits for the operator")  # fmt: skip
    flag(repair, "weight-cache", _one_of(*get_args(WeightCache)), "Memory", "where a restarted rank finds its weights")
    flag(repair, "allow-faults", _switch, False, "let `lockstep inject` break things", nargs="?", const=True)

    network = serve.add_argument_group("network")
    flag(network, "host", str, LOOPBACK, "address to listen on, :: for every one of IPv4 and IPv6")
    origins = environment.get("LOCKSTEP_CORS_ALLOW_ORIGIN", "").split()
    network.add_argument(
        "--cors-allow-origin", action=_Repeated, default=tuple(origins), metavar="ORIGIN",
        help="a web page's origin that may call the API from a browser, such as https://chat.example.com, or *; repeat "
        "it for more; in the variable put spaces between (default: none)",
    )  # fmt: skip
    flag(network, "port", _port, API_PORT, "of the HTTP API")
    or_free = "on one machine, where that is taken, a free one"
    flag(network, "bus-port", _port, None, f"between the engine and its ranks; default: {BUS_PORT}, or, {or_free}")
    flag(network, "status-port", _port, None, "of the supervisor's /healthz and /status; default: "
         f"{STATUS_PORT}, or, {or_free}")  # fmt: skip
    flag(network, "grace-seconds", _seconds, 30.0, "for running requests after SIGTERM")
    flag(network, "lame-duck-seconds", _seconds, 0.0, "new requests are still taken for so long after SIGTERM")

    pod = serve.add_argument_group("identity (set by the operator)")
    flag(pod, "model-name", str, "local", "the TensorParallelModel's name")
    flag(pod, "group", _index, 0, "the group's number")
    flag(pod, "spec-revision", str, "", "the rollout revision")
    flag(pod, "pod-index", _index, 0, "this pod's number; 0 is the leader")
    flag(pod, "pod", str, socket.gethostname(), "this pod's name")
    flag(pod, "node", str, socket.gethostname(), "this node's name")
    flag(pod, "leader", str, None, "host name of pod 0; default: this machine")


def config_from(options: argparse.Namespace) -> ServeConfig:
    """The configuration that the options ask for.

    Raises:
        UsageError: the options contradict each other.
    """
    ranks_per_pod = options.ranks_per_pod or options.tensor_parallel_size
    if options.tensor_parallel_size % ranks_per_pod:
        raise UsageError(
            f"--ranks-per-pod {ranks_per_pod} does not divide --tensor-parallel-size {options.tensor_parallel_size}"
        )
    if options.backend == "nccl" and options.device == "cpu":
        raise UsageError("--backend nccl computes on GPUs: leave out --device cpu, or choose --backend gloo")
    pods = options.tensor_parallel_size // ranks_per_pod
    if options.pod_index >= pods:
        raise UsageError(f"--pod-index {options.pod_index}: a group of {pods} pods has the indexes 0 to {pods - 1}")
    return ServeConfig(
        model=options.model,
        model_revision=options.revision,
        download_dir=options.download_dir,
        served_name=options.served_name or options.model.rstrip("/").rsplit("/", 1)[-1],
        model_name=options.model_name,
        group=options.group,
        spec_revision=options.spec_revision,
        tensor_parallel_size=options.tensor_parallel_size,
        ranks_per_pod=ranks_per_pod,
        pod_index=options.pod_index,
        pod=options.pod,
        node=options.node,
        leader=options.leader or loopback(),
        dtype=options.dtype,
        backend=options.backend,
        device=options.device,
        threads_per_rank=options.threads_per_rank,
        limits=EngineLimits(
            max_model_len=options.max_model_len,
            max_sequences=options.max_sequences,
            max_batch_tokens=options.max_batch_tokens,
            kv_cache_bytes=options.kv_cache_memory,
            max_waiting=options.max_waiting,
        ),
        watchdog=Watchdog(
            step_timeout=options.step_timeout, floor=options.watchdog_floor, factor=options.watchdog_factor
        ),
        recovery_strategy=options.recovery_strategy,
        weight_cache=options.weight_cache,
        allow_faults=options.allow_faults,
        host=options.host,
        cors_allow_origins=options.cors_allow_origin,
        api_port=options.port,
        bus_port=options.bus_port or BUS_PORT,
        status_port=options.status_port or STATUS_PORT,
        grace_seconds=options.grace_seconds,
        lame_duck_seconds=options.lame_duck_seconds,
    )


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


@dataclass(frozen=True, slots=True)
class Ports:
    """`status`: the sockets of the status port, bound. `kept`: what keeps the engine's ports from others."""

    config: ServeConfig  # with the ports as they are
    status: list[socket.socket]
    kept: list[socket.socket]


def open_ports(config: ServeConfig, *, may_choose: Collection[str] = ()) -> Ports:
    """Bind the status port; try the engine's, so that a mistake shows at once.

    `may_choose`: fields of the configuration (`bus_port`, `status_port`) that may become another port where theirs is
    taken: nobody named it, and nobody on another machine must know it.

    Raises:
        UsageError: a port is taken.
    """
    kept: list[socket.socket] = []
    if config.is_leader:
        for one in _bind(config.host, config.api_port, "--port"):
            one.close()
        if "bus_port" in may_choose:
            port, kept = _bind_some(config.host, config.bus_port, "--bus-port")
            config = msgspec.structs.replace(config, bus_port=port)
        else:
            for one in _bind(config.host, config.bus_port, "--bus-port"):
                one.close()
    if "status_port" in may_choose:
        port, status = _bind_some(config.host, config.status_port, "--status-port")
        return Ports(msgspec.structs.replace(config, status_port=port), status, kept)
    return Ports(config, _bind(config.host, config.status_port, "--status-port"), kept)


def _bind(host: str, port: int, flag: str) -> list[socket.socket]:
    try:
        return listen(host, port)
    except OSError as error:
        raise UsageError(f"{error.strerror}; choose another with {flag}") from error


def _bind_some(host: str, preferred: int, flag: str) -> tuple[int, list[socket.socket]]:
    try:
        return listen_somewhere(host, preferred)
    except OSError as error:
        raise UsageError(f"{error.strerror}; choose a port with {flag}") from error


def unnamed_ports(options: argparse.Namespace, config: ServeConfig) -> list[str]:
    """The ports that may be chosen: in a group of several pods the others must know them."""
    return [name for name in ("bus_port", "status_port") if getattr(options, name) is None and config.pods == 1]


async def _supervise(ports: Ports, token: str) -> int:
    from lockstep_runtime.supervisor.run import Supervisor

    return await Supervisor(ports.config, token).run(ports.status)


def check_faults(config: ServeConfig, environment: Mapping[str, str]) -> None:
    """
    Raises:
        UsageError: a fault is asked for in words that mean none, or one that can't happen here.
    """
    if config.allow_faults and (once := environment.get(pending.ONCE_VARIABLE)):
        try:
            fault = pending.parse_once(once)
        except ValueError as error:
            raise UsageError(str(error)) from None
        if fault.rank in config.ranks and (why_not := pending.why_not(fault)):
            raise UsageError(f"{pending.ONCE_VARIABLE}={once!r}: {why_not}")


def _serve(options: argparse.Namespace) -> int:
    config = accelerator.settle(config_from(options), gpus=accelerator.has_gpus(os.environ))
    check_faults(config, os.environ)
    token = token_for(config, os.environ)
    ports = open_ports(config, may_choose=unnamed_ports(options, config))
    log.configure("supervisor")
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


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The console script; exit code 2 for what the user can mend on the command line."""
    options = build_parser(os.environ).parse_args(arguments)
    try:
        run = {"serve": _serve, "inject": client.run, "report": command.run}[options.command]
        sys.exit(run(options))
    except UsageError as error:
        print(f"lockstep: {error}", file=sys.stderr)
        sys.exit(2)
