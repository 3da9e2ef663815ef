"""Images at other hosts: a real server on this machine, and every way in which it must not be reached."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from tests.support.vision import encoded, picture

from lockstep_runtime.api.errors import ApiError
from lockstep_runtime.api.images.content import RemoteImage, locate
from lockstep_runtime.api.images.fetch import ImageFetcher, is_public

CAT = encoded(picture(64, 64))
Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Site:
    port: int = 0
    requests: list[str] = field(default_factory=list)
    resolved: list[str] = field(default_factory=list)
    addresses: list[str] = field(default_factory=lambda: ["127.0.0.1"])

    async def resolve(self, host: str, port: int) -> list[str]:
        self.resolved.append(host)
        return self.addresses

    def fetcher(self, **changes: Any) -> ImageFetcher:
        given: dict[str, Any] = {
            "hosts": {"cats.example"},
            "seconds": 5.0,
            "most_bytes": 1 << 20,
            "may_reach": lambda _: True,
        }
        return ImageFetcher(resolve=self.resolve, **given | changes)

    def url(self, path: str = "/cat.png") -> RemoteImage:
        found = locate(f"http://cats.example:{self.port}{path}")
        assert isinstance(found, RemoteImage)
        return found


@asynccontextmanager
async def site(*answer: bytes, then: Answer | None = None) -> AsyncIterator[Site]:
    found = Site()
    clients: list[tuple[asyncio.StreamWriter, asyncio.Task[Any] | None]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        clients.append((writer, asyncio.current_task()))
        found.requests.append((await reader.readuntil(b"\r\n\r\n")).decode())
        try:
            for part in answer:
                writer.write(part)
            await writer.drain()
            if then is not None:
                await then(writer)
        except ConnectionError:
            pass
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    found.port = server.sockets[0].getsockname()[1]
    try:
        yield found
    finally:
        server.close()
        for writer, _ in clients:
            writer.transport.abort()
        await asyncio.gather(*(task for _, task in clients if task), return_exceptions=True)
        await asyncio.sleep(0)


def ok(body: bytes, length: int | None = None) -> bytes:
    return f"HTTP/1.1 200 OK\r\nContent-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body


async def test_an_image_of_an_allowed_host_is_fetched_from_the_address_that_was_looked_at() -> None:
    async with site(ok(CAT)) as there:
        assert await there.fetcher().fetch(there.url("/a/cat.png?size=1#part")) == CAT
    assert there.resolved == ["cats.example"]
    [request] = there.requests
    assert request.startswith("GET /a/cat.png?size=1 HTTP/1.1\r\n")
    assert f"host: cats.example:{there.port}\r\n" in request.lower()


async def refusal(fetcher: ImageFetcher, image: RemoteImage) -> str:
    with pytest.raises(ApiError) as error:
        await fetcher.fetch(image)
    assert error.value.status == 400
    assert "data URI" in error.value.message
    return error.value.message


async def test_other_hosts_are_neither_resolved_nor_reached() -> None:
    async with site(ok(CAT)) as there:
        message = await refusal(there.fetcher(hosts={"dogs.example", "birds.example"}), there.url())
        assert "birds.example, dogs.example only" in message
        assert "none are fetched" in await refusal(there.fetcher(hosts=()), there.url())
    assert there.resolved == there.requests == []


@pytest.mark.parametrize("addresses", [["127.0.0.1"], [], ["93.184.216.34", "10.0.0.1"]])
async def test_a_name_with_any_private_address_is_not_reached(addresses: list[str]) -> None:
    async with site(ok(CAT)) as there:
        there.addresses = addresses
        assert "not a public one" in await refusal(there.fetcher(may_reach=is_public), there.url())
    assert there.requests == []


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("93.184.216.34", True), ("2606:2800:220:1:248:1893:25c8:1946", True),
        ("127.0.0.1", False), ("10.1.2.3", False), ("172.16.0.1", False), ("192.168.1.1", False),
        ("169.254.169.254", False), ("100.64.0.1", False), ("0.0.0.0", False), ("255.255.255.255", False),
        ("224.0.0.1", False), ("::1", False), ("::", False), ("fe80::1%eth0", False), ("fd00::1", False),
        ("ff02::1", False), ("::ffff:10.0.0.1", False), ("::ffff:127.0.0.1", False), ("2002:7f00:1::", False),
        ("64:ff9b:1::1", False),
    ],
)  # fmt: skip
def test_public_addresses(address: str, expected: bool) -> None:
    assert is_public(address) is expected


async def test_redirects_are_not_followed() -> None:
    async with site(b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1/\r\nContent-Length: 0\r\n\r\n") as there:
        assert "it answers 302; redirects are not followed" in await refusal(there.fetcher(), there.url())
    assert len(there.requests) == 1


async def test_what_is_too_large_is_left() -> None:
    async with site(ok(bytes(40_000), 10**9)) as there:
        assert "larger than 30000 bytes" in await refusal(there.fetcher(most_bytes=30_000), there.url())


async def test_what_is_too_slow_is_left() -> None:
    async def drip(writer: asyncio.StreamWriter) -> None:
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.05)

    async with site(ok(b"", 10**6), then=drip) as there:
        assert "did not arrive within 0.4 s" in await refusal(there.fetcher(seconds=0.4), there.url())


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # httpx leaves the socket of a failed handshake to gc
async def test_names_that_lead_nowhere_and_broken_answers() -> None:
    async def nowhere(host: str, port: int) -> list[str]:
        raise OSError("no such name")

    async with site(b"SSH-2.0-OpenSSH\r\n\r\n") as there:
        assert "no such name" in await refusal(
            ImageFetcher({"cats.example"}, 5.0, 1000, nowhere, lambda _: True), there.url()
        )  # fmt: skip
        assert "RemoteProtocolError" in await refusal(there.fetcher(), there.url())
        broken = RemoteImage(f"https://cats.example:{there.port}/", "https", "cats.example", there.port)
        assert "can't be fetched from cats.example" in await refusal(there.fetcher(), broken)
    gone = there.url()
    assert "ConnectError" in await refusal(there.fetcher(), gone)
    gc.collect()
