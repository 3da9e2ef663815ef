"""The supervisor's HTTP endpoint: `/healthz`, `/readyz` and `/config` in every pod, `/status` with long-poll in the
leader's. All pods of a group are ready while it accepts requests: none of them serves without the others."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from lockstep_runtime.chaos import pending
from lockstep_runtime.config import ServeConfig
from lockstep_runtime.host import descriptors
from lockstep_runtime.host.connections import limited
from lockstep_runtime.protocol import bus
from lockstep_runtime.protocol.chaos import Inject
from lockstep_runtime.protocol.tokens import Purpose
from lockstep_runtime.supervisor.callers import Callers
from lockstep_runtime.supervisor.member_readiness import MemberReadiness
from lockstep_runtime.supervisor.status_store import StatusStore, parse_seen

POLL_SECONDS: Final = 30.0
MAX_CONNECTIONS: Final = 256
BACKLOG: Final = 32
_encoder: Final = msgspec.json.Encoder()


PassOn = Callable[[Inject], bool]  # hands a fault on purpose to the engine; whether there is one


def create_app(
    readiness: StatusStore | MemberReadiness,
    callers: Callers,
    inject: PassOn | None = None,
    config: ServeConfig | None = None,
) -> Starlette:
    """`readiness`: the board with the status in the leader's pod, the engine's word in the others.

    `callers` may ask, each for its purpose. `inject` is given where faults are allowed; otherwise there is no
    `/inject`. `config` holds no secrets.
    """

    board = readiness if isinstance(readiness, StatusStore) else None

    async def healthz(_request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(_request: Request) -> Response:
        if not (reason := readiness.why_unready):
            return PlainTextResponse("ok\n")
        return PlainTextResponse(f"the group takes no requests: {reason}\n", 503)

    async def status(request: Request) -> Response:
        if not _authorized(request, callers, Purpose.STATUS):
            return PlainTextResponse("a bearer token is needed\n", 401, {"WWW-Authenticate": "Bearer"})
        if board is None:
            return PlainTextResponse("only the leader pod serves the status\n", 404)
        after = request.query_params.get("after")
        try:
            seen = None if after is None else parse_seen(after)
        except ValueError as error:
            return PlainTextResponse(f"{error}\n", 400)
        found = await board.after(seen, POLL_SECONDS)
        return Response(_encoder.encode(found), media_type="application/json")

    async def fence(request: Request) -> Response:
        if not _authorized(request, callers, Purpose.FENCE):
            return PlainTextResponse("a bearer token is needed\n", 401, {"WWW-Authenticate": "Bearer"})
        if board is None:
            return PlainTextResponse("only the leader pod can be fenced\n", 404)
        board.fence(fenced=request.method == "PUT")
        return PlainTextResponse("ok\n")

    async def settings(request: Request) -> Response:
        if not _authorized(request, callers, Purpose.STATUS):
            return PlainTextResponse("a bearer token is needed\n", 401, {"WWW-Authenticate": "Bearer"})
        return Response(_encoder.encode(config), media_type="application/json")

    async def take_fault(request: Request) -> Response:
        if not _authorized(request, callers, Purpose.FAULTS):
            return PlainTextResponse("a bearer token is needed\n", 401, {"WWW-Authenticate": "Bearer"})
        try:
            fault = msgspec.json.decode(await _small_body(request), type=Inject)
        except msgspec.MsgspecError as error:
            return PlainTextResponse(f"no fault that can be injected: {error}\n", 400)
        if why_not := pending.why_not(fault):
            return PlainTextResponse(f"{why_not}\n", 409)
        if inject is None or not inject(fault):
            return PlainTextResponse("there is no engine just now\n", 503)
        return PlainTextResponse("ok\n", 202)

    routes = [Route("/healthz", healthz), Route("/readyz", readyz), Route("/status", status)]
    routes.append(Route("/fence", fence, methods=["PUT", "DELETE"]))
    if config is not None:
        routes.append(Route("/config", settings))
    if inject is not None:
        routes.append(Route("/inject", take_fault, methods=["POST"]))
    return Starlette(routes=routes)


async def _small_body(request: Request) -> bytes:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > bus.MAX_HELLO_BYTES:
            raise msgspec.ValidationError("it is too long")
    return body


def _authorized(request: Request, callers: Callers, purpose: Purpose) -> bool:
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    return scheme.lower() == "bearer" and callers.may(given, purpose)


class StatusServer(uvicorn.Server):
    """On the supervisor's own loop; signals are the supervisor's."""

    def __init__(
        self,
        readiness: StatusStore | MemberReadiness,
        callers: Callers,
        inject: PassOn | None = None,
        config: ServeConfig | None = None,
    ) -> None:
        app = create_app(readiness, callers, inject, config)
        super().__init__(
            uvicorn.Config(
                app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=1,
                http=limited(min(MAX_CONNECTIONS, descriptors.limit() // 3)), backlog=BACKLOG,
            )
        )  # fmt: skip

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def run_on(self, listening: Sequence[socket.socket]) -> None:
        """Serve until `should_exit`."""
        await self.serve(sockets=[*listening])
