"""Several `lockstep serve` on one machine that are told nothing but `--port`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from tests.support.http import HTTP
from tests.support.ports import free_port
from tests.support.serve import END_SECONDS, START_SECONDS, TINY_CHAT


@dataclass
class Beside:
    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def is_ready(self) -> bool:
        try:
            return HTTP.get(f"http://localhost:{self.port}/ready", timeout=30).status_code == 200
        except httpx.TransportError:
            return False


@contextmanager
def beside(directory: Path, environment: dict[str, str]) -> Iterator[Beside]:
    port = free_port()
    log = directory / f"{port}.log"
    command = [sys.executable, "-m", "lockstep_runtime", "serve", str(TINY_CHAT), "--tensor-parallel-size", "2"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port), "--threads-per-rank", "1", "--allow-faults"],
            stdout=output, stderr=subprocess.STDOUT, env=environment,
        )  # fmt: skip
    try:
        yield Beside(process, port, log)
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(END_SECONDS) == 0


def lockstep(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lockstep_runtime", *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)


def inject(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return lockstep(environment, "inject", "sigkill", "--rank", "1")


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Without a token: each makes its own."""
    variables = os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)}
    return {name: value for name, value in variables.items() if name != "LOCKSTEP_TOKEN"}


def reported(environment: dict[str, str], one: Beside) -> str:
    """What `lockstep report` writes of it, without its token."""
    written = lockstep(environment, "report", "--log", str(one.log))
    assert written.returncode == 0, written.stderr
    [left] = (Path(environment["XDG_RUNTIME_DIR"]) / "lockstep").iterdir()
    assert json.loads(left.read_bytes())["token"] not in written.stdout
    return written.stdout


def test_they_serve_beside_each_other_and_faults_find_the_one_that_is_meant(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    with ExitStack() as stack:
        first = stack.enter_context(beside(tmp_path, environment))
        with beside(tmp_path, environment) as second:
            deadline = time.monotonic() + START_SECONDS
            while not (first.is_ready() and second.is_ready()):
                assert time.monotonic() < deadline, first.log.read_text() + second.log.read_text()
                time.sleep(0.1)
            asked = inject(environment)
            assert asked.returncode == 1
            assert "several serve on this machine; choose one: --url http://" in asked.stderr
            assert f"tiny-chat on port {second.port}" in asked.stderr
        asked = inject(environment)
        assert (asked.returncode, asked.stdout) == (0, "inject: sigkill on rank 1, now\n"), asked.stderr
        deadline = time.monotonic() + 60
        while "was killed by SIGKILL" not in first.log.read_text():
            assert time.monotonic() < deadline, first.log.read_text()
            time.sleep(0.1)
        while "RankLost, rank 1, Respawn, recovered" not in (report := reported(environment, first)):
            assert time.monotonic() < deadline, report
            time.sleep(0.1)
        assert '"served_name": "tiny-chat"' in report
        assert ": fault 1 epoch 1: RankLost" in report.partition("== Log\n")[2]
    assert list((tmp_path / "lockstep").iterdir()) == []
