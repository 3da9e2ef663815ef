"""A coordinator with ranks that answer as they are told: no loop, no clock but its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from lockstep_runtime.config import ServeConfig
from lockstep_runtime.protocol import bus
from lockstep_runtime.protocol.status import Fault, GroupState
from lockstep_runtime.recovery import actions, events
from lockstep_runtime.recovery.actions import Action
from lockstep_runtime.recovery.coordinator import Coordinator
from lockstep_runtime.recovery.diagnosis import Evidence
from lockstep_runtime.recovery.group_state import group_state
from lockstep_runtime.recovery.stage import Stage
from lockstep_runtime.recovery.timing import HOST, Backend, Timing

_T = TypeVar("_T")


@dataclass
class GroupLife:
    """`offers`: blocks of cache that each rank has room for. `print`: what the probe gives."""

    ranks: int = 2
    backend: Backend = HOST
    recovery_strategy: str = "Ladder"
    model_known: bool = True
    now: float = 100.0
    fingerprint: int = 7
    tensors: int = 5
    fails_at_once: bool = True
    offers: dict[int, int] = field(default_factory=dict)
    done: list[Action] = field(default_factory=list)
    processes: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config = ServeConfig(
            model="toy", served_name="toy", tensor_parallel_size=self.ranks,
            recovery_strategy="RecyclePods" if self.recovery_strategy == "RecyclePods" else "Ladder",
        )  # fmt: skip
        self.group = Coordinator(config, Timing(self.backend, None), 0)
        self._do(self.group.start(self.now))
        if self.model_known:
            self.tell(events.ModelRead())

    # --- what happens

    def tell(self, event: events.Event) -> list[Action]:
        """What is held against the epoch fails what is under way, as `RankRpc` has it."""
        found = self._do(self.group.handle(event, self.now))
        accused = [one.evidence for one in found if isinstance(one, actions.Accuse)]
        if accused and self.fails_at_once:
            self.tell(events.GroupFault(accused[0], tuple(accused), steps=int(self.group.stage is Stage.SERVING)))
        return found

    def _do(self, found: list[Action]) -> list[Action]:
        self.done += found
        return found

    def wait(self, seconds: float) -> list[Action]:
        """Let time pass, deadline by deadline."""
        until, found, at_once = self.now + seconds, list[Action](), 0
        while (due := self.group.next_deadline()) is not None and due <= until:
            assert due >= self.now, "a deadline lies in the past"
            at_once = at_once + 1 if due == self.now else 0
            assert at_once < 5, "a deadline that nothing comes of"
            self.now = due
            found += self._do(self.group.tick(self.now))
        self.now = until
        return found

    def hello(self, rank: int, process: int, role: bus.Role = bus.Role.WORKER) -> bus.Hello:
        return bus.Hello(
            protocol=1, token="", role=role, group=0, pod_index=rank, pod=f"pod-{rank}", node="n", pid=10 + rank,
            incarnation=self.name(rank, process), rank=rank,
        )  # fmt: skip

    @staticmethod
    def name(rank: int, process: int) -> str:
        return f"{rank}.{process}"

    def pod(self, rank: int, incarnation: str = "s") -> list[Action]:
        return self.tell(events.PodConnected(rank, incarnation))

    def connect(self, rank: int, *, new: bool = True) -> list[Action]:
        self.processes[rank] = self.processes.get(rank, 0) + (1 if new else 0)
        return self.tell(events.RankConnected(self.hello(rank, self.processes[rank])))

    def loaded(self, rank: int, seconds: float = 1.0) -> list[Action]:
        report = bus.Loaded(
            seconds=seconds, weight_bytes=10, read_bytes=10, cache_blocks=self.offers.get(rank, 40), block_size=4,
            memory_bytes=5,
        )  # fmt: skip
        return self.tell(events.RankReported(rank, report))

    def left(self, rank: int) -> list[Action]:
        return self.tell(events.RankReported(rank, bus.Aborted(epoch=self.group.epoch, seconds=0.0)))

    def exit(self, rank: int, how: str = "was killed by SIGKILL") -> list[Action]:
        return self.tell(events.RankExited(rank, self.name(rank, self.processes[rank]), 10 + rank, how))

    def fails(self, cause: Evidence, *, steps: int = 1, by_request: bool = False) -> list[Action]:
        return self.tell(events.GroupFault(cause, (cause,), by_request=by_request, steps=steps))

    # --- a group that answers rightly

    def gather(self) -> None:
        """Every rank is there and loaded."""
        for rank in range(self.ranks):
            self.pod(rank)
            self.connect(rank)
            self.loaded(rank)

    def answer(self, action: Action) -> Mapping[int, events.Answer]:
        """What the ranks answer to a call."""
        epoch, everyone = self.group.epoch, range(self.ranks)
        match action:
            case actions.Ask(message=bus.Rendezvous()):
                return {0: bus.RendezvousOpened(epoch=epoch, address="shm:///x")}
            case actions.Ask(message=bus.Join()):
                return {rank: bus.Joined(epoch=epoch, seconds=0.1) for rank in everyone}
            case actions.Ask():
                return {rank: bus.Scrubbed(epoch=epoch, tensors=self.tensors) for rank in everyone}
            case actions.AllocateCaches():
                return {rank: self.cache(rank, action.blocks) for rank in everyone}
            case _:
                return {0: bus.StepDone(epoch=epoch, step=1, seconds=0.1, fingerprint=self.fingerprint)}

    def cache(self, rank: int, blocks: int) -> bus.CacheAllocated:
        has = min(blocks, self.offers.get(rank, 40))
        name = f"{self.name(rank, self.processes[rank])}/{has}"
        return bus.CacheAllocated(epoch=self.group.epoch, cache_id=name, blocks=has, memory_bytes=9)

    def call(self) -> Action | None:
        """The last call, if nobody has answered it."""
        calls = actions.Ask | actions.AllocateCaches | actions.RunStep
        return next((one for one in reversed(self.done) if isinstance(one, calls)), None)

    def exit_after_answering(self, rank: int) -> None:
        """Every rank answers the last call, and then this one's process ends before the engine has all the answers."""
        call = self.call()
        assert call is not None
        answers = self.answer(call)
        self.exit(rank)
        self.tell(events.CallDone(answers))

    def proceed(self, limit: int = 12) -> None:
        """Answer call after call until there is none."""
        for _ in range(limit):
            if self.group.stage is not Stage.ASSEMBLING or (call := self.call()) is None:
                return
            self.done = [one for one in self.done if one is not call]
            self.tell(events.CallDone(self.answer(call)))

    def serve(self) -> None:
        self.gather()
        self.proceed()
        assert self.group.stage is Stage.SERVING

    def of(self, kind: type[_T]) -> list[_T]:
        return [one for one in self.done if isinstance(one, kind)]


def lost(rank: int) -> Evidence:
    return Evidence(Fault.RANK_LOST, rank, f"rank {rank} is gone")


HUNG = Evidence(Fault.HANG, 1, "rank 1 stopped", stragglers=(1,))
FAILED = Evidence(Fault.STEP_FAILED, 1, "rank 1: out of memory")


def stage(life: GroupLife) -> Stage:
    return life.group.stage


def state(life: GroupLife) -> tuple[GroupState, str]:
    return group_state(life.group, life.now, draining=False, blocker="")


def broken(cause: Evidence = FAILED, **settings: object) -> GroupLife:
    """One that served, and whose ranks are to leave their collectives now."""
    life = GroupLife(**settings)  # type: ignore[arg-type] # a test's own settings
    life.serve()
    life.done.clear()
    life.fails(cause)
    return life
