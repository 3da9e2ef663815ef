"""The messages between Lockstep's processes, and nothing else: no torch, no I/O.

Two carriers use them:

- the *bus*: one TCP connection from every worker and every supervisor to the engine. A frame is a 4-byte big-endian
  length and that many bytes of msgpack. Until a peer has proved itself with `Hello`, frames are bounded by
  `MAX_HELLO_BYTES`, after that by `MAX_FRAME_BYTES`. Never pickle.
- the *status endpoint*: `GET /status?after=<revision>` on a supervisor, JSON, read by the operator.

Every message after the handshake carries the group's epoch where it could be stale; what comes from an older epoch, or
from an incarnation that has been replaced, is dropped by the receiver.
"""

from __future__ import annotations

import enum
from typing import Final

import msgspec

PROTOCOL: Final = 1
MAX_HELLO_BYTES: Final = 4 * 1024
MAX_FRAME_BYTES: Final = 64 * 1024 * 1024

API_PORT: Final = 8000
BUS_PORT: Final = 7400
STATUS_PORT: Final = 7401


class Fault(enum.StrEnum):
    """The seven ways a step fails: one vocabulary for code, logs, status, metrics and docs."""

    STEP_FAILED = "StepFailed"
    HANG = "Hang"
    RANK_LOST = "RankLost"
    CONTEXT_FAULT = "ContextFault"
    DESYNC = "Desync"
    CORRUPTION = "Corruption"
    NON_FINITE = "NonFinite"


class RankState(enum.StrEnum):
    """Where one rank stands."""

    ABSENT = "Absent"  # no process has reported yet, or it is gone
    STARTING = "Starting"  # its process runs and has not begun to load
    LOADING = "Loading"  # reading its slice of the weights
    LOADED = "Loaded"  # weights in place, not (or no longer) part of a communicator
    READY = "Ready"  # joined the communicator of the group's epoch
    FAILED = "Failed"  # could not load; `RankStatus.message` has its own words


class GroupState(enum.StrEnum):
    """Where the group stands, as its engine sees it."""

    STARTING = "Starting"  # waiting for its ranks
    LOADING = "Loading"
    READY = "Ready"
    RECOVERING = "Recovering"  # a rank failed; requests wait and will be resumed
    FAILED = "Failed"  # the model can't be loaded; it is tried again
    DRAINING = "Draining"
    POISONED = "Poisoned"  # can't serve and can't heal itself


# --- sampling and the step -------------------------------------------------------------------------------------------


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How one sequence's next token is drawn. Draws are keyed by (seed, position), never by history or batch."""

    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # in (0, 1]
    top_k: int = 0  # 0 is off
    min_p: float = 0.0  # in [0, 1]
    seed: int = 0  # 64 bits, unsigned
    logprobs: int = -1  # -1: none; 0: the drawn token's; k: also those of the k likeliest, and of the drawn one
    prompt_logprobs: int = -1  # the same of every token of the prompt but the first, which follows nothing


class Scoring(msgspec.Struct, frozen=True, kw_only=True):
    """Known tokens whose log probabilities are wanted: `targets[i]` follows the slice's token `first` + i."""

    first: int
    targets: list[int]
    logprobs: int  # as in `SamplingParams`, 0 or more


