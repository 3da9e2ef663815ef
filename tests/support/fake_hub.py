"""A hub on this machine: answers as huggingface.co does what snapshot_download asks, and fails as it is told."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

COMMIT: Final = "0123456789abcdef0123456789abcdef01234567"


@dataclass(frozen=True, slots=True)
class Failure:
    """Of requests whose path holds `where`. `headers` name the kind, as the hub's do; status 0 cuts the connection."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    where: str = ""


@dataclass
class FakeHub:
    folder: Path  # the one repository's files
    url: str = ""
    failure: Failure | None = None
    asked: list[str] = field(default_factory=list)

    def files(self) -> dict[str, Path]:
        return {str(path.relative_to(self.folder)): path for path in self.folder.rglob("*") if path.is_file()}


@contextlib.contextmanager
def fake_hub(folder: Path) -> Iterator[FakeHub]:
    hub = FakeHub(folder)

    class Handler(_Handler):
        the_hub = hub

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    the_hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.the_hub.asked.append(path)
        failure = self.the_hub.failure
        if failure and failure.where in path:
            return self._cut() if not failure.status else self._answer(failure.status, b"{}", failure.headers)
        if "/tree/" in path:
            return self._json([self._entry(name, file) for name, file in self.the_hub.files().items()])
        if path.startswith("/api/models/"):
            siblings = [{"rfilename": name} for name in self.the_hub.files()]
            return self._json({"id": "org/model", "sha": COMMIT, "siblings": siblings, "private": False})
        return self._file(path.partition(f"/resolve/{COMMIT}/")[2])

    def do_CONNECT(self) -> None:
        """As a proxy: it lets nobody through."""
        failure = self.the_hub.failure
        self._answer(failure.status if failure else 502, b"", {})

    def _file(self, name: str) -> None:
        found = self.the_hub.files().get(name)
        if found is None:
            return self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        content = found.read_bytes()
        return self._answer(200, content, {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": COMMIT})

    def _entry(self, name: str, file: Path) -> dict[str, object]:
        content = file.read_bytes()
        return {"type": "file", "path": name, "size": len(content), "oid": _oid(content)}

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _cut(self) -> None:
        """A reset, as of a host that goes away."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def finish(self) -> None:
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, format: str, *args: object) -> None:
        """pytest's output is for the tests."""


def _oid(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()
