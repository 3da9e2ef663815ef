"""A hub on this machine: answers as huggingface.co does when a model is resolved, listed and fetched, or fails as told.

As there: small files come from the hub itself with git's id as their ETag, those in Git LFS (here: safetensors) from
another host behind a redirect; ranges are served; who may not see a repository is told 401 or 403 with the hub's codes.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import socket
import struct
import threading
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pytest
from huggingface_hub import close_session

COMMIT: Final = "0123456789abcdef0123456789abcdef01234567"
MODEL: Final = "org/model"


@dataclass(frozen=True, slots=True)
class Failure:
    """Of requests whose path holds `where`. `headers` name the kind, as the hub's do; status 0 cuts the connection, 200
    cuts it after so many bytes of the body."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    where: str = ""
    after: int = 0


@dataclass
class FakeHub:
    """`token`: without it nobody sees the repository; `gated`: nor with it."""

    folder: Path  # the one repository's files, the same at every commit
    url: str = ""
    failure: Failure | None = None
    token: str = ""
    gated: bool = False
    no_ranges: bool = False
    wrong: dict[str, bytes] = field(default_factory=dict)  # what is sent in a file's place
    silent: float = 0.0  # seconds before it answers
    slow: float = 0.0  # seconds between two pieces of a body
    piece: int = 64 * 1024  # bytes
    revisions: dict[str, str] = field(default_factory=lambda: {"main": COMMIT})
    asked: list[str] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)  # bytes of each file
    tokens: list[tuple[str, str]] = field(default_factory=list)  # the host that was asked, and its Authorization

    def files(self) -> dict[str, Path]:
        return {str(path.relative_to(self.folder)): path for path in self.folder.rglob("*") if path.is_file()}

    @property
    def storage_url(self) -> str:
        """Another origin than `url`, on this machine."""
        return self.url.replace("127.0.0.1", "localhost")

    def commits(self) -> set[str]:
        return set(self.revisions.values())


