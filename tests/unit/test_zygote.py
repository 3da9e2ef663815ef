"""Both ends of what a supervisor and a zygote send each other."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from lockstep_runtime.protocol.progress_record import new_memory
from lockstep_runtime.zygote.client import ZygoteClient, ZygoteLostError
from lockstep_runtime.zygote.messages import (
    Forked,
    ForkFailed,
    ForkRequest,
    ZygoteGoneError,
    decode_reply,
    encode_reply,
    receive_ready,
    receive_request,
    send_ready,
    send_request,
)
from lockstep_runtime.zygote.pool import ZygotePool
from lockstep_runtime.zygote.server import serve_forks

DEADLINE_SECONDS = 60.0
NOBODY = 65532
NO_ROOM = ForkFailed("no process could be forked: Resource temporarily unavailable")


class Writes:
    """An entry point whose children write what they were told to their progress record."""

    def prepare(self) -> None:
        pass

    def run(self, request: ForkRequest) -> None:
        os.write(request.progress, f"{request.rank} {request.incarnation}".encode())


@pytest.fixture
def memory() -> Iterator[int]:
    descriptor = new_memory("test")
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def client() -> Iterator[ZygoteClient]:
    found = ZygoteClient()
    with found.theirs:
        yield found
    found.end()


def a_request(memory: int, start: int | None = None, zygote: int | None = None) -> ForkRequest:
    return ForkRequest(rank=3, incarnation="i", progress=memory, cache=memory, start=start, zygote=zygote)


def inodes(request: ForkRequest) -> dict[str, int]:
    return {name: os.fstat(descriptor).st_ino for name, descriptor in request.files().items()}


def close(request: ForkRequest) -> None:
    for descriptor in request.files().values():
        os.close(descriptor)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def fork(client: ZygoteClient, memory: int) -> int:
    return asyncio.run(client.fork(0.2, a_request(memory)))


@contextlib.contextmanager
def zygote(*, with_standby: bool = False, processes: int | None = None) -> Iterator[socket.socket]:
    """The supervisor's end; `processes`: as many are allowed."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if not pid:
        try:
            ours.close()
            if processes is not None:
                resource.setrlimit(resource.RLIMIT_NPROC, (processes, processes))
                if os.getuid() == 0:
                    os.setuid(NOBODY)  # to root the limit does not apply
            serve_forks(theirs, Writes(), with_standby=with_standby)
        finally:
            os._exit(1)
    theirs.close()
    with ours:
        ours.settimeout(DEADLINE_SECONDS)
        yield ours
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_files_arrive_under_their_names(memory: int) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    wait, start = os.pipe()
    with ours, theirs:
        for zygote_socket in (None, ours.fileno()):
            sent = a_request(memory, wait, zygote_socket)
            send_request(ours, sent)
            received = receive_request(theirs)
            assert (received.rank, received.incarnation) == (3, "i")
            assert inodes(received) == inodes(sent)
            assert not set(received.files().values()) & set(sent.files().values())
            close(received)
    os.close(wait)
    os.close(start)


def test_a_child_starts_once_it_is_told_to_and_knows_who_it_is(memory: int) -> None:
    with zygote() as requests:
        wait, start = os.pipe()
        send_request(requests, a_request(memory, wait))
        reply = decode_reply(requests.recv(4096))
        assert isinstance(reply, Forked)
        os.close(wait)
        assert os.pread(memory, 3, 0) == b"\0\0\0"
        os.write(start, b"!")
        os.close(start)
        with contextlib.suppress(ChildProcessError):  # unless another test has made this process take orphans
            os.waitpid(reply.pid, 0)
        assert asyncio.run(written(memory)) == b"3 i"


async def written(memory: int) -> bytes:
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not (found := os.pread(memory, 3, 0).rstrip(b"\0")):  # noqa: ASYNC110 - memory has no event
            await asyncio.sleep(0.01)
    return found


