"""The messages on the bus, and nothing else: no torch, no I/O.

The bus is one TCP connection from every worker and every supervisor to the engine (`protocol.framing`). Until a peer
has proved itself with `Hello`, frames are bounded by `MAX_HELLO_BYTES`, after that by `MAX_FRAME_BYTES`. Never pickle.

Every message after the handshake carries the group's epoch where it could be stale; what comes from an older epoch, or
from an incarnation that has been replaced, is dropped by the receiver.
"""

from __future__ import annotations

import enum
from typing import Final

import msgspec

from lockstep_runtime.protocol.chaos import Inject
from lockstep_runtime.protocol.status import Download, Fault, GroupStatus, PodProblem
from lockstep_runtime.protocol.step import SampledToken, SequenceSlice

PROTOCOL: Final = 1
MAX_HELLO_BYTES: Final = 4 * 1024
MAX_FRAME_BYTES: Final = 64 * 1024 * 1024
IMAGE_PART_BYTES: Final = 1024 * 1024  # an image travels in frames of this size, so that no other message waits long


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
    """The engine closes after sending it. Trying again can't help."""

    reason: str


# --- bus: engine -> worker -------------------------------------------------------------------------------------------


class Rendezvous(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """To rank 0: open a meeting place for this epoch. Answered by `RendezvousOpened`."""

    epoch: int


class Join(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """To every rank: make the communicator of this epoch and prove it (an all-reduce of ones). Answered by `Joined`."""

    epoch: int
    address: str  # as `RendezvousOpened.address`


class AllocateCache(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """To every rank: allocate a KV cache of this many blocks and state slots (the fewest that any rank offered), or
    keep one of that size, and fill the last ones, which are the probe's. Answered by `CacheAllocated`.

    `unverified`: sequences whose contexts may hold a NaN or an infinity, each with its last computed token. A cache
    that holds one is allocated again."""

    epoch: int
    blocks: int
    state_slots: int = 0
    unverified: list[SequenceSlice] = []


class ImagePart(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """To a rank, before the step that needs it: bytes of an image's pixels from `offset` on. Not answered. A rank keeps
    an image until a step drops it, or the connection ends."""

    digest: str
    height: int
    width: int
    offset: int
    data: bytes


class ImageWork(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a step does with images before its sequences, by digest: forgets `drop` (of what is in both, not the
    pixels), then makes tokens of `encode`, which stay on the ranks until they are dropped or the next epoch begins."""

    drop: list[str] = []
    encode: list[str] = []


NO_IMAGES: Final = ImageWork()


class Step(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The same to every rank. Answered by `StepDone` or `StepFailed`."""

    epoch: int
    step: int
    sequences: list[SequenceSlice]
    images: ImageWork = NO_IMAGES


class Abort(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Leave any collective at once and drop the communicator of every epoch below this; weights stay."""

    epoch: int


class Scrub(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """To every rank: compare all of your weights with the checksums of loading now. Answered by `Scrubbed`, or by
    `StepFailed` with `Corruption`."""

    epoch: int


# --- bus: worker -> engine -------------------------------------------------------------------------------------------


class LoadProgress(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Of the weights; 0 of 0 before their size is known."""

    bytes_done: int
    bytes_total: int
    bytes_moved: int = 0  # read and written by the process so far, a download included: that it gets further
    download: Download | None = None  # by the pod's fetcher, for which it waits


class Loaded(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Weights in place. `cache_blocks` is how many KV blocks this rank has room for, beside `state_slots` for recurrent
    states, of which it needs none if its layers have none."""

    seconds: float
    weight_bytes: int  # this rank's slice
    read_bytes: int  # read from storage to get it
    cache_blocks: int
    block_size: int  # tokens
    memory_bytes: int  # resident (CPU) or device memory in use
    state_slots: int = 0


class LoadFailure(enum.StrEnum):
    """Whether loading again can help."""

    TRANSIENT = "transient"  # it may: the network, memory, a disk
    PERMANENT = "permanent"  # not before the model, the settings or Lockstep itself are mended
    DEVICE_LOST = "device-lost"  # not on this pod: its device is gone or unusable


class LoadFailed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The worker's error. The worker exits after sending it and is restarted with growing delays."""

    message: str
    kind: LoadFailure = LoadFailure.TRANSIENT


class RendezvousOpened(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    epoch: int
    address: str  # tcp://host:port or shm://path


class Joined(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    epoch: int
    seconds: float


class CacheAllocated(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """`cache_id` names the contents of the cache: a newly allocated cache has a new id.

    A rank without room for the requested blocks allocates nothing and sets `blocks` to the number that it has room for.
    """

    epoch: int
    cache_id: str
    blocks: int
    memory_bytes: int
    corrupt: bool = False  # what was doubted was no number


class StepDone(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    epoch: int
    step: int
    seconds: float  # the forward, as this rank saw it
    fingerprint: int  # of what went in and of the last hidden states: equal on every rank
    sampled: list[SampledToken] = []  # rank 0 only
    scored: list[SampledToken] = []  # rank 0 only: every slice's targets, in their order
    put_off: list[int] = []  # rank 0 only: sequences for which it could not draw yet: their slices are to come again
    failures: dict[int, str] = {}  # rank 0 only: sequences for which it can never draw, and why


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


class PodReport(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """All current problems of a pod, at most one per reason; replaces the report before it."""

    problems: list[PodProblem]


class Leaving(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """This pod was asked to end; it waits for `Release`, or `grace_seconds` at most. The group drains before."""

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


class ModelCommit(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The commit of the hub's model that every pod of the group loads, as the leader's fetcher resolved it."""

    commit: str


class StatusReport(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """To the leader's own supervisor, which serves it."""

    status: GroupStatus


class GroupReadiness(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """To the other supervisors: what the readiness of their pods follows.

    `accepting`: whether the group takes requests. `whole`: whether all of its ranks are in step.
    """

    accepting: bool
    whole: bool
    message: str


ToWorker = Welcome | Refused | Rendezvous | Join | AllocateCache | ImagePart | Step | Scrub | Abort | Inject
FromWorker = (
    LoadProgress | Loaded | LoadFailed | RendezvousOpened | Joined | CacheAllocated | StepDone | StepFailed | Scrubbed
    | Aborted
)  # fmt: skip
ToSupervisor = (
    Welcome | Refused | KillWorker | Release | StatusReport | GroupReadiness | ReadProgress | ModelCommit | Inject
)
FromSupervisor = ProcessExited | ProcessStopped | PodReport | Leaving | ProgressReport | Inject