@contextlib.contextmanager
def fresh_client(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The library keeps its HTTP client, with the proxies of the environment that it was made in."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    close_session()
    yield
    close_session()


@contextlib.contextmanager
def fake_hub(folder: Path, host: str = "127.0.0.1") -> Iterator[FakeHub]:
    """`host`: the address that it listens on."""
    hub = FakeHub(folder)

    class Handler(_Handler):
        the_hub = hub

    with http.server.ThreadingHTTPServer((host, 0), Handler) as server:
        server.daemon_threads = True
        server.block_on_close = False
        hub.url = f"http://{host}:{server.server_port}"
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
        hub = self.the_hub
        path, _, query = self.path.partition("?")
        path = urllib.parse.unquote(path)
        hub.asked.append(path)
        time.sleep(hub.silent)
        hub.tokens.append((self.headers["Host"].partition(":")[0], self.headers.get("Authorization", "")))
        failure = hub.failure
        if failure and failure.where in path and not failure.after:
            return self._cut() if not failure.status else self._answer(failure.status, b"{}", failure.headers)
        if path.startswith("/storage/"):
            return self._stored(path.rpartition("/")[2])
        if refusal := self._refusal(path):
            return self._answer(*refusal)
        if "/tree/" in path:
            return self._json([_entry(name, file) for name, file in self.the_hub.files().items()])
        if path.startswith(f"/api/models/{MODEL}"):
            return self._info(path, with_files="blobs" in urllib.parse.parse_qs(query))
        return self._resolve(*path.partition("/resolve/")[2].partition("/")[::2])

    def do_CONNECT(self) -> None:
        """As a proxy: it lets nobody through."""
        failure = self.the_hub.failure
        self._answer(failure.status if failure else 502, b"", {})

    def _refusal(self, path: str) -> tuple[int, bytes, dict[str, str]] | None:
        hub, given = self.the_hub, self.headers.get("Authorization", "").removeprefix("Bearer ")
        if given and given != hub.token:
            return 401, b"{}", {"X-Error-Message": "Invalid credentials in Authorization header"}
        hidden = not path.startswith((f"/api/models/{MODEL}", f"/{MODEL}/")) or (hub.token and not given)
        if hidden:  # whoever gave no token might see it with one
            return (
                404 if given else 401,
                b"{}",
                {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"},
            )
        if hub.gated and "/resolve/" in path:
            words = "Access to model org/model is restricted"
            return 403 if given else 401, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": words}
        return None

    def _info(self, path: str, *, with_files: bool) -> None:
        commit = self._commit(path.partition("/revision/")[2] or "main")
        if commit is None:
            self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
            return
        siblings = [_sibling(name, file, with_files=with_files) for name, file in self.the_hub.files().items()]
        answer = {
            "id": MODEL,
            "modelId": MODEL,
            "sha": commit,
            "siblings": siblings,
            "private": bool(self.the_hub.token),
        }
        self._json(answer)

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _commit(self, revision: str) -> str | None:
        known = self.the_hub.revisions
        return known.get(revision) or (revision if revision in known.values() else None)

    def _resolve(self, revision: str, name: str) -> None:
        commit, found = self._commit(revision), self.the_hub.files().get(name)
        if commit is None or found is None:
            code = "RevisionNotFound" if commit is None else "EntryNotFound"
            self._answer(404, b"", {"X-Error-Code": code, "X-Repo-Commit": commit or ""})
            return
        content = found.read_bytes()
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if not _in_lfs(name):
            self._content(name, content, {**headers, "ETag": f'"{git_id(content)}"'})
            return
        linked = {"X-Linked-Etag": f'"{sha256(content)}"', "X-Linked-Size": str(len(content))}
        location = f"{self.the_hub.storage_url}/storage/{name}?Signature=x"
        self._answer(302, b"Found", {**headers, **linked, "Location": location})

    def _stored(self, name: str) -> None:
        content = self.the_hub.files()[name].read_bytes()
        self._content(name, content, {"ETag": f'"{sha256(content)}"', "Accept-Ranges": "bytes"})

    def _content(self, name: str, content: bytes, headers: dict[str, str]) -> None:
        hub = self.the_hub
        content = hub.wrong.get(name, content)
        asked = self.headers.get("Range", "")
        if not asked or hub.no_ranges:
            self._body(name, 200, content, headers)
            return
        start = int(asked.removeprefix("bytes=").partition("-")[0])
        if start >= len(content):
            self._answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            return
        span = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._body(name, 206, content[start:], {**headers, "Content-Range": span})

    def _body(self, name: str, status: int, content: bytes, headers: dict[str, str]) -> None:
        hub, failure = self.the_hub, self.the_hub.failure
        self._head(status, {"Content-Length": str(len(content)), **headers})
        if self.command == "HEAD":
            return
        cut = failure.after if failure and failure.after and failure.where in self.path else len(content)
        for start in range(0, min(cut, len(content)), hub.piece):
            piece = content[start : min(start + hub.piece, cut)]
            self.wfile.write(piece)
            hub.sent[name] = hub.sent.get(name, 0) + len(piece)
            time.sleep(hub.slow)
        if cut < len(content):
            self._cut()

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self._head(status, {"Content-Length": str(len(body)), **headers})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _cut(self) -> None:
        """A reset, as of a host that goes away, after what was sent has gone out."""
        self.wfile.flush()
        if self.the_hub.failure and self.the_hub.failure.after:
            self.connection.shutdown(socket.SHUT_WR)
        else:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # a client that was killed
            super().handle()

    def finish(self) -> None:
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, format: str, *args: object) -> None:
        """pytest's output is for the tests."""


def _in_lfs(name: str) -> bool:
    return name.endswith((".safetensors", ".bin"))


def _sibling(name: str, file: Path, *, with_files: bool) -> dict[str, object]:
    if not with_files:
        return {"rfilename": name}
    content = file.read_bytes()
    if not _in_lfs(name):
        return {"rfilename": name, "size": len(content), "blobId": git_id(content)}
    pointer = _pointer(content)
    lfs = {"sha256": sha256(content), "size": len(content), "pointerSize": len(pointer)}
    return {"rfilename": name, "size": len(content), "blobId": git_id(pointer), "lfs": lfs}


def _entry(name: str, file: Path) -> dict[str, object]:
    """The same, where a tree is listed."""
    content = file.read_bytes()
    if not _in_lfs(name):
        return {"type": "file", "path": name, "size": len(content), "oid": git_id(content)}
    pointer = _pointer(content)
    lfs = {"oid": sha256(content), "size": len(content), "pointerSize": len(pointer)}
    return {"type": "file", "path": name, "size": len(content), "oid": git_id(pointer), "lfs": lfs}


def _pointer(content: bytes) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256(content)}\nsize {len(content)}\n".encode()


def git_id(content: bytes) -> str:
    """https://git-scm.com/book/en/v2/Git-Internals-Git-Objects."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
