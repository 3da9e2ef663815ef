"""Faults that do not end by themselves, one or two at a time, at any point of a group's life, in virtual time.

Whatever is wrong, the group comes to say so within a bounded time: it is Ready, Failed or Poisoned, and what it keeps
and tells stays small. When the causes are mended it serves again by itself.
"""

from __future__ import annotations

import asyncio
import time
from typing import Final

import msgspec
from tests.support.fake_ranks import continuation
from tests.support.sim_world import LASTING, SimRank, World

from lockstep_runtime.engine.client import GenerationRequest
from lockstep_runtime.protocol.status import GroupState
from lockstep_runtime.protocol.step import SamplingParams

SETTLED: Final = (GroupState.READY, GroupState.FAILED, GroupState.POISONED)
FIRST_SECONDS: Final = 450.0  # until a group that has never served has settled: its first step may take 120
SERVED_SECONDS: Final = 180.0  # and one that has
MENDED_SECONDS: Final = 700.0  # until it serves again: the longest wait of a poisoned group, and the time to form
STATUS_BYTES: Final = 128 * 1024
THINGS: Final = 400
MESSAGE_CHARACTERS: Final = 1100
MOMENTS: Final = ("before it serves", "at rest", "at work", "in recovery", "poisoned", "engine restarted")


class LastingWorld(World):
    """`hours`: how long the causes last."""

    def __init__(self, seed: int, hours: float = 1.0, kinds: tuple[str, ...] = LASTING) -> None:
        super().__init__(seed)
        self.hours, self.kinds = hours, kinds
        self.serving: asyncio.Task[None]
        self.moment = self.chance.choice(MOMENTS)
        self.struck: list[tuple[int, str]] = []
        self.unsettled_since: float | None = None
        self.longest = 0.0
        self.states: set[GroupState] = set()
        self.last_state = GroupState.STARTING
        self.poisonings = 0

    def strike(self) -> None:
        rank = self.chance.choice(self.ranks)
        kind = self.chance.choice(self.kinds)
        self.struck.append((rank.rank, kind))
        rank.fall_ill(kind)

    async def run(self) -> None:
        self.serving = asyncio.create_task(self.engine.run())
        client = asyncio.create_task(self._ask_on())
        try:
            self.ranks += [SimRank(self, rank) for rank in range(self.size)]
            await self._come_to(self.moment)
            self.strike()
            if self.chance.random() < 0.5:
                await asyncio.sleep(self.chance.choice([0.0, 0.1, 1.0, 10.0, 100.0]))
                self.strike()
            await self._watch(self.hours * 3600.0)
            for rank in self.ranks:
                rank.mend()
            await self._serves_again()
        finally:
            died = [task.exception() for task in (self.serving, client) if task.done()]
            for task in (self.serving, client):
                task.cancel()
            await asyncio.gather(self.serving, client, return_exceptions=True)
            assert not any(died), died

    async def _come_to(self, moment: str) -> None:
        if moment == "before it serves":
            await asyncio.sleep(self.chance.uniform(0.0, 0.6))
            return
        await self.until(lambda: self.engine.status().state is GroupState.READY, "it is ready at first")
        match moment:
            case "at work":
                await self.until(lambda: self.engine.stats().requests_running > 0, "it works")
            case "in recovery":
                self.chance.choice(self.ranks).die()
                await asyncio.sleep(self.chance.uniform(0.0, 0.5))
            case "poisoned":
                first = self.chance.choice(self.ranks)
                first.fall_ill("die in loading")
                await self.until(lambda: self.engine.status().state is GroupState.POISONED, "it is poisoned")
                first.mend()
            case "engine restarted":
                self.serving.cancel()
                await asyncio.gather(self.serving, return_exceptions=True)
                self.restart_engine()
                self.serving = asyncio.create_task(self.engine.run())
                await asyncio.sleep(self.chance.uniform(0.0, 0.6))
            case _:
                await asyncio.sleep(self.chance.uniform(0.0, 5.0))

    def held(self) -> int:
        """Things that the group keeps of its past, in lists and tables."""
        group = self.engine.group
        log = group.faults
        return (
            len(log.records)
            + log.footprint
            + sum(len(handle.past_incarnations) for handle in group.coordinator.handles)
        )

    async def _ask_on(self) -> None:
        """One request after the other; what is turned away or given up is asked again later."""
        while True:
            await self._request()
            await asyncio.sleep(self.chance.uniform(0.0, 20.0 if self.hours < 24 else 2000.0))

    async def _watch(self, seconds: float) -> None:
        """While the causes last."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            await asyncio.sleep(3.0 if self.hours < 24 else 60.0)
            self._look()

    def _look(self) -> None:
        status, now = self.engine.status(), time.monotonic()
        self.poisonings += status.state is GroupState.POISONED is not self.last_state
        self.last_state = status.state
        self.states.add(status.state)
        if status.state in SETTLED:
            self.unsettled_since = None
        elif self.unsettled_since is None:
            self.unsettled_since = now
        waited = now - (self.unsettled_since or now)
        self.longest = max(self.longest, waited)
        served = self.engine.stats().steps_total > 0
        assert waited < (SERVED_SECONDS if served else FIRST_SECONDS), f"{status.state} for {waited:.0f} s: {status}"
        assert len(msgspec.json.encode(status)) < STATUS_BYTES
        assert self.held() < THINGS
        texts = [status.message, *(one.message for one in status.ranks), *(one.message for one in status.faults)]
        assert max(map(len, texts)) < MESSAGE_CHARACTERS
        if status.state in (GroupState.FAILED, GroupState.POISONED):
            assert status.message
            assert not status.accepting
        if status.state is GroupState.POISONED:
            newest = max(status.faults, key=lambda fault: fault.id)
            assert newest.recovered_at is None
            if {kind for _, kind in self.struck} <= NAMED:
                assert newest.rank in {rank for rank, _ in self.struck} or self.moment == "poisoned", newest

    async def _serves_again(self) -> None:
        begun = time.monotonic()
        while self.engine.status().state is not GroupState.READY:
            waited = time.monotonic() - begun
            assert waited < MENDED_SECONDS, f"mended, and not ready after {waited:.0f} s: {self.engine.status()}"
            await asyncio.sleep(1.0)
        request = GenerationRequest(
            request_id="r", prompt=(1, 2, 3), max_tokens=5, sampling=SamplingParams(temperature=0)
        )
        assert [event.token.token async for event in self.engine.generate(request)] == continuation((1, 2, 3), 5)


NAMED: Final = {"cut off", "no zygote", "die in loading", "hang in loading", "die in join", "bug", "device lost"}
