"""An HTTP server's connections: at most so many, and the idle ones go first.

uvicorn bounds requests, not connections: one that sends nothing costs a descriptor for as long as its client likes.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

from uvicorn.protocols.http.auto import AutoHTTPProtocol

_FULL: Final = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: text/plain\r\nretry-after: 1\r\nconnection: close\r\n"
    b"content-length: 38\r\n\r\nall connections are in use; try again\n"
)
_Base: Any = AutoHTTPProtocol


def limited(most: int) -> type[asyncio.Protocol]:
    """uvicorn's protocol (for `Config(http=…)`), for at most so many connections at a time."""
    known: dict[Any, None] = {}  # the one that has been silent for longest is the first

    class Limited(_Base):  # type: ignore[misc] # which protocol it is depends on what is installed
        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            if len(known) >= most and not _close_an_idle_one(known):
                transport.write(_FULL)
                transport.close()
                return
            known[self] = None

        def data_received(self, data: bytes) -> None:
            if self in known:
                del known[self]
                known[self] = None  # the last now
            if not self.transport.is_closing():
                super().data_received(data)

        def connection_lost(self, exc: Exception | None) -> None:
            known.pop(self, None)
            super().connection_lost(exc)

    return Limited


def _close_an_idle_one(known: dict[Any, None]) -> bool:
    """One without a request, or whose last one is answered."""
    for one in known:
        if one.cycle is None or one.cycle.response_complete:
            del known[one]
            one.transport.abort()
            return True
    return False
