"""What a process is started with: all that the engine before it reported, and no descriptor that stays open."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from tests.support.ports import free_port

from lockstep_runtime.config import CONFIG_VARIABLE, TOKEN_VARIABLE, ServeConfig
from lockstep_runtime.protocol import bus
from lockstep_runtime.protocol.status import Fault, FaultRecord, GroupStatus
from lockstep_runtime.supervisor.bus_client import BusClient
from lockstep_runtime.supervisor.process import Processes
from lockstep_runtime.supervisor.state_machine import ENGINE

DEADLINE_SECONDS = 60.0


def config() -> ServeConfig:
    return ServeConfig(
        model="/nowhere", served_name="m", api_port=free_port(), bus_port=free_port(), status_port=free_port(),
        backend="cpu", device="cpu",
    )  # fmt: skip


async def holds(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not condition():  # noqa: ASYNC110 - a condition of any kind has no event
            await asyncio.sleep(0.01)


async def test_an_engine_gets_a_history_of_any_length() -> None:
    settings = config()
    faults = [
        FaultRecord(id=number, fault=Fault.HANG, rank=0, message="x" * 2**20, at=1.0, epoch=40) for number in (7, 8)
    ]
    history = GroupStatus(model="m", group=0, incarnation="i", epoch=41, recoveries=5, faults=faults)
    environment = {CONFIG_VARIABLE: msgspec.json.encode(settings).decode(), TOKEN_VARIABLE: "token"}
    processes = Processes(os.environ | environment)
    pid = processes.spawn(ENGINE, msgspec.json.encode(history))
    told: list[GroupStatus] = []

    def hear(message: bus.ToSupervisor) -> None:
        if isinstance(message, bus.StatusReport):
            told.append(message.status)

    link = asyncio.create_task(BusClient(settings, "token", "i", hear, lambda: None).run())
    try:
        await holds(lambda: bool(told))
    finally:
        link.cancel()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)  # noqa: ASYNC222 - it has been killed
    assert (told[0].recoveries, [fault.id for fault in told[0].faults]) == (5, [7, 8])
    assert told[0].epoch >= 41


def test_no_descriptor_is_lost_by_a_fork_that_fails() -> None:
    processes = Processes(os.environ)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        with pytest.raises(OSError, match="there is no zygote that is ready"):
            asyncio.run(processes.fork(0))
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1  # the KV cache's is kept
