"""A reverse proxy between an operator and the real API server, which lets a test spoil what they say to each other.

The operator gets plain HTTP and no credentials; upstream the proxy speaks with the kubeconfig's and impersonates the
operator's ServiceAccount, so that the operator may do what it may do in its pod and no more. Watches are streamed.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp
import yaml
from aiohttp import web
from tests.support.cluster_api import client_context
from yarl import URL

START_SECONDS: Final = 10.0
UPSTREAM_SECONDS: Final = 30.0
CLOSING_SECONDS: Final = 0.1  # for transports to be closed by the loop; aiohttp doesn't wait for them
# What differs between two writes that mean the same: times, versions, measurements, what a token is drawn from.
_FLEETING: Final = re.compile(rb'\d{4}-\d\d-\d\dT[\d:.]+Z|"resourceVersion": "\d+"|\d+\.\d+|\d+ ?m?s\b')


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as the operator made it. `url` is path and query."""

    method: str
    url: str
    content_type: str
    body: bytes

    @property
    def writes(self) -> bool:
        return self.method != "GET"

    @property
    def target(self) -> str:
        """Method and object, without the namespace: the same in the lives of two models of the same name. What their
        pods are made from is called by its hash, and their tokens differ."""
        path = re.sub(r"^.*/namespaces/[^/]+/", "", self.url.partition("?")[0]) + self._created
        path = re.sub(r"^((?:controllerrevisions|secrets)/.*)-[0-9a-f]{10}$", r"\1", path)
        return f"{self.method} {path}"

    @property
    def meaning(self) -> str:
        """The same for a write that is tried again, another for every other one."""
        if self._created:  # never made twice, though a token is drawn anew
            return self.target
        digest = hashlib.sha256(_FLEETING.sub(b"", self.body)).hexdigest()[:12]
        return f"{self.target} {digest}"

    @property
    def _created(self) -> str:
        if self.method != "POST":
            return ""
        document = json.loads(self.body)
        return f"/{document['metadata']['name']} {document.get('reason', '')}".rstrip()


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: bytes


class NoAnswerError(Exception):
    """Raised by a plan: the connection is closed instead of an answer."""


Forward = Callable[[], Awaitable[Answer]]
Plan = Callable[[Asked, Forward], Awaitable[Answer]]


async def truthful(asked: Asked, forward: Forward) -> Answer:
    """The plan of an undisturbed run."""
    return await forward()


class ApiProxy:
    """`plan` may be exchanged while it runs. `written` are the writes that the API server was given."""

    def __init__(self, kubeconfig: Path, user: str) -> None:
        config = yaml.safe_load(kubeconfig.read_text())
        self._upstream = config["clusters"][0]["cluster"]["server"]
        self._tls = client_context(config["clusters"][0]["cluster"], config["users"][0]["user"])
        self._user = user
        self.plan: Plan = truthful
        self.watch_lag: Callable[[], float] = lambda: 0.0  # seconds by which each piece of a watch comes late
        self.written: list[Asked] = []
        self.last_write = time.monotonic()
        self.url = ""
        self._watches: list[web.Request] = []  # requests are mappings, and not hashable
        self._up, self._end = threading.Event(), asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),))

    def start(self) -> None:
        self._thread.start()
        assert self._up.wait(START_SECONDS), "the proxy did not start"

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()
        self._loop.close()

    def cut_watches(self) -> None:
        """As an API server ends each from time to time: the operator has to ask for them anew."""
        self._loop.call_soon_threadsafe(self._cut_watches)

    def _cut_watches(self) -> None:
        for request in self._watches:
            if request.transport is not None:
                request.transport.abort()

    async def _serve(self) -> None:
        app = web.Application(client_max_size=2**24)
        app.router.add_route("*", "/{path:.*}", self._handle)
        # A watch of an operator that was killed ends with it.
        runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        connector = aiohttp.TCPConnector(ssl=self._tls, limit=0)
        headers = {"Impersonate-User": self._user}
        async with aiohttp.ClientSession(self._upstream, connector=connector, headers=headers) as self._session:
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            self._up.set()
            await self._end.wait()
            await runner.cleanup()
        await asyncio.sleep(CLOSING_SECONDS)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        kind = request.headers.get("Content-Type", "application/json")
        asked = Asked(request.method, request.raw_path, kind, await request.read())
        if request.query.get("watch") == "true":
            return await self._stream(request, asked)
        try:
            answer = await self.plan(asked, lambda: self._forward(asked))
        except NoAnswerError:
            if request.transport is not None:
                request.transport.abort()
            return web.Response(status=500)  # nobody reads it
        return web.Response(status=answer.status, body=answer.body, content_type="application/json")

    async def _forward(self, asked: Asked) -> Answer:
        if asked.writes:
            self.written.append(asked)
            self.last_write = time.monotonic()
        async with self._request(asked, UPSTREAM_SECONDS) as response:
            return Answer(response.status, await response.read())

    async def _stream(self, request: web.Request, asked: Asked) -> web.StreamResponse:
        async with self._request(asked, None) as upstream:
            response = web.StreamResponse(status=upstream.status, headers={"Content-Type": "application/json"})
            await response.prepare(request)
            self._watches.append(request)
            try:
                async for piece in upstream.content.iter_any():
                    await asyncio.sleep(self.watch_lag())
                    await response.write(piece)
            finally:
                self._watches = [one for one in self._watches if one is not request]
        return response

    def _request(self, asked: Asked, seconds: float | None) -> Any:
        return self._session.request(
            asked.method,
            URL(asked.url, encoded=True),
            data=asked.body or None,
            headers={"Content-Type": asked.content_type, "Accept": "application/json"},
            timeout=aiohttp.ClientTimeout(total=seconds),
        )


def refusal(status: int, reason: str) -> Answer:
    """As an API server words it."""
    document: Mapping[str, Any] = {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "reason": reason,
        "message": f"the test answers {status}",
        "code": status,
    }
    return Answer(status, json.dumps(document).encode())
