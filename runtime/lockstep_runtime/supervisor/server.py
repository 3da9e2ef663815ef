"""The supervisor's HTTP endpoint: `/healthz` and `/readyz` in every pod, `/status` with long-poll in the leader's."""

from __future__ import annotations

import contextlib
import hmac
import socket
from collections.abc import Iterator
from typing import Final

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from lockstep_runtime.supervisor.board import StatusBoard
from lockstep_runtime.supervisor.readiness import api_ready
from lockstep_runtime.wire import API_PORT

POLL_SECONDS: Final = 30.0
MAX_CONNECTIONS: Final = 256
_encoder: Final = msgspec.json.Encoder()


def create_app(board: StatusBoard | None, token: str, api_port: int = API_PORT) -> Starlette:
    """`board` is None in pods other than the leader's: they have no `/status`, and are ready while they live."""

    async def healthz(_request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(_request: Request) -> Response:
        if board is None or await api_ready(api_port):
            return PlainTextResponse("ok\n")
        return PlainTextResponse("the group doesn't take requests\n", 503)

    async def status(request: Request) -> Response:
        if not _authorized(request, token):
            return PlainTextResponse("a bearer token is needed\n", 401, {"WWW-Authenticate": "Bearer"})
        if board is None:
            return PlainTextResponse("only the leader pod serves the status\n", 404)
        after = request.query_params.get("after")
        if after is not None and not (after.isascii() and after.isdigit() and len(after) <= 18):
            return PlainTextResponse("after must be a revision: a whole number\n", 400)
        found = await board.after(None if after is None else int(after), POLL_SECONDS)
        return Response(_encoder.encode(found), media_type="application/json")

    return Starlette(routes=[Route("/healthz", healthz), Route("/readyz", readyz), Route("/status", status)])


def _authorized(request: Request, token: str) -> bool:
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(given.encode(), token.encode())


class StatusServer(uvicorn.Server):
    """On the supervisor's own loop; signals are the supervisor's."""

    def __init__(self, board: StatusBoard | None, token: str, api_port: int = API_PORT) -> None:
        app = create_app(board, token, api_port)
        super().__init__(
            uvicorn.Config(
                app, log_config=None, access_log=False, lifespan="off", limit_concurrency=MAX_CONNECTIONS,
                timeout_graceful_shutdown=1,
            )
        )  # fmt: skip

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def run_on(self, listening: socket.socket) -> None:
        """Serve until `should_exit`."""
        await self.serve(sockets=[listening])
