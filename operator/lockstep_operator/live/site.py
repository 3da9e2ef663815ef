"""The live page over HTTP: three files and a stream of server-sent events. It can be looked at, and nothing else.

Source: https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import Final

import msgspec
from aiohttp import web

from lockstep_operator.live.board import Board
from lockstep_operator.live.passing_on import Elsewhere, Leader
from lockstep_operator.live.session import Session, read_view

READERS: Final = 32  # pages open at the same time
QUIET_SECONDS: Final = 0.25  # between two messages, at least
BYTES_PER_SECOND: Final = 64 * 1024  # to one page, on average
BEAT_SECONDS: Final = 5.0  # without news there is a sign of life
WRITE_SECONDS: Final = 20.0  # a page that takes nothing for so long is gone
LOCAL_HOSTS: Final = frozenset({"localhost", "127.0.0.1", "[::1]"})
_FILES: Final = {"/": "index.html", "/live.css": "live.css", "/live.js": "live.js"}
_TYPES: Final = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
_HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def site(
    board: Board,
    *,
    local: bool,
    elsewhere: Callable[[], Leader | None] = lambda: None,
    now: Callable[[], float] = time.time,
) -> web.Application:
    """`local`: only whoever is on this machine, or forwards a port to it, may look. A name that a foreign page has
    pointed to this address by DNS is refused then.

    `elsewhere` names the operator that works, while this one stands by; readers are passed on to it."""
    readers, others = asyncio.Semaphore(READERS), Elsewhere(_HEADERS)

    @web.middleware
    async def guard(request: web.Request, handler: _Handler) -> web.StreamResponse:
        if local and _hostname(request.host) not in LOCAL_HOSTS:
            text = "This page is served to localhost alone: forward a port to it, or set livePage.access to Cluster.\n"
            return web.Response(status=403, text=text, headers=_HEADERS)
        if leader := elsewhere():
            return await others.answer(request, leader)
        return await handler(request)

    async def feed(request: web.Request) -> web.StreamResponse:
        try:
            session = Session(board, read_view(dict(request.query)))
        except msgspec.ValidationError as error:
            return web.Response(status=400, text=f"{error}\n", headers=_HEADERS)
        if readers.locked():
            text = f"{READERS} pages are open already; close one.\n"
            return web.Response(status=503, text=text, headers={**_HEADERS, "Retry-After": "10"})
        async with readers:
            response = web.StreamResponse(headers={**_HEADERS, "Content-Type": "text/event-stream; charset=utf-8"})
            await response.prepare(request)
            with contextlib.suppress(ConnectionError, TimeoutError):  # the page was closed
                await _stream(response, board, session, now)
            return response

    app = web.Application(middlewares=[guard])
    app.cleanup_ctx.append(others.opened)
    app.add_routes([web.get(path, _file(name)) for path, name in _FILES.items()])
    app.add_routes([web.get("/feed", feed)])
    return app


async def serve(app: web.Application, *, port: int, local: bool) -> web.AppRunner:
    """Raises OSError when the port is taken. The caller cleans the runner up; open pages don't hold that up."""
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
    await runner.setup()
    try:
        await web.TCPSite(runner, host="127.0.0.1" if local else None, port=port).start()
    except OSError:
        await runner.cleanup()
        raise
    return runner


async def _stream(response: web.StreamResponse, board: Board, session: Session, now: Callable[[], float]) -> None:
    """Until the page is closed, which a write finds out."""
    while True:
        event = b"data: " + msgspec.json.encode(session.message(now())) + b"\n\n"
        async with asyncio.timeout(WRITE_SECONDS):
            await response.write(event)
        await asyncio.sleep(max(QUIET_SECONDS, len(event) / BYTES_PER_SECOND))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(BEAT_SECONDS):
                await board.news(session.sent)


def _file(name: str) -> _Handler:
    body = (files("lockstep_operator.live") / "page" / name).read_bytes()
    kind = _TYPES[name.rpartition(".")[2]]

    async def send(_: web.Request) -> web.Response:
        return web.Response(body=body, content_type=kind, charset="utf-8", headers=_HEADERS)

    return send


def _hostname(host: str) -> str:
    return host if host.endswith("]") else host.rpartition(":")[0] or host