class SequenceSlice(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence's part of a step: feed `tokens` at `position`; with `sample` set, draw a token after the last."""

    sequence_id: int
    position: int  # of tokens[0] in the sequence
    tokens: list[int]
    blocks: list[int]  # the sequence's whole block table: covers position + len(tokens)
    sample: SamplingParams | None = None
    scoring: Scoring | None = None


class SampledToken(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What rank 0 drew for one sequence. Log probabilities are of the unmodified distribution, natural log."""

    sequence_id: int
    token: int
    logprob: float | None = None
    top: list[tuple[int, float]] = []


# --- bus: handshake --------------------------------------------------------------------------------------------------


class Role(enum.StrEnum):
    WORKER = "worker"
    SUPERVISOR = "supervisor"


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """First frame of every connection."""

    protocol: int
    token: str  # the model's; compared in constant time
    role: Role
    group: int
    pod_index: int
    pod: str
    node: str
    pid: int
    incarnation: str  # random, per process
    epoch: int = 0  # the highest this process has seen, so that a new leader starts above it
    rank: int = -1  # workers only


class Welcome(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    epoch: int


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The engine closes after sending it. `retry` says whether trying again can help."""

    reason: str
    retry: bool


# --- faults on purpose ----------------------------------------------------------------------------------------------


class Injection(enum.StrEnum):
    """What can be done to a rank, where the group was started with `--allow-faults`."""

    RAISE = "raise"
    HANG = "hang"
    SIGKILL = "sigkill"
    SIGSTOP = "sigstop"
    SIGSEGV = "sigsegv"  # a real one: the process reads address 0
    EXIT = "exit"  # with code 1
    MEMORY = "memory"  # a real allocation that fails, under a lowered limit
    NAN = "nan"  # in this rank's part of a sum
    INPUT = "input"  # this rank gets another token than the others
    ACTIVATION = "activation"  # this rank alters the result of a sum
    FLIP_BIT = "flip-bit"  # in this rank's weights
    SLOW = "slow"
    CLOSE_BUS = "close-bus"
    DEVICE_ASSERT = "device-assert"  # a real one, on this rank's GPU
    ILLEGAL_ACCESS = "illegal-access"  # the same: a kernel reads where there is no memory


class Phase(enum.StrEnum):
    """When an injected fault acts."""

    NOW = "now"  # at once where that needs no step, else in the next one
    IDLE = "idle"  # between two commands
    PREFILL = "prefill"  # in a step that feeds more than one token of a sequence
    DECODE = "decode"  # in a step that does not
    JOINING = "joining"  # while a communicator is made: another recovery is under way
    LOADING = "loading"  # when the rank's next process loads


class Moment(enum.StrEnum):
    """Where in a step, seen from a collective."""

    BEFORE = "before"
    INSIDE = "inside"  # entered, and left only by an abort
    AFTER = "after"


class Inject(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Do this to a rank, once. From `POST /inject` by way of supervisor and engine to the worker."""

    rank: int
    kind: Injection
    phase: Phase = Phase.NOW
    at: Moment = Moment.BEFORE
    place: str = ""  # part of the name of a collective's place, such as layers.2.mlp; empty: the step's first
    skip: int = 0  # steps of that phase that pass unharmed first
    seconds: float = 0.1  # SLOW: longer each step
    times: int = 1  # SLOW: so many steps
    number: int = 0  # FLIP_BIT: which


# --- bus: engine -> worker -------------------------------------------------------------------------------------------


class Rendezvous(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """To rank 0: open a meeting place for this epoch. Answered by `RendezvousOpened`."""

    epoch: int


class Join(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """To every rank: make the communicator of this epoch and prove it (an all-reduce of ones). Answered by `Joined`."""

    epoch: int
    address: str  # as `RendezvousOpened.address`


class AllocateCache(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """To every rank: have a KV cache of this many blocks (the least that any rank offered), the one there is if it is
    of that size, and fill the last block as always: it is the probe's. Answered by `CacheAllocated`.

    `doubted`: sequences whose contexts may hold a NaN or an infinity, each with its last computed token. A cache in
    which one stands is laid out anew."""

    epoch: int
    blocks: int
    doubted: list[SequenceSlice] = []


class Step(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The same to every rank. Answered by `StepDone` or `StepFailed`."""

    epoch: int
    step: int
    sequences: list[SequenceSlice]


class Abort(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Leave any collective at once and drop the communicator of every epoch below this; weights stay."""

    epoch: int


class Scrub(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """To every rank: compare all of your weights with the checksums of loading now. Answered by `Scrubbed`, or by
    `StepFailed` with `Corruption`."""

    epoch: int


class Shutdown(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    reason: str


# --- bus: worker -> engine -------------------------------------------------------------------------------------------


class LoadProgress(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Of the weights; 0 of 0 before their size is known."""

    bytes_done: int
    bytes_total: int
    bytes_moved: int = 0  # read and written by the process so far, a download included: that it gets further


class Loaded(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Weights in place. `cache_blocks` is how many KV blocks this rank has room for."""

    seconds: float
    weight_bytes: int  # this rank's slice
    read_bytes: int  # read from storage to get it
    cache_blocks: int
    block_size: int  # tokens
    memory_bytes: int  # resident (CPU) or device memory in use


class LoadFailure(enum.StrEnum):
    """Whether loading again can help."""

    TRANSIENT = "transient"  # it may: the network, memory, a disk
    PERMANENT = "permanent"  # not before the model, the settings or Lockstep itself are mended
    DEVICE_LOST = "device-lost"  # not on this pod: its device is gone or unusable


class LoadFailed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """In the worker's own words. The worker ends after sending it and is started again with growing delays."""

    message: str
    kind: LoadFailure = LoadFailure.TRANSIENT


class RendezvousOpened(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    epoch: int
    address: str  # tcp://host:port or shm://path


class Joined(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    epoch: int
    seconds: float


class CacheAllocated(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """`contents` is another name for every cache that is laid out anew: under the same one stands what was written.

    A rank that has no room for as many blocks as were asked for lays out nothing and says in `blocks` how many it has
    room for.
    """

    epoch: int
    contents: str
    blocks: int
    memory_bytes: int
    spoiled: bool = False  # what was doubted was no number


class StepDone(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    epoch: int
    step: int
    seconds: float  # the forward, as this rank saw it
    fingerprint: int  # of what went in and of the last hidden states: equal on every rank
    sampled: list[SampledToken] = []  # rank 0 only
    scored: list[SampledToken] = []  # rank 0 only: every slice's targets, in their order


class StepFailed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The step (or joining, or allocating: `step` is then -1) raised on this rank.

    `untouched`: before any collective, so that a step that fails so on every rank has harmed nothing but itself.
    """

    epoch: int
    step: int
    fault: Fault
    message: str
    untouched: bool = False


class Scrubbed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Every weight of this rank is what was loaded; `tensors` were compared, 0 where none are watched."""

    epoch: int
    tensors: int


class Aborted(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Answer to `Abort`: this rank's compute thread is idle again, weights kept."""

    epoch: int
    seconds: float


# --- bus: supervisor <-> engine --------------------------------------------------------------------------------------


class ProcessExited(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A worker process ended. Exactly one of `exit_code` and `signal` is set.

    `oom`: the kernel killed it for want of memory; with the limit and what was used. Empty: it did not.
    """

    rank: int
    pid: int
    incarnation: str
    exit_code: int | None = None
    signal: int | None = None
    oom: str = ""


class ProcessStopped(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A worker process was stopped (SIGSTOP and the like) and has not gone on since."""

    rank: int
    pid: int
    incarnation: str
    signal: int


class ReadProgress(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """To a supervisor: read the progress records of your workers now. Answered by `ProgressReport`."""

    asked: int  # comes back with the answer


class ProgressRecord(msgspec.Struct, frozen=True, kw_only=True):
    """How far one worker has come, by its own record, read without asking it."""

    rank: int
    incarnation: str
    epoch: int
    step: int
    in_step: bool
    collective: int  # of the step, counted from 1; 0 before the first
    inside: bool  # has entered it and not left it
    place: str  # the module that called it; empty where none said so
    awaited: int | None = None  # the rank without which it can't leave the collective, where that is known
    age: float  # seconds since the record last changed
    starved: float = 0.0  # of these, how many the process was ready to run and got no CPU


class ProgressReport(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    asked: int
    records: list[ProgressRecord]


class PodProblemReason(enum.StrEnum):
    OUT_OF_MEMORY = "OutOfMemory"  # the kernel killed a process of the pod for want of memory
    SPAWN_FAILED = "SpawnFailed"  # the kernel refused to start a process


class PodProblem(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What keeps a pod's processes from starting or staying; told until it has not happened for a minute."""

    pod_index: int
    reason: PodProblemReason
    message: str  # a sentence: which process, the limit and what was used
    at: float  # unix seconds, of the last time


class PodReport(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """All that a pod's supervisor has to complain of now, at most one for each reason: replaces what it said before."""

    problems: list[PodProblem]


class Leaving(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """This pod was asked to end; it waits for `Release`, or `grace_seconds` at most."""

    grace_seconds: float


class KillWorker(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """To the supervisor of the rank's pod: SIGKILL this incarnation (another is left alone) and start a new one.

    `reload`: from the weight cache, or the checkpoint, and nothing that has been loaded before.
    """

    rank: int
    incarnation: str
    reason: str
    reload: bool = True


class Release(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Nothing needs this pod any longer."""


class StatusReport(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """To the leader's own supervisor, which serves it."""

    status: GroupStatus


# --- status ----------------------------------------------------------------------------------------------------------


class Latency(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Step latency over the last steps, in milliseconds; None before the first."""

    p50_ms: float | None = None
    p99_ms: float | None = None


class RankStatus(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    rank: int
    pod_index: int
    state: RankState = RankState.ABSENT
    pod: str = ""
    node: str = ""
    pid: int = 0
    incarnation: str = ""
    epoch: int = 0
    respawns: int = 0
    last_step: int = -1
    last_step_at: float | None = None  # unix seconds
    step_latency: Latency = Latency()
    memory_bytes: int = 0
    load_bytes_done: int = 0
    load_bytes_total: int = 0
    message: str = ""


class FaultRecord(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One fault and what became of it. `id` rises by one with every fault of the group and never repeats."""

    id: int
    fault: Fault
    rank: int | None
    message: str
    at: float  # unix seconds, when noticed
    epoch: int  # before the repair
    rung: str = ""  # Drop, Rebuild, Respawn; empty while under way
    recovered_at: float | None = None
    phases: dict[str, float] = {}  # seconds of: detect, abort, respawn, rebuild, verify, firstToken
    requests_resumed: int = 0


class GroupStatus(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What a group says of itself. `revision` rises with every change; the same revision is the same status."""

    model: str
    group: int
    incarnation: str  # of the supervisor that serves this: a new one starts counting revisions anew
    revision: int = 0
    spec_revision: str = ""  # the rollout revision that its pods were made for
    epoch: int = 0
    state: GroupState = GroupState.STARTING
    message: str = ""  # a sentence a person can act on
    since: float = 0.0  # unix seconds, when `state` began
    # Whether requests are taken: while the group serves, and for a bounded time while it recovers (they wait). The
    # readiness of the leader pod. None: a runtime older than this field.
    accepting: bool | None = None
    # Of a group that is `Failed`: whether it may pass by itself (a hub that is away, memory, a disk). None: a runtime
    # older than this field.
    may_pass: bool | None = None
    ranks: list[RankStatus] = []
    step_latency: Latency = Latency()
    last_step_at: float | None = None
    requests_running: int = 0
    requests_waiting: int = 0
    recoveries: int = 0
    faults: list[FaultRecord] = []  # the newest 32
    pod_problems: list[PodProblem] = []  # at most two for each pod


ToWorker = Welcome | Refused | Rendezvous | Join | AllocateCache | Step | Scrub | Abort | Shutdown | Inject
FromWorker = (
    LoadProgress | Loaded | LoadFailed | RendezvousOpened | Joined | CacheAllocated | StepDone | StepFailed | Scrubbed
    | Aborted
)  # fmt: skip
ToSupervisor = Welcome | Refused | KillWorker | Release | StatusReport | ReadProgress | Inject
FromSupervisor = ProcessExited | ProcessStopped | PodReport | Leaving | ProgressReport | Inject
