"""What becomes of a process that the kernel refuses to start, and of one that has much to remember."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest
from tests.support.ports import free_port

from lockstep_runtime.config import CONFIG_VARIABLE, TOKEN_VARIABLE, ServeConfig
from lockstep_runtime.host import process_init
from lockstep_runtime.protocol import bus
from lockstep_runtime.protocol.status import Fault, FaultRecord, GroupStatus, PodProblemReason
from lockstep_runtime.supervisor.bus_client import BusClient
from lockstep_runtime.supervisor.ports import open_ports
from lockstep_runtime.supervisor.process import ForkError, Processes
from lockstep_runtime.supervisor.run import Supervisor
from lockstep_runtime.supervisor.spare import Spare
from lockstep_runtime.supervisor.state_machine import ENGINE, SPARE
from lockstep_runtime.worker.births import give_birth

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
    await holds(lambda: {ENGINE, SPARE} <= supervisor._processes.pids().keys())


async def test_a_spare_that_answers_no_more_is_replaced(supervisor: Supervisor) -> None:
    processes = supervisor._processes
    await holds(lambda: supervisor._machine._is_warm and not processes._awaited)
    spare = processes._spare
    assert spare is not None
    spare._lose()  # as after an order that it did not answer
    before = processes.pids()[SPARE]
    os.kill(before, signal.SIGKILL)
    await holds(lambda: processes.pids().get(SPARE, before) != before)
    await holds(lambda: supervisor._machine._is_warm)


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


def test_a_spare_that_the_kernel_gives_no_process_says_so_and_lives_on() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if not pid:
        try:
            ours.close()
            resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
            if os.getuid() == 0:
                os.setuid(NOBODY)  # to root the limit does not apply
            give_birth(theirs, lambda birth, descriptors: os._exit(9))
        finally:
            os._exit(1)
    theirs.close()
    with ours:
        ours.settimeout(DEADLINE_SECONDS)
        for _ in range(2):
            socket.send_fds(ours, [msgspec.json.encode(process_init.Birth(rank=0, incarnation="i"))], [0])
            assert ours.recv(512) == b"no process could be forked: Resource temporarily unavailable"
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_no_descriptor_is_lost_by_a_fork_that_fails() -> None:
    processes = Processes(os.environ)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        with pytest.raises(OSError, match="there is no spare that is warm"):
            asyncio.run(processes.fork(0))
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1  # the KV cache's is kept


def test_a_rank_that_was_promised_a_warm_spare_asks_none_that_is_still_getting_warm() -> None:
    processes = Processes(os.environ)
    processes._spare = spare = Spare()
    with spare.theirs as theirs:
        with pytest.raises(ForkError, match="no spare that is warm") as caught:
            asyncio.run(processes.fork(0))
        assert caught.value.spare_is_lost
        theirs.send(process_init.WARM)
        assert processes.hear_spare()  # its word was not taken for an answer
    spare.end()