def test_a_zygote_that_the_kernel_gives_no_process_says_so_and_lives_on(memory: int) -> None:
    with zygote(processes=0) as requests:
        for _ in range(2):
            send_request(requests, a_request(memory, memory))
            assert decode_reply(requests.recv(4096)) == NO_ROOM


def test_a_zygote_exits_as_it_should_when_nobody_waits_for_its_reply(memory: int) -> None:
    with zygote() as requests:
        requests.shutdown(socket.SHUT_RD)
        wait, start = os.pipe()
        send_request(requests, a_request(memory, wait))
        os.close(wait)
        os.close(start)


def test_a_child_of_which_nobody_learned_in_time_is_not_told_to_start(client: ZygoteClient, memory: int) -> None:
    with pytest.raises(ZygoteLostError, match=r"no reply within 0\.2 s"):
        fork(client, memory)
    request = receive_request(client.theirs)
    assert request.start is not None
    assert os.read(request.start, 1) == b""
    close(request)


def test_a_zygote_that_has_ended_is_never_ready(memory: int) -> None:
    client = ZygoteClient()
    client.theirs.close()
    assert not asyncio.run(client.wait_until_ready())
    with pytest.raises(ZygoteLostError):
        fork(client, memory)
    client.end()


def test_a_late_reply_is_taken_for_that_to_no_other_request(client: ZygoteClient, memory: int) -> None:
    with pytest.raises(ZygoteLostError, match="no reply"):
        fork(client, memory)
    with contextlib.suppress(OSError):
        client.theirs.send(encode_reply(Forked(4711)))
    with pytest.raises(ZygoteLostError, match="doesn't reply"):
        fork(client, memory)


def test_a_zygote_to_which_the_kernel_gives_no_process_is_asked_again(client: ZygoteClient, memory: int) -> None:
    client.theirs.send(encode_reply(NO_ROOM))
    with pytest.raises(OSError, match="Resource temporarily unavailable") as caught:
        fork(client, memory)
    assert not isinstance(caught.value, ZygoteLostError)
    client.theirs.send(encode_reply(Forked(4711)))
    assert fork(client, memory) == 4711


async def test_an_end_releases_who_waits_for_a_reply(memory: int) -> None:
    client = ZygoteClient()
    with client.theirs:
        waiting = asyncio.create_task(client.fork(60.0, a_request(memory)))
        await asyncio.sleep(0)  # it has begun to wait
        client.end()
        async with asyncio.timeout(10):
            with pytest.raises(ZygoteLostError):
                await waiting


async def test_an_end_releases_who_waits_until_it_is_ready() -> None:
    before = open_files()
    client = ZygoteClient()
    with client.theirs:
        waiting = asyncio.create_task(client.wait_until_ready())
        await asyncio.sleep(0)
        client.end()
        async with asyncio.timeout(10):
            assert not await waiting
    assert open_files() == before


async def test_a_zygote_of_the_pod_is_asked_once_it_is_ready(memory: int) -> None:
    pool = ZygotePool()
    client = pool.renew()
    with client.theirs:
        waiting = asyncio.create_task(pool.wait_until_ready())
        await asyncio.sleep(0)
        with pytest.raises(ZygoteLostError, match="no zygote that is ready"):
            await pool.fork(a_request(memory))
        send_ready(client.theirs)
        async with asyncio.timeout(10):
            assert await waiting, "its word was not taken for a reply"
        client.theirs.send(encode_reply(Forked(4711)))
        assert await pool.fork(a_request(memory)) == 4711
    pool.dismiss()
    await pool.end_all_loaded()


def test_who_says_that_it_is_ready_sends_a_handle_of_itself() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    with ours, theirs:
        with pytest.raises(BlockingIOError):
            receive_ready(ours)
        pidfd = os.pidfd_open(os.getpid())
        send_ready(theirs, pidfd)
        os.close(pidfd)
        [received] = receive_ready(ours)
        assert f"Pid:\t{os.getpid()}" in Path(f"/proc/self/fdinfo/{received}").read_text()
        os.close(received)
        theirs.close()
        with pytest.raises(ZygoteGoneError):
            receive_ready(ours)
