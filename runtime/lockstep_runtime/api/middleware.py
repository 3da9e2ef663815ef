"""What stands before every request: the API keys, a bound on requests at once, the hint to move on while draining."""

from __future__ import annotations

from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lockstep_runtime.api.errors import ApiError, unavailable
from lockstep_runtime.api.keys import ApiKeys

GUARDED = ("/v1/", "/tokenize", "/detokenize")  # what asks for work, or tells of the model


class Guard:
    """ASGI middleware. Counts a request until its last byte is sent, streams included.

    Args:
        draining: whether clients should open their next connection to another server.
        refused: called with every error that is sent from here.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: ApiKeys,
        max_requests: int,
        draining: Callable[[], bool],
        refused: Callable[[ApiError], object],
    ) -> None:
        self._app = app
        self._keys = keys
        self._max_requests = max_requests
        self._draining = draining
        self._refused = refused
        self._requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        if self._draining():
            send = _closing(send)
        if not scope["path"].startswith(GUARDED):
            return await self._app(scope, receive, send)
        try:
            self._check(scope)
        except ApiError as error:
            self._refused(error)
            return await error.response()(scope, receive, send)
        self._requests += 1
        try:
            return await self._app(scope, receive, send)
        finally:
            self._requests -= 1

    def _check(self, scope: Scope) -> None:
        if self._keys.asked_for:
            self._authenticate(Headers(scope=scope).get("authorization", ""))
        if self._requests >= self._max_requests:
            raise unavailable(f"{self._requests} requests are under way; no more are taken", 1, "too_many_requests")

    def _authenticate(self, header: str) -> None:
        scheme, _, given = header.partition(" ")
        if scheme.lower() != "bearer" or not given:
            raise ApiError(401, "An API key is needed: send `Authorization: Bearer <key>`", code="missing_api_key")
        if not self._keys.accepts(given.strip().encode("latin-1", "replace")):
            raise ApiError(401, "The API key is wrong", code="invalid_api_key")


class HeadAsGet:
    """ASGI middleware. HEAD is GET whose body the server keeps to itself (RFC 9110, 9.3.2)."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        await self._app(scope, receive, send)


def _closing(send: Send) -> Send:
    async def closing(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message)["Connection"] = "close"
        await send(message)

    return closing
