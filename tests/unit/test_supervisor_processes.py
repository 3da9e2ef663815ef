"""A supervisor's processes: whichever spare is well gives a rank its next one, and nothing stays behind."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec
import pytest
from tests.support.models import ModelShape, write_model
from tests.support.ports import free_port
from tests.support.serve import is_running, threads_of, title_of
from tests.support.wait import until

from lockstep_runtime.config import CONFIG_VARIABLE, TOKEN_VARIABLE, ServeConfig
from lockstep_runtime.host import process_init
from lockstep_runtime.host.shm_files import FOLDER_VARIABLE, cache_file
from lockstep_runtime.host.torch_environment import NCCL_VARIABLES, missing_nccl_variables
from lockstep_runtime.protocol.progress_record import Stage, new_memory
from lockstep_runtime.supervisor.process import Exit, Processes
from lockstep_runtime.supervisor.spare import Spare, SpareLostError
from lockstep_runtime.supervisor.state_machine import SPARE

DEADLINE_SECONDS = 120.0  # importing torch on a busy machine
LOADED_SPARE = "lockstep: loaded spare of rank 0 model=local group=0"
NEXT = "lockstep: next process of rank 0 model=local group=0"


class Pod:
    """Rank 0 of a model that is all there is: it finds no engine to talk to."""

    def __init__(self, directory: Path) -> None:
        model = write_model(directory / "model", ModelShape())
        config = ServeConfig(model=str(model), served_name="m", bus_port=free_port(), backend="cpu", device="cpu")
        environment = {
            CONFIG_VARIABLE: msgspec.json.encode(config).decode(),
            TOKEN_VARIABLE: "token",
            FOLDER_VARIABLE: str(directory),
        }
        self.processes = Processes(os.environ | environment)
        path = cache_file(environment | {process_init.PARENT_VARIABLE: str(os.getpid())}, 0)
        assert path is not None
        self.cache = path
        self.processes.spawn(SPARE)
        until("the spare is warm", self.processes.hear_spare, DEADLINE_SECONDS)

    def start(self) -> None:
        """The rank's process; wait for its loaded spare."""
        self.fork()
        until("it has left a loaded spare", self.has_loaded_spare, DEADLINE_SECONDS)

    def fork(self) -> int:
        return asyncio.run(self.processes.fork(0))

    def is_loaded(self) -> bool:
        return self.processes._record(self.processes._by_name[0]).stage is Stage.LOADED

    def has_loaded_spare(self) -> bool:
        loaded = self.processes._loaded.get(0)
        return loaded is not None and loaded.is_warm()

    def children(self, title: str) -> list[int]:
        pids = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        return [int(pid) for pid in pids if is_running(int(pid)) and title_of(int(pid)) == title]

    def loaded_spares(self) -> list[int]:
        return self.children(LOADED_SPARE)

    def next(self) -> int:
        """The process that is forked ahead; wait for it."""
        [pid] = until("the next process is there", lambda: self.children(NEXT), DEADLINE_SECONDS)
        return pid

    def lose(self, number: int) -> None:
        self.processes.signal(0, number)
        gone: list[Exit] = []

        def is_gone() -> bool:
            gone.extend(one for one in self.processes.reap() if isinstance(one, Exit))
            return bool(gone)

        until("the rank's process has ended", is_gone, DEADLINE_SECONDS)
        assert [(one.name, one.signal, one.healthy) for one in gone] == [(0, number, True)]

    def end(self) -> None:
        self.processes.end_loaded_spares()
        self.processes.signal(SPARE, signal.SIGKILL)
        until(
            "the spare has ended", lambda: bool(self.processes.reap()) and not self.processes.pids(), DEADLINE_SECONDS
        )
        self.processes.dismiss_spare()


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pod]:
    pod = Pod(tmp_path_factory.mktemp("pod"))
    yield pod
    pod.end()


@pytest.fixture
def pod(warm: Pod, caplog: pytest.LogCaptureFixture) -> Iterator[Pod]:
    """One whose rank has loaded and left a loaded spare."""
    caplog.set_level(logging.INFO)
    warm.start()
    yield warm
    if 0 in warm.processes.pids():
        warm.lose(signal.SIGKILL)
    warm.processes.end_loaded_spares()


def is_from_loaded(caplog: pytest.LogCaptureFixture) -> bool:
    return "rank 0 has a new process from its loaded spare" in caplog.text


