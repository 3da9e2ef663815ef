"""`lockstep serve` on a host that gives it little: descriptors, shared memory, processes, memory."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
from tests.support.http import HTTP
from tests.support.serve import Served, served

TWO_RANKS = ("--tensor-parallel-size", "2", "--dtype", "float32", "--threads-per-rank", "1")
needs_prlimit = pytest.mark.skipif(shutil.which("prlimit") is None, reason="sets limits with util-linux' prlimit")


@contextmanager
def idle(url: str, count: int) -> Iterator[list[socket.socket]]:
    """So many connections that say nothing; a server may close some of them."""
    port = httpx.URL(url).port
    with ExitStack() as stack:
        found = []
        for _ in range(count):
            found.append(stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30)))
        yield found


def kill_and_heal(serve: Served) -> None:
    before = serve.status().recoveries
    os.kill(serve.pid_of("rank=1"), signal.SIGKILL)
    serve.until(lambda: serve.status().recoveries > before, "the repair is told", 30)


@needs_prlimit
@pytest.mark.parametrize("limits", ["256:256", "256:4096"])
def test_idle_clients_hold_up_neither_repair_nor_probe_nor_request(tmp_path: Path, limits: str) -> None:
    with served(tmp_path, *TWO_RANKS, before=("prlimit", f"--nofile={limits}", "--")) as serve:
        serve.ready()
        bus = serve.url_of("--bus-port")
        with idle(serve.api, 300), idle(serve.status_url, 300), idle(bus, 150):
            kill_and_heal(serve)
            with httpx.Client(timeout=60) as client:
                assert client.get(f"{serve.status_url}/readyz").status_code == 200
                body = {"model": "tiny-chat", "prompt": "The", "max_tokens": 3}
                assert client.post(f"{serve.api}/v1/completions", json=body).status_code == 200
        assert HTTP.get(f"{serve.status_url}/healthz", timeout=60).status_code == 200
        assert "Too many open files" not in serve.log.read_text()
        assert "Traceback" not in serve.log.read_text()
