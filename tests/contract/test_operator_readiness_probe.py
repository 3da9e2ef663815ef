"""All pods of a StatefulSet have the same readiness probe: what it is answered by the supervisor of each."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import httpx
import pytest

from lockstep_runtime.config import ServeConfig
from lockstep_runtime.supervisor.board import StatusBoard
from lockstep_runtime.supervisor.readiness import api_ready
from lockstep_runtime.supervisor.server import create_app


@contextlib.asynccontextmanager
async def api(answer: bytes) -> AsyncIterator[int]:
    """A port that answers everything so; without an answer it keeps silent."""

    handled: asyncio.Queue[None] = asyncio.Queue()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        if not answer:
            await reader.read()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        handled.put_nowait(None)

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]
        async with asyncio.timeout(10):
            await handled.get()


async def probe(board: StatusBoard | None, port: int) -> int:
    transport = httpx.ASGITransport(create_app(board, "secret", port))
    async with httpx.AsyncClient(transport=transport, base_url="http://pod") as client:
        return (await client.get("/readyz")).status_code


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", 200),
        (b"HTTP/1.1 503 Service Unavailable\r\n\r\n", 503),
        (b"x" * 4096, 503),
        (b"", 503),
    ],
)
async def test_the_first_pod_is_ready_when_its_api_says_so(
    answer: bytes, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lockstep_runtime.supervisor.readiness.TIMEOUT_SECONDS", 0.3)
    board = StatusBoard(ServeConfig(model="m", served_name="m"))
    async with api(answer) as port:
        assert await probe(board, port) == status


async def test_an_api_that_is_not_there_is_not_ready() -> None:
    assert not await api_ready(1)


async def test_other_pods_are_ready_while_they_live() -> None:
    assert await probe(None, 1) == 200