def test_children_begin_with_what_keeps_torch_from_ending_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set by a rank, it would be set beside threads that read it."""
    given: list[Mapping[str, str]] = []

    def spawn(path: str, arguments: list[str], environment: Mapping[str, str], **_: object) -> int:
        given.append(environment)
        return os.getpid()

    monkeypatch.setattr(os, "posix_spawn", spawn)
    processes = Processes({"TORCH_NCCL_BLOCKING_WAIT": "0", "NCCL_DEBUG": "INFO"})
    processes.spawn(SPARE)
    processes.dismiss_spare()
    [environment] = given
    assert not missing_nccl_variables(environment)
    assert environment["NCCL_DEBUG"] == "INFO", "which is the user's"
    assert missing_nccl_variables({}) == [f"{name}={value}" for name, value in NCCL_VARIABLES.items()]


def test_a_lost_process_comes_back_from_its_loaded_spare_again_and_again(
    pod: Pod, caplog: pytest.LogCaptureFixture
) -> None:
    spare = pod.loaded_spares()
    assert len(spare) == 1
    pod.cache.unlink()  # nobody reads it again
    for _ in range(2):
        caplog.clear()
        pod.lose(signal.SIGKILL)
        pod.fork()
        assert is_from_loaded(caplog)
        until("it is as good as one that has loaded", pod.is_loaded, DEADLINE_SECONDS)
    assert pod.loaded_spares() == spare
    assert not pod.cache.exists()


def test_while_nothing_happens_the_next_process_is_forked_ahead(pod: Pod, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        caplog.clear()
        ahead = pod.next()
        pod.lose(signal.SIGKILL)
        assert pod.fork() == ahead
        assert is_from_loaded(caplog)
        until("it is as good as one that has loaded", pod.is_loaded, DEADLINE_SECONDS)


def test_one_that_was_forked_ahead_and_is_lost_is_not_missed(pod: Pod, caplog: pytest.LogCaptureFixture) -> None:
    ahead = pod.next()
    os.kill(ahead, signal.SIGKILL)
    until("it has ended", lambda: not is_running(ahead), DEADLINE_SECONDS)
    pod.lose(signal.SIGKILL)
    assert pod.fork() != ahead
    assert is_from_loaded(caplog)
    until("it is as good as one that has loaded", pod.is_loaded, DEADLINE_SECONDS)


def test_what_was_forked_ahead_ends_with_the_loaded_spare(pod: Pod) -> None:
    ahead = pod.next()
    pod.processes.end_loaded_spare(0)
    until("it has ended", lambda: not is_running(ahead), DEADLINE_SECONDS)


def test_a_loaded_spare_holds_nothing_that_ends_with_the_rank(pod: Pod) -> None:
    pod.next()
    [spare] = pod.loaded_spares()
    opened = [str(one.readlink()) for one in Path(f"/proc/{spare}/fd").iterdir()]
    assert len([one for one in opened if one.startswith("socket:")]) == 2  # its orders, and the next process's
    assert not [one for one in opened if "lockstep-" in one and str(pod.cache) not in one]
    assert "lockstep-cache" not in Path(f"/proc/{spare}/maps").read_text()
    assert threads_of(spare) == 1


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_one_that_does_not_answer_is_replaced_by_the_pods_spare(
    pod: Pod, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    [spare] = pod.loaded_spares()
    os.kill(spare, number)
    pod.lose(signal.SIGKILL)
    pod.start()
    assert "the loaded spare of rank 0 gave no process" in caplog.text
    assert not is_from_loaded(caplog)
    assert not is_running(spare)
    assert spare not in pod.loaded_spares()


def test_what_is_not_to_be_trusted_is_not_forked_from_again(pod: Pod, caplog: pytest.LogCaptureFixture) -> None:
    pod.processes.end_loaded_spare(0)
    until("it has ended", lambda: not pod.loaded_spares(), DEADLINE_SECONDS)
    pod.lose(signal.SIGKILL)
    pod.start()
    assert not is_from_loaded(caplog)


def test_nor_is_what_a_process_that_crashed_was_forked_from(pod: Pod, caplog: pytest.LogCaptureFixture) -> None:
    pod.lose(signal.SIGSEGV)
    until("it has ended", lambda: not pod.loaded_spares(), DEADLINE_SECONDS)
    pod.start()
    assert not is_from_loaded(caplog)


def test_a_stopped_one_ends_with_the_supervisor(pod: Pod) -> None:
    [spare] = pod.loaded_spares()
    os.kill(spare, signal.SIGSTOP)
    pod.processes.end_loaded_spares()
    until("it has ended", lambda: not is_running(spare), DEADLINE_SECONDS)


def order(spare: Spare) -> int:
    record = new_memory("test")
    try:
        return asyncio.run(spare.bear(0.2, process_init.Birth(rank=0, incarnation="i"), record))
    finally:
        os.close(record)


def test_a_newborn_of_which_nobody_heard_in_time_is_not_told_to_go() -> None:
    spare = Spare()
    with spare.theirs as theirs:
        with pytest.raises(SpareLostError, match=r"no answer within 0\.2 s"):
            order(spare)
        _, descriptors, _, _ = socket.recv_fds(theirs, 4096, 4)
        assert os.read(descriptors[0], 1) == b""
        for descriptor in descriptors:
            os.close(descriptor)
    spare.end()


def test_of_a_spare_that_has_ended_nothing_is_heard() -> None:
    spare = Spare()
    spare.theirs.close()
    assert not spare.is_warm()
    with pytest.raises(SpareLostError):
        order(spare)
    spare.end()


def test_what_is_answered_too_late_is_taken_for_no_other_order() -> None:
    spare = Spare()
    with spare.theirs as theirs:
        with pytest.raises(SpareLostError, match="no answer"):
            order(spare)
        with contextlib.suppress(OSError):
            theirs.send(b"4711")
        with pytest.raises(SpareLostError, match="does not answer"):
            order(spare)
    spare.end()


def test_a_spare_to_which_the_kernel_gives_no_process_says_so_and_is_asked_again() -> None:
    spare = Spare()
    with spare.theirs as theirs:
        theirs.send(b"no process could be forked: Resource temporarily unavailable")
        with pytest.raises(OSError, match="Resource temporarily unavailable") as caught:
            order(spare)
        assert not isinstance(caught.value, SpareLostError)
        theirs.send(b"4711")
        assert order(spare) == 4711
    spare.end()


async def test_an_end_releases_who_waits_for_an_answer() -> None:
    spare = Spare()
    with spare.theirs:
        waiting = asyncio.create_task(spare.bear(60.0, process_init.Birth(rank=0, incarnation="i")))
        await asyncio.sleep(0)  # it has begun to wait
        assert spare._turn.locked()
        spare.end()
        async with asyncio.timeout(10):
            with pytest.raises(SpareLostError):
                await waiting
    assert spare.fileno() == -1
