"""From ranks that are loaded and idle to a group that is proved: one attempt after the other. Pure.

    OPENING the rendezvous → JOINING → ALLOCATING the caches → TESTING → SCRUBBING, where the test is in doubt → WARMING

Each step is one call to the ranks, whose deadline ends it; what fails there is a fault, and this attempt is over.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import cast

from lockstep_runtime.protocol import bus
from lockstep_runtime.protocol.step import PROBE_STATE_SLOTS
from lockstep_runtime.recovery import actions
from lockstep_runtime.recovery.actions import Action
from lockstep_runtime.recovery.cache_plan import CachePlan
from lockstep_runtime.recovery.events import Answer
from lockstep_runtime.recovery.log_trail import TrailPhase
from lockstep_runtime.recovery.rank_handle import RankHandle
from lockstep_runtime.recovery.self_test import PROBE_BLOCKS, probe, warmup_step
from lockstep_runtime.recovery.timing import ALLOCATE, RENDEZVOUS, SCRUB, Timing
from lockstep_runtime.recovery.verification import Verdict, Verification


class Step(enum.StrEnum):
    """Where an attempt stands."""

    OPENING = "opening"  # rank 0 opens the rendezvous
    JOINING = "joining"
    ALLOCATING = "allocating"
    TESTING = "testing"  # the probe
    SCRUBBING = "scrubbing"  # the probe differs every time: are the weights what was loaded?
    WARMING = "warming"  # a first prefill
    DONE = "done"
    WRONG = "wrong"  # the proof fails: `wrong` says how


class Assembly:
    """Of one group, over all its attempts. `unverified`: the caches may hold garbage."""

    def __init__(self, handles: Sequence[RankHandle], timing: Timing) -> None:
        self.step = Step.OPENING
        self.unverified = False
        self.has_joined = False  # in this attempt, whatever became of it
        self.cache_ids: tuple[str, ...] = ()  # of the caches, by rank
        self.phases: dict[str, float] = {}  # seconds
        self.retry_at: float | None = None  # to ask again for caches
        self._handles, self._timing = handles, timing
        self._caches = CachePlan()
        self._verification = Verification()
        self._epoch = 0
        self._begun = 0.0
        self._tested_at = 0.0  # when the test began
        self._is_first = True
        self._processes: list[str] = []

    @property
    def blocks(self) -> int:
        """Of each rank's cache, for requests."""
        return self._caches.blocks - PROBE_BLOCKS

    @property
    def state_slots(self) -> int:
        """The same."""
        return max(0, self._caches.state_slots - PROBE_STATE_SLOTS)

    @property
    def wrong(self) -> str:
        """How the proof fails."""
        return self._verification.message

    def forget_room(self) -> None:
        """Forget the agreed number of blocks: there may be permanently less room."""
        self._caches.forget()

    def begin(self, epoch: int, now: float, *, processes: Sequence[str], is_first: bool) -> list[Action]:
        """Every rank is loaded and idle in this epoch. `processes`: with which the group served before."""
        self._epoch, self._begun, self._is_first, self._processes = epoch, now, is_first, list(processes)
        self.has_joined, self.retry_at, self.phases = False, None, {}
        self.step = Step.OPENING
        return [actions.Ask(bus.Rendezvous(epoch=epoch), bus.RendezvousOpened, RENDEZVOUS, ranks=(0,))]

    def answered(self, answers: Mapping[int, Answer], now: float) -> list[Action]:
        """Every rank that was asked has answered."""
        match self.step:
            case Step.OPENING:
                opened = cast("bus.RendezvousOpened", answers[0])
                self.step = Step.JOINING
                join = bus.Join(epoch=self._epoch, address=opened.address)
                return [actions.Ask(join, bus.Joined, self._timing.backend.join)]
            case Step.JOINING:
                loaded = [one.loaded for one in self._handles if one.loaded is not None]
                self._caches.choose([one.cache_blocks for one in loaded], min(one.state_slots for one in loaded), now)
                return self.allocate()
            case Step.ALLOCATING:
                return self._allocated(cast("Mapping[int, bus.CacheAllocated]", answers), now)
            case Step.TESTING:
                probed = cast("bus.StepDone", answers[0])
                return self._judged(self._verification.tested(probed.fingerprint), now)
            case Step.SCRUBBING:
                return self._scrubbed([cast("bus.Scrubbed", one).tensors for one in answers.values()], now)
            case _:
                return self._done(now)

    def allocate(self) -> list[Action]:
        """Have every rank lay out its cache, or look at the one it has."""
        self.step, self.retry_at = Step.ALLOCATING, None
        return [
            actions.AllocateCaches(
                self._epoch, self._caches.blocks, self._caches.state_slots, self.unverified, ALLOCATE
            )
        ]

    def _allocated(self, answers: Mapping[int, bus.CacheAllocated], now: float) -> list[Action]:
        before = self._caches.blocks
        self.retry_at = self._caches.retry_at({rank: one.blocks for rank, one in answers.items()}, now)
        if self.retry_at is None:
            return self._joined(answers, now)
        if self._caches.blocks == before:
            return []
        return [actions.Log(f"a rank has no room for {before} blocks of cache: every rank gets {self._caches.blocks}")]

    def _joined(self, answers: Mapping[int, bus.CacheAllocated], now: float) -> list[Action]:
        self.has_joined, self.unverified = True, False
        for handle in self._handles:
            handle.joined_epoch = self._epoch
            handle.memory_bytes = answers[handle.rank].memory_bytes
        self.cache_ids = tuple(answers[handle.rank].cache_id for handle in self._handles)
        self.phases["rebuild"] = now - self._begun
        message = f"a new communicator, and {self._caches.blocks} blocks of cache on each rank"
        incarnations = [handle.last_incarnation for handle in self._handles]
        self.step, self._tested_at = Step.TESTING, now
        self._verification.begin(incarnations)
        corrupt = [rank for rank, one in answers.items() if one.corrupt]
        return [
            *([actions.AttributeNaN(corrupt[0])] if len(corrupt) == 1 else []),  # all had the same to compute it from
            actions.PhaseOver(TrailPhase.REBUILD, self.phases["rebuild"], message),
            *([actions.ProcessesChanged()] if incarnations != self._processes else []),
            self._probe(),
        ]

    def _probe(self) -> Action:
        return actions.RunStep(tuple(probe(self.blocks, self.state_slots)))

    def _scrubbed(self, tensors: Sequence[int], now: float) -> list[Action]:
        verdict = self._verification.scrubbed(tensors)
        message = f"{self.wrong}; it always is, and the weights are right: accepted"
        return [*([actions.Log(message)] if verdict is Verdict.RIGHT else []), *self._judged(verdict, now)]

    def _judged(self, verdict: Verdict, now: float) -> list[Action]:
        match verdict:
            case Verdict.TEST_AGAIN:
                return [self._probe()]
            case Verdict.SCRUB:
                self.step = Step.SCRUBBING
                return [actions.Ask(bus.Scrub(epoch=self._epoch), bus.Scrubbed, SCRUB)]
            case Verdict.WRONG:
                self.step = Step.WRONG
                return []
            case Verdict.RIGHT if self._is_first:
                self.step = Step.WARMING
                return [actions.RunStep(tuple(warmup_step(self.blocks, self.state_slots)))]
            case Verdict.RIGHT:  # pragma: no branch - there is no other
                return self._done(now)

    def _done(self, now: float) -> list[Action]:
        self.step = Step.DONE
        self.phases["verify"] = seconds = now - self._tested_at
        return [actions.PhaseOver(TrailPhase.VERIFY, seconds, "the all-reduce of ones and the probe are right")]
