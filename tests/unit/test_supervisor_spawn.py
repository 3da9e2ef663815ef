"""What becomes of a process that the kernel refuses to start, and of one that has much to remember."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest
from tests.support.ports import free_port

from lockstep_runtime.config import CONFIG_VARIABLE, TOKEN_VARIABLE, ServeConfig
from lockstep_runtime.protocol import bus
from lockstep_runtime.protocol.status import Fault, FaultRecord, GroupStatus, PodProblemReason
from lockstep_runtime.supervisor.bus_client import BusClient
from lockstep_runtime.supervisor.ports import open_ports
from lockstep_runtime.supervisor.process import Processes
from lockstep_runtime.supervisor.run import Supervisor
from lockstep_runtime.supervisor.state_machine import ENGINE, ZYGOTE

DEADLINE_SECONDS = 60.0
NOBODY = 65532
LONGEST_VARIABLE = 128 * 1024 - 8  # Linux allows no longer one, its name included


def config() -> ServeConfig:
    return ServeConfig(
        model="/nowhere", served_name="m", api_port=free_port(), bus_port=free_port(), status_port=free_port(),
        backend="cpu", device="cpu",
    )  # fmt: skip


async def holds(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not condition():  # noqa: ASYNC110 - a condition of any kind has no event
            await asyncio.sleep(0.01)


@pytest.fixture
async def supervisor() -> AsyncIterator[Supervisor]:
    """One that runs, until the test is over."""
    settings = config()
    found = Supervisor(settings, "token")
    running = asyncio.create_task(found.run(open_ports(settings).status))
    yield found
    found._on_end_signal(signal.SIGTERM)
    found._on_end_signal(signal.SIGTERM)
    async with asyncio.timeout(DEADLINE_SECONDS):
        assert await running == 0


@pytest.fixture
def crowded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An environment that no process can be given: longer than a quarter of the stack (execve(2))."""
    stack, _ = resource.getrlimit(resource.RLIMIT_STACK)
    room = 6 * 2**20 if stack == resource.RLIM_INFINITY else stack // 4
    names = [f"LOCKSTEP_TEST_{n}" for n in range(room // LONGEST_VARIABLE + 1)]
    for name in names:
        monkeypatch.setenv(name, "x" * (LONGEST_VARIABLE - len(name)))
    return names


async def test_what_can_not_be_started_is_told_and_tried_again(crowded: list[str], supervisor: Supervisor) -> None:
    board = supervisor._board
    assert board is not None
    await holds(lambda: bool(board.status.pod_problems))
    [problem] = board.status.pod_problems
    assert problem.reason is PodProblemReason.SPAWN_FAILED
    assert "can't be started: Argument list too long" in problem.message
    await holds(lambda: "the engine can't be started" in board.status.message)
    assert not board.status.accepting
    assert supervisor._processes.pids() == {}
    await holds(lambda: supervisor._machine._children[ENGINE].failures >= 3)
    assert supervisor._machine.next_deadline() is not None
    for name in crowded:
        del supervisor._processes._environment[name]
    await holds(lambda: {ENGINE, ZYGOTE} <= supervisor._processes.pids().keys())


async def test_a_zygote_that_replies_no_more_is_replaced(supervisor: Supervisor) -> None:
    processes = supervisor._processes
    await holds(lambda: supervisor._machine._zygote_is_ready and not processes._forking)
    zygote = processes.zygotes._pod
    assert zygote is not None
    zygote._lose()  # as after a request to which it did not reply
    before = processes.pids()[ZYGOTE]
    os.kill(before, signal.SIGKILL)
    await holds(lambda: processes.pids().get(ZYGOTE, before) != before)
    await holds(lambda: supervisor._machine._zygote_is_ready)


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
