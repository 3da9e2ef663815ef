"""Readers of the operator that stands by see the page of the one that works, whose address the Lease tells."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Final

import aiohttp
from aiohttp import web

CONNECT_SECONDS: Final = 3.0
SILENCE_SECONDS: Final = 30.0  # the page that works says something every few seconds
PASSED_ON: Final = "Lockstep-Passed-On"  # such a request goes no further: two operators may each take the other to work


@dataclass(frozen=True, slots=True)
class Leader:
    """The operator that works. `page`: where other operators reach its live page; empty if nowhere."""

    name: str
    page: str = ""


class Elsewhere:
    """Opened with the site, and closed with it."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        self._headers = headers
        self._client: aiohttp.ClientSession | None = None

    async def opened(self, _: web.Application) -> AsyncIterator[None]:
        silence = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=SILENCE_SECONDS)
        async with aiohttp.ClientSession(timeout=silence, auto_decompress=False) as self._client:
            yield

    async def answer(self, request: web.Request, leader: Leader) -> web.StreamResponse:
        """What the operator that works answers; 503 when it can't be asked."""
        if self._client is None or not leader.page or PASSED_ON in request.headers:
            return self._not_here(leader, "and knows nothing of models")
        try:
            async with self._client.get(f"{leader.page}{request.rel_url}", headers={PASSED_ON: "1"}) as answer:
                return await self._copied(request, answer)
        except (aiohttp.ClientError, TimeoutError) as error:
            why = str(error) or "no answer"
            return self._not_here(leader, f"and can't reach the one that works at {leader.page}: {why}")

    async def _copied(self, request: web.Request, answer: aiohttp.ClientResponse) -> web.StreamResponse:
        kept = {"Content-Type": answer.headers.get("Content-Type", "text/plain")}
        response = web.StreamResponse(status=answer.status, headers={**self._headers, **kept})
        await response.prepare(request)
        # Either end may go; a reader asks again, and then of whoever works.
        with contextlib.suppress(ConnectionError, aiohttp.ClientError, TimeoutError, asyncio.IncompleteReadError):
            async for piece in answer.content.iter_any():
                await response.write(piece)
        return response

    def _not_here(self, leader: Leader, why: str) -> web.Response:
        text = f"This operator stands by {why}. The one that works is {leader.name}: ask that pod.\n"
        return web.Response(status=503, text=text, headers={**self._headers, "Retry-After": "2"})
