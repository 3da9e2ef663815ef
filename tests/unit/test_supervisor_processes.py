"""A supervisor's processes: whichever zygote is well gives a rank its next one, and nothing stays behind."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
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
from lockstep_runtime.protocol.progress_record import Stage
from lockstep_runtime.supervisor.exits import Exit
from lockstep_runtime.supervisor.process import Processes
from lockstep_runtime.supervisor.progress_reader import ProgressReader
from lockstep_runtime.supervisor.state_machine import ZYGOTE

DEADLINE_SECONDS = 120.0  # importing torch on a busy machine
LOADED_ZYGOTE = "lockstep: loaded zygote of rank 0 model=local group=0"
STANDBY = "lockstep: standby of rank 0 model=local group=0"


def link(descriptor: Path) -> str:
    try:
        return str(descriptor.readlink())
    except FileNotFoundError:  # the one by which the folder was read
        return ""


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
        self.processes.spawn(ZYGOTE)
        assert asyncio.run(self.zygote_is_ready())

    async def zygote_is_ready(self) -> bool:
        async with asyncio.timeout(DEADLINE_SECONDS):
            return await self.processes.zygotes.wait_until_ready()

    def start(self) -> None:
        """The rank's process; wait for its loaded zygote."""
        self.fork()
        until("it has left a loaded zygote", self.has_loaded_zygote, DEADLINE_SECONDS)

    def fork(self) -> int:
        return asyncio.run(self.processes.fork(0))

    def is_loaded(self) -> bool:
        [memory] = [int(one.name) for one in Path("/proc/self/fd").iterdir() if "lockstep-progress-0" in link(one)]
        return ProgressReader(memory, 0, 0.0).read().stage is Stage.LOADED

    def has_loaded_zygote(self) -> bool:
        return self.processes.zygotes.has_loaded(0)

    def children(self, title: str) -> list[int]:
        pids = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        return [int(pid) for pid in pids if is_running(int(pid)) and title_of(int(pid)) == title]

    def loaded_zygotes(self) -> list[int]:
        return self.children(LOADED_ZYGOTE)

    def standby(self) -> int:
        """The process that is forked ahead; wait for it."""
        [pid] = until("a process stands by", lambda: self.children(STANDBY), DEADLINE_SECONDS)
        return pid

    def lose(self, number: int) -> None:
        self.processes.signal(0, number)
        gone: list[Exit] = []

        def is_gone() -> bool:
            gone.extend(one for one in self.processes.reap() if isinstance(one, Exit))
            return bool(gone)

        until("the rank's process has ended", is_gone, DEADLINE_SECONDS)
        assert [(one.name, one.signal, one.healthy) for one in gone] == [(0, number, True)]

    def end_loaded(self) -> None:
        asyncio.run(self.processes.zygotes.end_all_loaded())

    def end(self) -> None:
        self.end_loaded()
        self.processes.signal(ZYGOTE, signal.SIGKILL)
        until(
            "the zygote has ended", lambda: bool(self.processes.reap()) and not self.processes.pids(), DEADLINE_SECONDS
        )
        self.processes.zygotes.dismiss()


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pod]:
    pod = Pod(tmp_path_factory.mktemp("pod"))
    yield pod
    pod.end()


@pytest.fixture
def pod(warm: Pod, caplog: pytest.LogCaptureFixture) -> Iterator[Pod]:
    """One whose rank has loaded and left a loaded zygote."""
    caplog.set_level(logging.INFO)
    warm.start()
    yield warm
    if 0 in warm.processes.pids():
        warm.lose(signal.SIGKILL)
    warm.end_loaded()


def is_from_loaded(caplog: pytest.LogCaptureFixture) -> bool:
    return "rank 0 has a new process from its loaded zygote" in caplog.text


