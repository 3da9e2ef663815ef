"""Forms the group under a new epoch, at the start as after every fault.

`Abort` to all, wait until each rank is loaded and idle, `Rendezvous` at rank 0, `Join`, `AllocateCache`. Whatever
happens to a rank in between raises `GroupFaultError`; the caller decides and forms the group again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from lockstep_runtime import wire
from lockstep_runtime.engine.deadline import Deadline
from lockstep_runtime.engine.group import RankGroup
from lockstep_runtime.engine.probe import PROBE_BLOCKS
from lockstep_runtime.engine.recovery import Evidence
from lockstep_runtime.wire import RankState

RENDEZVOUS: Final = Deadline(15.0, 15.0, extends=False)
JOIN: Final = Deadline(2.5, 60.0, extends=True)  # as long as no rank holds up the others
ALLOCATE: Final = Deadline(120.0, 120.0, extends=False)
ABORT_SECONDS: Final = 1.5  # a rank that has not left its collective by then is killed
ABORT_JOIN_SECONDS: Final = 15.0  # joining can't be interrupted; it ends by itself, sooner than this
RECONNECT_SECONDS: Final = 5.0  # a process whose connection is lost and that does not come back is killed
LOADING_SECONDS: Final = 120.0  # without a byte more
# The same where the model is here already and nothing has to be downloaded first: from and to; in between, as long as
# the whole loading took before, and as long again.
RELOADING_SECONDS: Final = 15.0, 60.0
# Then the group gives up: a rank was out of reach for so long, or no process of it came further than those before it.
ABSENT_SECONDS: Final = 60.0
STUCK_SECONDS: Final = 60.0, 150.0  # from and to; in between, as long as two and a half of its processes may take
FIRST_SECONDS: Final = 300.0  # both, before the group has served: pods are made and models downloaded
DEVICE_LOST: Final = wire.LoadFailure.DEVICE_LOST
LOOK_SECONDS: Final = 0.25  # between two looks for ranks that are stuck, while nothing happens


@dataclass(frozen=True, slots=True)
class Formed:
    """A group that has joined. `phases` are seconds of: abort, respawn, rebuild.

    `contents` names, by rank, what stands in the KV caches: `blocks` blocks for requests, and the probe's behind them.
    `spoiled` are ranks that found garbage in what was doubted there.
    """

    epoch: int
    blocks: int
    block_size: int
    contents: tuple[str, ...]
    spoiled: tuple[int, ...]
    phases: dict[str, float]


class Forming:
    """`step_timeout`: the user's, in seconds. `on_phase` is called with a phase that is over, its seconds and a
    sentence."""

    def __init__(
        self, group: RankGroup, step_timeout: float | None, on_phase: Callable[[str, float, str], None]
    ) -> None:
        self._group, self._members, self._inquiry = group, group.members, group.inquiry
        self._step_timeout = step_timeout
        self._on_phase = on_phase
        self._joined = False  # in this epoch, whatever became of it
        self._has_served = False
        self._longest_load = 0.0  # seconds

    async def form(self, longest_work: float, doubted: list[wire.SequenceSlice]) -> Formed:
        """Make the group, under a new epoch; waits for absent and loading ranks for as long as it takes.

        `longest_work`: seconds that a rank may compute on before it sees that it was aborted. `doubted`: what of the
        caches is looked at before it is used again.

        Raises:
            GroupFaultError: a rank was lost or failed after all were there; try again.
        """
        begun = time.monotonic()
        patience = max(ABORT_SECONDS, longest_work) if self._joined else ABORT_JOIN_SECONDS
        self._joined = False
        self._begin_epoch()
        aborted = await self._gather(patience)
        gathered = time.monotonic()
        self._group.gathering = False
        self._longest_load = max(self._longest_load, *(one.loaded.seconds for one in self._members if one.loaded), 0.0)
        self._on_phase("respawn", gathered - aborted, f"all {len(self._members)} ranks have their weights")
        blocks, block_size, laid_out = await self._join(doubted)
        self._joined = True
        phases = {
            "abort": aborted - begun,
            "respawn": gathered - aborted,
            "rebuild": time.monotonic() - gathered,
        }
        self._on_phase("rebuild", phases["rebuild"], f"a new communicator, and {blocks} blocks of cache on each rank")
        return Formed(
            epoch=self._inquiry.epoch,
            blocks=blocks - PROBE_BLOCKS,
            block_size=block_size,
            contents=tuple(one.contents for one in laid_out),
            spoiled=tuple(rank for rank, one in enumerate(laid_out) if one.spoiled),
            phases={name: round(value, 4) for name, value in phases.items()},
        )

    def in_use(self) -> None:
        """The group was proved: it serves from now on."""
        self._has_served = True
        for member in self._members:
            member.state = RankState.READY

    def give_up(self) -> None:
        """Have every rank leave its collectives, and form nothing."""
        self._begin_epoch()
        self._abort_members(time.monotonic())

    def _begin_epoch(self) -> None:
        self._group.gathering = True
        self._inquiry.begin_epoch()

    async def _gather(self, patience: float) -> float:
        """Until every rank is loaded and idle in this epoch. Returns when the survivors were."""
        aborted: float | None = None
        begun = time.monotonic()
        for member in self._members:
            member.begin_forming(begun)
        while True:
            self._inquiry.check()
            now = time.monotonic()
            self._abort_members(now)
            if aborted is None and not any(member.abort_sent_at for member in self._members):
                aborted = now
                self._on_phase("abort", aborted - begun, "the ranks that live have left their collectives")
            if all(member.idle_epoch >= self._inquiry.epoch for member in self._members):
                return now if aborted is None else aborted
            await self._group.moves(LOOK_SECONDS)
            self._kill_stuck(time.monotonic(), patience)
            self._give_up_on_absent(time.monotonic(), begun)

    def _abort_members(self, now: float) -> None:
        """Level-triggered: whoever has not been told of this epoch is told."""
        epoch = self._inquiry.epoch
        for member in self._members:
            if member.peer is not None and member.welcome_epoch < epoch:
                member.welcome_epoch = epoch
                member.peer.send(wire.Abort(epoch=epoch))
                if member.loaded is not None:
                    member.abort_sent_at = now

    def _loading_seconds(self) -> float:
        """How long a rank may read nothing."""
        shortest, longest = RELOADING_SECONDS if self._has_served else (LOADING_SECONDS, LOADING_SECONDS)
        return self._step_timeout or min(max(2 * self._longest_load, shortest), longest)

    def _give_up_on_absent(self, now: float, begun: float) -> None:
        """A rank that stays away, or never gets its weights, is not waited for without end."""
        stuck, absent = FIRST_SECONDS, FIRST_SECONDS
        if self._has_served:
            absent, (shortest, longest) = ABSENT_SECONDS, STUCK_SECONDS
            stuck = min(max(2.5 * self._loading_seconds(), shortest), longest)
        for member in self._members:
            if member.load_failure in self._hopeless():
                fault = wire.Fault.CONTEXT_FAULT if member.load_failure is DEVICE_LOST else wire.Fault.RANK_LOST
                text = f"rank {member.rank} can't load: {member.message}"
                self._inquiry.add(Evidence(fault, member.rank, text, final=True))
                return
            if member.state is RankState.FAILED and not self._has_served:
                continue  # which says more
            if member.absent_for(now, begun) > absent:
                what = f"has been out of reach for {absent:g} s"
            elif member.stuck_for(now) > stuck:
                what = f"could not get its weights, and got no further for {stuck:g} s"
            else:
                continue
            text = f"rank {member.rank} (pod {member.pod_index}) {what}"
            self._inquiry.add(Evidence(wire.Fault.RANK_LOST, member.rank, text, final=True))
            return

    def _hopeless(self) -> tuple[wire.LoadFailure, ...]:
        """After which failures of a load the next is not waited for. A first load may be mended from outside."""
        return (DEVICE_LOST, wire.LoadFailure.PERMANENT) if self._has_served else (DEVICE_LOST,)

    def _kill_stuck(self, now: float, patience: float) -> None:
        again, loading = self._has_served, self._loading_seconds()
        for member in self._members:
            if member.abort_sent_at is not None and now - member.abort_sent_at > patience:
                how = f"rank {member.rank} did not leave its collective within {patience:g} s"
            elif member.is_cut_off(now, RECONNECT_SECONDS):
                how = f"rank {member.rank} lost its connection and did not come back within {RECONNECT_SECONDS:g} s"
            elif member.stands_still(now, loading, again=again):
                how = f"rank {member.rank} has read none of its weights for {loading:g} s"
            else:
                continue
            self._group.kill_stuck(member.rank, how)

    async def _join(self, doubted: list[wire.SequenceSlice]) -> tuple[int, int, list[wire.CacheAllocated]]:
        """On how many blocks of cache, and of which size, the ranks have agreed, and what each says of its own."""
        inquiry, everyone = self._inquiry, self._members
        rendezvous = wire.Rendezvous(epoch=inquiry.epoch)
        opened = await inquiry.ask(everyone[:1], rendezvous, wire.RendezvousOpened, RENDEZVOUS)
        join = wire.Join(epoch=inquiry.epoch, address=opened[0].address)
        await inquiry.ask(everyone, join, wire.Joined, JOIN)
        offers = [member.loaded for member in everyone if member.loaded is not None]
        blocks, block_size = min(one.cache_blocks for one in offers), offers[0].block_size
        allocate = wire.AllocateCache(epoch=inquiry.epoch, blocks=blocks, doubted=doubted)
        laid_out = await inquiry.ask(everyone, allocate, wire.CacheAllocated, ALLOCATE)
        for member in everyone:
            member.joined_epoch = inquiry.epoch
            member.memory_bytes = laid_out[member.rank].memory_bytes
        return blocks, block_size, [laid_out[member.rank] for member in everyone]
