"""The program `lockstep-operator` twice, with one Lease, on the fake API server over HTTP: signals, probes, metrics."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import aiohttp
from tests.support.kube_fake import KEY_SECRET, FakeKube, resource
from tests.support.kube_http import serving_kube
from tests.support.ports import free_port

from lockstep_operator.leadership import LOST_LEASE
from lockstep_operator.types.names import KIND

SECONDS: Final = 30.0
LEASE: Final = ("Lease", "system", "lockstep")


class Operator:
    def __init__(self, name: str, kubeconfig: Path) -> None:
        self.name, self.port, self.live_port = name, free_port(), free_port()
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("LOCKSTEP_")},
            "KUBECONFIG": str(kubeconfig),
            "POD_ID": name,
            "LOCKSTEP_PORT": str(self.port),
            "LOCKSTEP_RUNTIME_IMAGE": "runtime:1",
            "LOCKSTEP_LEASE": "lockstep",
            "LOCKSTEP_OPERATOR_NAMESPACE": "system",
            "LOCKSTEP_KEY_SECRET": KEY_SECRET,
            "LOCKSTEP_LIVE_PAGE": "Cluster",
            "LOCKSTEP_LIVE_PORT": str(self.live_port),
            "LOCKSTEP_LIVE_HOST": "127.0.0.1",
        }
        self.process: asyncio.subprocess.Process

    async def start(self) -> None:
        command = [sys.executable, "-m", "lockstep_operator"]
        self.process = await asyncio.create_subprocess_exec(*command, env=self._environment)

    async def ask(self, path: str) -> str:
        """The body of a 200, else nothing."""
        try:
            async with aiohttp.ClientSession() as http, http.get(f"http://127.0.0.1:{self.port}{path}") as answer:
                return await answer.text() if answer.status == 200 else ""
        except aiohttp.ClientError:
            return ""

    async def shows(self) -> str:
        """The first that a reader of its live page is sent."""
        url = f"http://127.0.0.1:{self.live_port}/feed"
        async with aiohttp.ClientSession() as http, asyncio.timeout(SECONDS), http.get(url) as feed:
            return (await feed.content.readuntil(b"\n\n")).decode()

    async def until(self, path: str, words: str) -> None:
        deadline = time.monotonic() + SECONDS
        while words not in await self.ask(path):
            assert time.monotonic() < deadline, f"{self.name} says no {words!r} at {path}"
            await asyncio.sleep(0.1)

    async def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        async with asyncio.timeout(SECONDS):
            return await self.process.wait()


@asynccontextmanager
async def two(folder: Path) -> AsyncIterator[tuple[FakeKube, Operator, Operator]]:
    """The first leads, the second stands by, and there is a model."""
    kube = FakeKube(time.time)
    kube.put(KIND, resource("chat", replicas=0))
    async with serving_kube(kube, folder) as (_, kubeconfig):
        operators = Operator("first", kubeconfig), Operator("second", kubeconfig)
        try:
            for operator, leads in zip(operators, "10", strict=True):
                await operator.start()
                await operator.until("/metrics", f"lockstep_operator_leader {leads}.0")
                await operator.until("/readyz", "ok")
            yield kube, *operators
        finally:
            for operator in operators:
                if operator.process.returncode is None:
                    await operator.end(signal.SIGKILL)


async def test_one_works_until_it_is_told_to_end_or_its_lease_is_taken(
    tmp_path: Path,
) -> None:
    async with two(tmp_path) as (kube, first, second):
        await first.until("/metrics", 'lockstep_operator_models{state="Ready"} 1.0')
        assert 'lockstep_operator_models{state="Ready"} 0.0' in await second.ask("/metrics")
        assert await second.ask("/healthz") == "ok\n"
        assert '"ids":["team/chat"]' in await first.shows()
        assert '"ids":["team/chat"]' in await second.shows(), "the live page of both is that of the one that works"
        assert await first.end(signal.SIGTERM) == 0
        await second.until("/metrics", "lockstep_operator_leader 1.0")
        await second.until("/metrics", 'lockstep_operator_models{state="Ready"} 1.0')
        assert '"ids":["team/chat"]' in await second.shows()
        spec = kube.objects[LEASE]["spec"]
        assert (spec["holderIdentity"], spec["leaseTransitions"]) == ("second", 1)

        kube.change(*LEASE, lambda live: live["spec"].update(holderIdentity="third"))
        async with asyncio.timeout(SECONDS):
            assert await second.process.wait() == LOST_LEASE


async def test_one_that_stands_by_ends_when_it_is_told_to(tmp_path: Path) -> None:
    async with two(tmp_path) as (kube, first, second):
        assert await second.end(signal.SIGTERM) == 0
        assert "lockstep_operator_leader 1.0" in await first.ask("/metrics")
        assert kube.objects[LEASE]["spec"]["holderIdentity"] == "first"
