"""Communicators over TCP: who may take part, and how a rank leaves."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import pytest
import torch
from tests.support.seed import printed_seed
from tests.support.wait import until

from lockstep_runtime.distributed.errors import CommunicatorAborted, CommunicatorError
from lockstep_runtime.distributed.host_collectives import PIECE_BYTES
from lockstep_runtime.distributed.rendezvous import (
    SCHEME,
    PeerHello,
    PeerList,
    RendezvousClient,
    RendezvousServer,
    admit,
)
from lockstep_runtime.distributed.tcp import HEADER, TcpCommunicator
from lockstep_runtime.protocol.framing import FrameError, encode

HOST: Final = "127.0.0.1"
SECONDS: Final = 30.0


@pytest.fixture
def place() -> Iterator[RendezvousServer]:
    place = RendezvousServer(HOST, 2, "secret")
    yield place
    place.close()


def meeting(place: RendezvousServer, rank: int, token: str = "secret", seconds: float = SECONDS) -> RendezvousClient:
    return RendezvousClient(place.address, rank, 2, token, time.monotonic() + seconds)


def pair() -> tuple[TcpCommunicator, TcpCommunicator]:
    place = RendezvousServer(HOST, 2, "secret")
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda rank: TcpCommunicator(meeting(place, rank)), range(2))
    return first, second


def where(address: str) -> tuple[str, int]:
    host, _, port = address.removeprefix(SCHEME).rpartition(":")
    return host, int(port)


STRANGERS: Final = {
    "silent": b"",
    "of another protocol": b"GET / HTTP/1.1\r\n\r\n",
    "with a frame that never ends": b"\xff\xff\xff\xff",
    "with another token": encode(PeerHello(1, (HOST, 1), bytes(32))),
    "of no message": encode(PeerList([])),
}


@pytest.mark.parametrize("kind", STRANGERS)
def test_strangers_are_dropped_and_the_ranks_still_meet(place: RendezvousServer, kind: str) -> None:
    with socket.create_connection(where(place.address), timeout=SECONDS) as stranger, ThreadPoolExecutor(2) as pool:
        stranger.sendall(STRANGERS[kind])
        for group in pool.map(lambda rank: TcpCommunicator(meeting(place, rank)), range(2)):
            group.close()


@pytest.mark.parametrize("kind", STRANGERS)
def test_a_rank_admits_no_stranger(kind: str) -> None:
    mine, theirs = socket.socketpair()
    with mine, theirs:
        theirs.sendall(STRANGERS[kind])
        assert admit(mine, "secret") is None


def test_a_rank_of_another_token_is_not_let_in(place: RendezvousServer) -> None:
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(TcpCommunicator, meeting(place, rank, token, 2.0))
            for rank, token in ((0, "secret"), (1, "other"))
        ]
        with pytest.raises(CommunicatorError, match="not every rank joined in time"):
            jobs[0].result(SECONDS)
        with pytest.raises(FrameError, match="the connection was closed"):
            jobs[1].result(SECONDS)


def test_a_meeting_can_be_called_off(place: RendezvousServer) -> None:
    off = threading.Event()
    lonely = RendezvousClient(place.address, 0, 2, "secret", time.monotonic() + 600, off.is_set)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(TcpCommunicator, lonely)
        assert not waiting.done()
        off.set()
        with pytest.raises(CommunicatorAborted, match="called off"):
            waiting.result(SECONDS)


def test_a_closed_place_ends_the_meeting(place: RendezvousServer) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(TcpCommunicator, meeting(place, 0))
        place.close()
        with pytest.raises((FrameError, OSError)):
            waiting.result(SECONDS)


def test_nobody_listens_when_all_have_met(place: RendezvousServer) -> None:
    before = listening()
    with ThreadPoolExecutor(2) as pool:
        groups = list(pool.map(lambda rank: TcpCommunicator(meeting(place, rank)), range(2)))
    until("the meeting place to be closed", lambda: not listening() & before, SECONDS)
    assert not listening()
    for group in groups:
        group.close()


def listening() -> set[str]:
    """The addresses at which this process listens on TCP, as the kernel writes them."""
    sockets = {str(entry.readlink()) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()}
    lines = [line.split() for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]]
    return {words[1] for words in lines if words[3] == "0A" and f"socket:[{words[9]}]" in sockets}


def test_who_leaves_is_named() -> None:
    first, second = pair()
    second.close()
    with pytest.raises(CommunicatorError, match="rank 1 left the communicator"):
        first.all_reduce(torch.ones(1))
    first.close()


def test_ranks_that_are_not_at_the_same_collective_notice() -> None:
    first, second = pair()
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(group.all_reduce, torch.ones(size)) for group, size in ((first, 2), (second, 3))]
        with pytest.raises(CommunicatorError, match="rank 1 sent "):
            jobs[0].result(SECONDS)
        first.close()
        with pytest.raises(CommunicatorError, match="rank 0 left"):
            jobs[1].result(SECONDS)
    second.close()


@pytest.mark.parametrize("length", [16, 3 * PIECE_BYTES])
def test_an_abort_releases_both_ranks_whenever_it_comes(length: int) -> None:
    """One rank's abort, at any moment of an endless row of all-reduces, ends both; none is ever waited for again."""
    chance = random.Random(printed_seed())

    def work(group: TcpCommunicator) -> str:
        try:
            while True:
                group.all_reduce(torch.ones(length))
        except CommunicatorError as error:
            return type(error).__name__

    with ThreadPoolExecutor(2) as pool:
        for _ in range(100):
            groups = pair()
            jobs = [pool.submit(work, group) for group in groups]
            time.sleep(chance.uniform(0, 0.002))
            groups[1].release()
            assert [job.result(SECONDS) for job in jobs] == ["CommunicatorError", "CommunicatorAborted"]
            for group in groups:
                group.close()


def test_a_piece_has_a_header_of_its_own() -> None:
    assert HEADER.size % 16 == 0, "so that a tensor behind it is aligned"
