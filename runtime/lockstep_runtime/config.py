"""The configuration of a group's processes: one JSON document, from the supervisor to its children.

`lockstep serve` builds a `ServeConfig` from its arguments and `LOCKSTEP_*` variables; children get it in
`LOCKSTEP_CONFIG`. Secrets have variables of their own, so the document can be logged.
"""

from __future__ import annotations

import os
from typing import Final, Literal

import msgspec

from lockstep_runtime.host.addresses import LOOPBACK, reach
from lockstep_runtime.protocol import bus
from lockstep_runtime.protocol.status import API_PORT, BUS_PORT, STATUS_PORT
from lockstep_runtime.protocol.tokens import Purpose, purpose_token

CONFIG_VARIABLE: Final = "LOCKSTEP_CONFIG"
TOKEN_VARIABLE: Final = "LOCKSTEP_TOKEN"  # noqa: S105 - a name, not a secret: the bus and the status endpoint
API_KEY_VARIABLE: Final = "LOCKSTEP_API_KEY"  # clients must send it when it is set
OPERATOR_TOKEN_FILE_VARIABLE: Final = "LOCKSTEP_OPERATOR_TOKEN_FILE"  # noqa: S105 - a name: whom to tell the status
API_KEY_FILE_VARIABLE: Final = "LOCKSTEP_API_KEY_FILE"  # or one of the lines of this file

DType = Literal["auto", "float32", "bfloat16", "float16"]
Backend = Literal["auto", "cpu", "nccl"]
Device = Literal["auto", "cpu", "cuda"]
Strategy = Literal["Ladder", "RecyclePods"]
WeightCache = Literal["Memory", "Off"]
ReasoningParser = Literal["auto", "qwen3", "none"]
ToolCallParser = Literal["auto", "hermes", "qwen3_coder", "llama3_json", "none"]


class UsageError(Exception):
    """The command line can't be executed; the message says what to change."""


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """A hub. None: as huggingface_hub has it."""

    name: str = "huggingface"
    endpoint: str | None = None  # its address
    token_variable: str | None = "HF_TOKEN"  # noqa: S105 - a name; only the supervisor's environment has it
    token_file: str | None = None  # goes before the variable, and is read again for every attempt
    cache: str | None = None  # the folder in which its models are kept


class EngineLimits(msgspec.Struct, frozen=True, kw_only=True):
    """None means: derived from the model and the memory there is."""

    max_model_len: int | None = None  # tokens, prompt and answer together
    max_sequences: int = 64  # running at once
    max_batch_tokens: int = 2048  # in one step: the chunk of a chunked prefill
    kv_cache_bytes: int | None = None  # per rank
    prefix_caching: bool = True  # what stands in the KV cache of a prompt's beginning is not computed again
    max_waiting: int = 1024  # requests queued before new ones are turned away with 503


class Vision(msgspec.Struct, frozen=True, kw_only=True):
    """Images of requests. None: the model's own bounds; both are clamped to its position embeddings."""

    max_pixels: int | None = None  # that an image is resized to at most
    min_pixels: int | None = None
    image_hosts: tuple[str, ...] = ()  # from which images are fetched; others must come as data URIs


class Watchdog(msgspec.Struct, frozen=True, kw_only=True):
    """How long a step may take. None learns it from the steps before; a number of seconds is taken as it is."""

    step_timeout: float | None = None
    floor: float = 2.0  # seconds: the shortest deadline that is learned
    factor: float = 5.0  # of the expected time


class ServeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One group, as every process of it sees it."""

    model: str  # a directory, or a hub id such as Qwen/Qwen3-8B
    source: Source = Source()  # of a hub id
    model_revision: str | None = None  # of a hub id
    model_commit: str | None = None  # what the revision is, where that is decided already
    download_dir: str | None = None  # where hub models are kept, whatever the source says
    served_name: str  # what clients call it
    model_name: str = "local"  # the TensorParallelModel's name
    group: int = 0
    spec_revision: str = ""

    tensor_parallel_size: int = 1
    ranks_per_pod: int = 1  # divides tensor_parallel_size; `lockstep serve` on one machine: all of them
    pod_index: int = 0
    pod: str = "local"
    node: str = "local"
    leader: str = "127.0.0.1"  # host name of pod 0

    dtype: DType = "auto"
    backend: Backend = "auto"  # auto: nccl with cuda, else cpu (shared memory within one pod, TCP between pods)
    device: Device = "auto"  # auto: see `accelerator.settle`; cuda with the backend cpu lets ranks share a GPU
    threads_per_rank: int | None = None  # CPU threads; None: the cores there are, divided by the pod's ranks
    limits: EngineLimits = EngineLimits()
    vision: Vision = Vision()
    reasoning_parser: ReasoningParser = "auto"  # auto: qwen3 where the tokenizer has its markers, else none
    tool_call_parser: ToolCallParser = "auto"  # auto: of the format that the chat template writes calls in

    watchdog: Watchdog = Watchdog()
    recovery_strategy: Strategy = "Ladder"  # RecyclePods: abort, report Poisoned, and leave the rest to the operator
    weight_cache: WeightCache = "Memory"
    allow_faults: bool = False  # `lockstep inject` works

    host: str = LOOPBACK  # of every listener of this pod; pods set it to `::`, every address of both families
    cors_allow_origins: tuple[str, ...] = ()  # pages of these may call the API from a browser; "*": all
    api_port: int = API_PORT
    bus_port: int = BUS_PORT
    status_port: int = STATUS_PORT
    grace_seconds: float = 30.0  # for running requests after SIGTERM
    lame_duck_seconds: float = 0.0  # new requests are still taken for so long after SIGTERM, while endpoints update

    @property
    def pods(self) -> int:
        return self.tensor_parallel_size // self.ranks_per_pod

    @property
    def ranks(self) -> range:
        """The ranks of this pod."""
        return range(self.pod_index * self.ranks_per_pod, (self.pod_index + 1) * self.ranks_per_pod)

    @property
    def is_leader(self) -> bool:
        return self.pod_index == 0


def bus_address(config: ServeConfig) -> tuple[str, int]:
    """Where this pod's processes find the bus: the leader's own ones need no name service for it."""
    if not config.is_leader:
        return config.leader, config.bus_port
    return reach(config.host), config.bus_port


def hello(config: ServeConfig, token: str, role: bus.Role, incarnation: str) -> bus.Hello:
    """The Hello of this process to the engine."""
    return bus.Hello(
        protocol=bus.PROTOCOL,
        token=purpose_token(token, Purpose.BUS),
        role=role,
        group=config.group,
        pod_index=config.pod_index,
        pod=config.pod,
        node=config.node,
        pid=os.getpid(),
        incarnation=incarnation,
    )