def test_children_begin_with_what_keeps_torch_from_ending_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set by a rank, it would be set beside threads that read it."""
    given: list[Mapping[str, str]] = []

    def spawn(path: str, arguments: list[str], environment: Mapping[str, str], **_: object) -> int:
        given.append(environment)
        return os.getpid()

    monkeypatch.setattr(os, "posix_spawn", spawn)
    processes = Processes({"TORCH_NCCL_BLOCKING_WAIT": "0", "NCCL_DEBUG": "INFO"})
    processes.spawn(ZYGOTE)
    processes.zygotes.dismiss()
    [environment] = given
    assert not missing_nccl_variables(environment)
    assert environment["NCCL_DEBUG"] == "INFO", "which is the user's"
    assert missing_nccl_variables({}) == [f"{name}={value}" for name, value in NCCL_VARIABLES.items()]


def test_a_lost_process_comes_back_from_its_loaded_zygote_again_and_again(
    pod: Pod, caplog: pytest.LogCaptureFixture
) -> None:
    zygote = pod.loaded_zygotes()
    assert len(zygote) == 1
    pod.cache.unlink()  # nobody reads it again
    for _ in range(2):
        caplog.clear()
        pod.lose(signal.SIGKILL)
        pod.fork()
        assert is_from_loaded(caplog)
        until("it is as good as one that has loaded", pod.is_loaded, DEADLINE_SECONDS)
    assert pod.loaded_zygotes() == zygote
    assert not pod.cache.exists()


def test_while_nothing_happens_a_process_stands_by(pod: Pod, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        caplog.clear()
        ahead = pod.standby()
        pod.lose(signal.SIGKILL)
        assert pod.fork() == ahead
        assert is_from_loaded(caplog)
        until("it is as good as one that has loaded", pod.is_loaded, DEADLINE_SECONDS)


def test_one_that_was_forked_ahead_and_is_lost_is_not_missed(pod: Pod, caplog: pytest.LogCaptureFixture) -> None:
    ahead = pod.standby()
    os.kill(ahead, signal.SIGKILL)
    until("it has ended", lambda: not is_running(ahead), DEADLINE_SECONDS)
    pod.lose(signal.SIGKILL)
    assert pod.fork() != ahead
    assert is_from_loaded(caplog)
    until("it is as good as one that has loaded", pod.is_loaded, DEADLINE_SECONDS)


def test_what_was_forked_ahead_ends_with_the_loaded_zygote(pod: Pod) -> None:
    ahead = pod.standby()
    pod.processes.zygotes.end_loaded(0)
    until("it has ended", lambda: not is_running(ahead), DEADLINE_SECONDS)


def test_a_loaded_zygote_holds_nothing_that_ends_with_the_rank(pod: Pod) -> None:
    pod.standby()
    [zygote] = pod.loaded_zygotes()
    opened = [str(one.readlink()) for one in Path(f"/proc/{zygote}/fd").iterdir()]
    assert len([one for one in opened if one.startswith("socket:")]) == 2  # its requests, and the standby's
    assert not [one for one in opened if "lockstep-" in one and str(pod.cache) not in one]
    assert "lockstep-cache" not in Path(f"/proc/{zygote}/maps").read_text()
    assert threads_of(zygote) == 1


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_one_that_does_not_answer_is_replaced_by_the_pods_zygote(
    pod: Pod, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    [zygote] = pod.loaded_zygotes()
    os.kill(zygote, number)
    pod.lose(signal.SIGKILL)
    pod.start()
    assert "the loaded zygote of rank 0 gave no process" in caplog.text
    assert not is_from_loaded(caplog)
    assert not is_running(zygote)
    assert zygote not in pod.loaded_zygotes()


def test_what_is_not_to_be_trusted_is_not_forked_from_again(pod: Pod, caplog: pytest.LogCaptureFixture) -> None:
    pod.processes.zygotes.end_loaded(0)
    until("it has ended", lambda: not pod.loaded_zygotes(), DEADLINE_SECONDS)
    pod.lose(signal.SIGKILL)
    pod.start()
    assert not is_from_loaded(caplog)


def test_nor_is_what_a_process_that_crashed_was_forked_from(pod: Pod, caplog: pytest.LogCaptureFixture) -> None:
    pod.lose(signal.SIGSEGV)
    until("it has ended", lambda: not pod.loaded_zygotes(), DEADLINE_SECONDS)
    pod.start()
    assert not is_from_loaded(caplog)


def test_a_stopped_one_ends_with_the_supervisor(pod: Pod) -> None:
    [zygote] = pod.loaded_zygotes()
    os.kill(zygote, signal.SIGSTOP)
    pod.processes.zygotes.end_loaded(0)
    until("it has ended", lambda: not is_running(zygote), DEADLINE_SECONDS)
