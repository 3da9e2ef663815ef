"""Asks the API beside this supervisor whether the group serves.

All pods of a StatefulSet have the same probes, so the readiness probe asks the supervisor, and in the leader's pod the
supervisor asks the API, which knows of progress and not only of a live process.
"""

from __future__ import annotations

import asyncio
from typing import Final

TIMEOUT_SECONDS: Final = 2.0  # less than the probe's own
_MAX_STATUS_LINE: Final = 256


async def api_ready(port: int) -> bool:
    """Whether `GET /ready` on this port of this pod answers 200 in time."""
    try:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            return b" 200 " in await _status_line(port)
    except (OSError, TimeoutError, ValueError):
        return False


async def _status_line(port: int) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=_MAX_STATUS_LINE)
    try:
        writer.write(b"GET /ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        await writer.drain()
        return await reader.readline()
    finally:
        writer.close()
