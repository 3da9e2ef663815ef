"""A real `lockstep serve`, on free ports, that is gone when the test is over."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx
import msgspec
from tests.support.http import HTTP
from tests.support.ports import free_port

from lockstep_runtime.host.addresses import join
from lockstep_runtime.log import FORMAT_VARIABLE
from lockstep_runtime.protocol.status import GroupStatus

TINY_CHAT = Path(__file__).parents[2] / "examples" / "tiny-chat"
TOKEN = "a token of the tests"
START_SECONDS = 180.0  # importing torch twice on a machine that does other things too
END_SECONDS = 60.0
AS_JSON: Final = {FORMAT_VARIABLE: "json"}  # for `Served.records`


@dataclass
class Served:
    """One `lockstep serve` process and where it listens."""

    process: subprocess.Popen[bytes]
    log: Path
    api: str
    status_url: str
    children: list[int] = field(default_factory=list)

    def status(self) -> GroupStatus:
        answer = HTTP.get(f"{self.status_url}/status", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60)
        answer.raise_for_status()
        return msgspec.json.decode(answer.content, type=GroupStatus)

    def ready(self) -> None:
        """Wait until the API says that it is."""
        self.until(self.is_ready, "it is ready", START_SECONDS)

    def is_ready(self) -> bool:
        try:
            return HTTP.get(f"{self.api}/ready", timeout=60).status_code == 200
        except httpx.TransportError:
            return False

    def until(self, condition: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
        """Wait for a condition; the deadline's error shows the log."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None:
                raise AssertionError(f"it ended with {self.process.returncode}:\n{self.log.read_text()}")
            if time.monotonic() > deadline:
                raise AssertionError(f"not within {seconds:g} s: {what}\n{self.log.read_text()}")
            time.sleep(0.05)

    def pid_of(self, title: str) -> int:
        """The one child whose process title contains this."""
        found = [pid for pid in self.child_pids() if title in title_of(pid)]
        if len(found) != 1:
            raise AssertionError(f"{len(found)} processes are called {title}")
        return found[0]

    def url_of(self, flag: str) -> str:
        """Of the port that this flag names."""
        arguments = self.process.args
        assert isinstance(arguments, list)
        return f"http://127.0.0.1:{arguments[arguments.index(flag) + 1]}"

    def child_pids(self) -> list[int]:
        task = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in task.read_text().split()]

    def records(self) -> list[dict[str, Any]]:
        """The log's lines, where it is JSON; what ends a process without one, such as a signal's dump, is left out."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]

    def complete(self, prompt: str, max_tokens: int) -> str:
        """A greedy completion."""
        body = {"model": "tiny-chat", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        answer = HTTP.post(f"{self.api}/v1/completions", json=body, timeout=120)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"])

    def end(self) -> int:
        """SIGTERM, and how it ended."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(END_SECONDS)


def title_of(pid: int) -> str:
    """As ps shows it; empty when there is no such process."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except FileNotFoundError:
        return ""


def threads_of(pid: int) -> int:
    """How many it has."""
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


def lasting_threads_of(pid: int) -> int:
    """How many threads it has for a second on end, without those that come and go."""
    deadline = time.monotonic() + 30
    seen, since = 0, time.monotonic()
    while time.monotonic() - since < 1.0:
        if time.monotonic() > deadline:
            raise AssertionError(f"threads of process {pid} come and go for 30 s, now {seen}")
        if (now := threads_of(pid)) != seen:
            seen, since = now, time.monotonic()
        time.sleep(0.02)
    return seen


def is_running(pid: int) -> bool:
    """A zombie is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@contextlib.contextmanager
def served(
    directory: Path,
    *arguments: str,
    model: Path = TINY_CHAT,
    ports: Sequence[int] | None = None,
    environment: Mapping[str, str] | None = None,
    before: Sequence[str] = (),
    host: str = "127.0.0.1",
) -> Iterator[Served]:
    """Start it; `directory` takes its log. `ports`: api, bus, status. Not waited for.

    `before`: a command that runs the rest of the line in its own process; `host`: where it is to be reached.
    """
    api, bus, status = ports or [free_port() for _ in range(3)]
    log = directory / f"serve-{status}.log"
    command = [
        *before, sys.executable, "-m", "lockstep_runtime", "serve", str(model),
        "--port", str(api), "--bus-port", str(bus), "--status-port", str(status), *arguments,
    ]  # fmt: skip
    variables = os.environ | {"LOCKSTEP_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"} | dict(environment or {})
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=variables)
    serve = Served(process, log, f"http://{join(host, api)}", f"http://{join(host, status)}")
    try:
        yield serve
    finally:
        children = serve.child_pids() if is_running(process.pid) else []
        process.kill()  # its children die with it
        process.wait()
        deadline = time.monotonic() + END_SECONDS
        while any(is_running(pid) for pid in children) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not [title_of(pid) for pid in children if is_running(pid)]
