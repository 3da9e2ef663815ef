"""Who may have how many file descriptors, and which connections of an HTTP server go first."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import resource
import socket
from collections.abc import AsyncIterator
from multiprocessing.queues import Queue

import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from lockstep_runtime.host import descriptors
from lockstep_runtime.host.connections import limited
from lockstep_runtime.host.descriptors import MOST, OWN, shares

MOST_CONNECTIONS = 4


@given(limit=st.integers(128, MOST), peers=st.integers(2, 16))
def test_what_ranks_and_the_process_need_is_nobody_elses(limit: int, peers: int) -> None:
    found = shares(limit, peers)
    taken = found.clients + found.strangers + 2 * found.backlog + 2 * peers
    assert taken + OWN <= limit or found.clients == 8
    assert min(found.clients, found.strangers, found.backlog) >= 8


def test_few_descriptors_are_few_clients() -> None:
    assert shares(256, 4).clients >= 64
    assert shares(1024, 4).clients >= 500
    assert shares(20_000, 4).clients >= 15_000


def _raised(soft: int, hard: int, told: Queue[tuple[int, int]]) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    told.put((descriptors.raise_limit(), resource.getrlimit(resource.RLIMIT_NOFILE)[0]))


@pytest.mark.parametrize(("soft", "hard", "found"), [(256, 1024, 1024), (256, 256, 256), (512, 4096, 4096)])
def test_the_soft_limit_is_raised_to_the_hard_one(soft: int, hard: int, found: int) -> None:
    context = multiprocessing.get_context("spawn")
    told: Queue[tuple[int, int]] = context.Queue()
    process = context.Process(target=_raised, args=(soft, hard, told))
    process.start()
    assert told.get(timeout=60) == (found, found)
    process.join(60)


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def ask(self, path: str) -> None:
        self.writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())

    async def status(self) -> int:
        """0: the server has closed the connection."""
        async with asyncio.timeout(30):
            try:
                head = await self.reader.readuntil(b"\r\n\r\n")
            except (asyncio.IncompleteReadError, ConnectionResetError):
                return 0
            return int(head.split()[1])

    async def get(self, path: str) -> int:
        self.ask(path)
        found = await self.status()
        if found == 200:
            await self.reader.readexactly(2)
        return found


class Server:
    """For MOST_CONNECTIONS. `/slow` waits for `go`."""

    def __init__(self) -> None:
        self.go, self.slow = asyncio.Event(), 0
        self.clients: list[Client] = []
        self.listening = socket.create_server(("127.0.0.1", 0))

    async def connect(self) -> Client:
        port = self.listening.getsockname()[1]
        self.clients.append(Client(*await asyncio.open_connection("127.0.0.1", port)))
        return self.clients[-1]

    async def answer(self, request: Request) -> Response:
        if request.url.path == "/slow":
            self.slow += 1
            await self.go.wait()
        return PlainTextResponse("ok")

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        app = Starlette(routes=[Route("/{path}", self.answer)])
        http = uvicorn.Server(
            uvicorn.Config(app, log_config=None, lifespan="off", http=limited(MOST_CONNECTIONS), backlog=16)
        )
        task = asyncio.create_task(http.serve([self.listening]))
        try:
            yield
        finally:
            self.go.set()
            for one in self.clients:
                one.writer.close()
                with contextlib.suppress(ConnectionError):
                    await one.writer.wait_closed()
            http.should_exit = True
            await task


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    found = Server()
    with found.listening:
        async with found.running():
            yield found


async def test_who_has_been_silent_for_longest_gives_way(server: Server) -> None:
    clients = [await server.connect() for _ in range(MOST_CONNECTIONS)]
    assert await clients[0].get("/quick") == 200
    assert await (await server.connect()).get("/quick") == 200
    assert await clients[1].status() == 0  # the first has spoken since
    assert await clients[0].get("/quick") == 200


async def test_a_request_that_is_being_answered_is_never_cut_off(server: Server) -> None:
    busy = [await server.connect() for _ in range(MOST_CONNECTIONS)]
    for one in busy:
        one.ask("/slow")
    async with asyncio.timeout(30):
        while server.slow < MOST_CONNECTIONS:  # noqa: ASYNC110 - the server says nothing of it
            await asyncio.sleep(0.001)
    assert await (await server.connect()).status() == 503
    server.go.set()
    assert [await one.status() for one in busy] == [200] * MOST_CONNECTIONS


async def test_a_flood_of_idle_connections_keeps_nobody_out(server: Server) -> None:
    for _ in range(20 * MOST_CONNECTIONS):
        await server.connect()
    assert await (await server.connect()).get("/quick") == 200
