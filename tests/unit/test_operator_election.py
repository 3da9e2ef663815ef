"""Which of several operators leads: in virtual time, on the fake API server, with clocks and servers that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.kube_fake import FakeKube
from tests.support.virtual_loop import run_virtually

from lockstep_operator.cluster import election, lease
from lockstep_operator.cluster.client import KubeError
from lockstep_operator.cluster.election import HELD_SECONDS, LEASE_SECONDS, LOOK_SECONDS, Candidate, Election
from lockstep_operator.types.observed import Object

PLACE: Final = ("Lease", "lockstep-system", "lockstep")
AWAY: Final = KubeError(503, "ServiceUnavailable", "etcd is away")


def now() -> float:
    return asyncio.get_running_loop().time()


@dataclass
class Process:
    """One operator: its connection to the API server, its wall clock, and what becomes of it."""

    kube: FakeKube
    identity: str
    skew: float = 0.0
    away: KubeError | None = None
    silent: bool = False  # the API server takes what it is asked for, and never answers
    paused: asyncio.Event = field(default_factory=asyncio.Event)  # set: it runs
    election: Election = field(init=False)
    ended: str = ""
    asked: int = 0

    def __post_init__(self) -> None:
        self.paused.set()
        candidate, kube = Candidate(*PLACE[1:], self.identity), self._kube()
        self.election = Election(kube, candidate, now=now, wall=lambda: now() + self.skew)

    def _kube(self) -> Any:
        process = self

        class Connection:
            def __getattr__(self, verb: str) -> Any:
                async def ask(*arguments: Any) -> Object | None:
                    await process.paused.wait()
                    process.asked += 1
                    if process.away:
                        raise process.away
                    answer: Object | None = await getattr(process.kube, verb)(*arguments)
                    if process.silent:
                        await asyncio.Event().wait()
                    await process.paused.wait()
                    return answer

                return ask

        return Connection()

    async def live(self) -> None:
        await self.election.won()
        self.ended = await self.election.lost()


class Cluster:
    def __init__(self) -> None:
        self.kube = FakeKube(now)
        self.tasks: list[asyncio.Task[None]] = []

    def process(self, identity: str, **fields: Any) -> Process:
        made = Process(self.kube, identity, **fields)
        self.tasks.append(asyncio.create_task(made.live(), name=identity))
        return made

    def kill(self, process: Process) -> None:
        next(task for task in self.tasks if task.get_name() == process.identity).cancel()
        process.paused.clear()

    @property
    def spec(self) -> Object:
        found: Object = self.kube.objects[PLACE]["spec"]
        return found

    async def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


def play(work: Coroutine[Any, Any, None]) -> None:
    run_virtually(work)


async def until_leads(process: Process, seconds: float) -> float:
    """How long that took."""
    began = now()
    while not process.election.leads():
        assert now() - began <= seconds, f"{process.identity} doesn't lead after {seconds} s"
        await asyncio.sleep(0.1)
    return now() - began


def test_the_first_leads_and_keeps_the_lease_while_others_wait() -> None:
    async def work() -> None:
        cluster = Cluster()
        first = cluster.process("a")
        await until_leads(first, 0.1)
        second = cluster.process("b")
        acquired = cluster.spec["acquireTime"]
        for _ in range(600):
            await asyncio.sleep(0.5)
            assert (first.election.leads(), second.election.leads()) == (True, False)
        assert (cluster.spec["holderIdentity"], cluster.spec["leaseTransitions"]) == ("a", 0)
        assert cluster.spec["acquireTime"] == acquired != cluster.spec["renewTime"]
        assert first.asked <= 300 / election.RENEW_SECONDS + 3, "a renewal is one request"
        assert not second.election.problem
        await cluster.close()

    play(work())


@pytest.mark.parametrize("skew", [-3600.0, 0.0, 3600.0])
def test_another_takes_over_when_the_first_is_killed_whatever_their_clocks_say(skew: float) -> None:
    async def work() -> None:
        cluster = Cluster()
        first = cluster.process("a", skew=skew)
        await until_leads(first, 0.1)
        second = cluster.process("b")
        await asyncio.sleep(31.3)
        cluster.kill(first)
        took = await until_leads(second, 20)
        assert LEASE_SECONDS - election.RENEW_SECONDS <= took <= LEASE_SECONDS + LOOK_SECONDS + 0.2
        assert (cluster.spec["holderIdentity"], cluster.spec["leaseTransitions"]) == ("b", 1)
        await cluster.close()

    play(work())


def test_one_that_ends_in_order_is_followed_at_once() -> None:
    async def work() -> None:
        cluster = Cluster()
        first = cluster.process("a")
        await until_leads(first, 0.1)
        second = cluster.process("b")
        await asyncio.sleep(30)
        cluster.tasks[0].cancel()
        await first.election.resign()
        assert not first.election.leads()
        assert await until_leads(second, LOOK_SECONDS + 0.2) <= LOOK_SECONDS + 0.1
        await first.election.resign()  # what isn't held isn't given back
        assert cluster.spec["holderIdentity"] == "b"
        await cluster.close()

    play(work())


def test_a_container_that_is_started_again_leads_at_once() -> None:
    async def work() -> None:
        cluster = Cluster()
        first = cluster.process("pod-1")
        await until_leads(first, 0.1)
        cluster.kill(first)
        again = Process(cluster.kube, "pod-1")
        task = asyncio.create_task(again.live())
        await until_leads(again, 0.2)
        assert cluster.spec["leaseTransitions"] == 0
        task.cancel()
        await cluster.close()

    play(work())


@pytest.mark.parametrize("trouble", [{"away": AWAY}, {"silent": True}])
def test_a_leader_that_can_not_renew_stops_before_another_may_begin(trouble: dict[str, Any]) -> None:
    async def work() -> None:
        cluster = Cluster()
        first = cluster.process("a")
        await until_leads(first, 0.1)
        second = cluster.process("b")
        await asyncio.sleep(30)
        for name, value in trouble.items():
            setattr(first, name, value)
        while first.election.leads():
            assert not second.election.leads()
            await asyncio.sleep(0.1)
        stopped = now()
        await until_leads(second, 20)
        assert now() - stopped >= LEASE_SECONDS - HELD_SECONDS - 0.2
        await asyncio.sleep(HELD_SECONDS + 1)
        assert ("can't be read or written" in first.ended) or "b has taken it" in first.ended
        await cluster.close()

    play(work())


def test_a_short_outage_is_borne_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        cluster = Cluster()
        first = cluster.process("a")
        await until_leads(first, 0.1)
        await asyncio.sleep(30)
        first.away = AWAY
        await asyncio.sleep(HELD_SECONDS - election.RENEW_SECONDS - 0.5)
        first.away = None
        await asyncio.sleep(60)
        assert first.election.leads()
        await cluster.close()

    with caplog.at_level(logging.WARNING):
        play(work())
    assert [record.getMessage().count("etcd is away") for record in caplog.records] == [1]


def test_a_lease_that_somebody_edits_or_deletes_is_kept() -> None:
    async def work() -> None:
        cluster = Cluster()
        first = cluster.process("a")
        await until_leads(first, 0.1)
        await asyncio.sleep(5)
        cluster.kube.change(*PLACE, lambda live: live["metadata"].update(annotations={"looked": "at"}))
        await asyncio.sleep(20)
        assert first.election.leads()
        del cluster.kube.objects[PLACE]
        await asyncio.sleep(20)
        assert first.election.leads()
        assert cluster.spec["holderIdentity"] == "a"
        await cluster.close()

    play(work())


def test_one_whose_lease_was_taken_ends_and_says_by_whom() -> None:
    async def work() -> None:
        cluster = Cluster()
        first = cluster.process("a")
        await until_leads(first, 0.1)
        cluster.kube.change(*PLACE, lambda live: live["spec"].update(holderIdentity="b", leaseTransitions=1))
        await asyncio.sleep(5)
        assert first.ended == "b has taken it"
        await cluster.close()

    play(work())


def test_one_that_stands_by_is_unready_only_when_it_could_not_take_over() -> None:
    async def work() -> None:
        cluster = Cluster()
        first = cluster.process("a")
        await until_leads(first, 0.1)
        second = cluster.process("b")
        await asyncio.sleep(60)
        second.away = KubeError(403, "Forbidden", "leases is forbidden")
        await asyncio.sleep(election.SILENCE_SECONDS - 3)
        assert second.election.problem == ""
        await asyncio.sleep(6)
        assert second.election.problem.startswith("the Lease lockstep-system/lockstep can't be read or written: Forbid")
        second.away = None
        await asyncio.sleep(LOOK_SECONDS + 0.1)
        assert second.election.problem == ""
        await cluster.close()

    play(work())


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32))
def test_two_never_lead_at_a_time_whoever_is_paused_killed_or_cut_off(seed: int) -> None:
    """Whatever happens to them; and as soon as one of them is well, one leads."""

    async def work() -> None:
        chance, cluster = random.Random(seed), Cluster()
        processes = [cluster.process(name, skew=chance.uniform(-100, 100)) for name in "abc"]

        async def watch() -> None:
            while True:
                assert sum(process.election.leads() for process in processes) <= 1
                await asyncio.sleep(0.05)

        watching = asyncio.create_task(watch())
        for _ in range(12):
            one = chance.choice(processes)
            what = chance.choice(["pause", "cut", "silence", "kill"])
            if what == "pause":
                one.paused.clear()
            elif what == "cut":
                one.away = AWAY
            elif what == "silence":
                one.silent = True
            else:
                cluster.kill(one)
            await asyncio.sleep(chance.uniform(0, 25))
            one.away, one.silent = None, False
            one.paused.set()
            for index, process in enumerate(processes):
                if process.ended or (what == "kill" and process is one):  # its container is started again, as another
                    processes[index] = cluster.process(f"{process.identity}'")
        await asyncio.sleep(2 * LEASE_SECONDS)
        assert sum(process.election.leads() for process in processes) == 1
        assert not watching.done()
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching
        await cluster.close()

    play(work())


def test_the_documents_are_those_of_client_go() -> None:
    made = lease.new("ns", "name", "a", 10, 1_800_000_000.25)
    assert made["spec"] == {
        "holderIdentity": "a", "leaseDurationSeconds": 10, "acquireTime": "2027-01-15T08:00:00.250000Z",
        "renewTime": "2027-01-15T08:00:00.250000Z", "leaseTransitions": 0,
    }  # fmt: skip
    given_back = lease.released(made, 1_800_000_001)
    assert (lease.holder_of(given_back), lease.seconds_of(given_back)) == ("", 1)
    assert lease.held(given_back, "b", 10, 1_800_000_002)["spec"]["leaseTransitions"] == 1
    assert lease.holder_of({}) == ""
    assert lease.seconds_of({"spec": None}) == 0
