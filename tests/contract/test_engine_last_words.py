"""What keeps the engine or its API from serving is in the group's status, by real processes, until it is mended."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import httpx
from tests.support.http import HTTP
from tests.support.serve import Served, served

from lockstep_runtime.config import API_KEY_FILE_VARIABLE
from lockstep_runtime.protocol.status import GroupState

TOLD_SECONDS: Final = 15.0


def take_port(serve: Served) -> socket.socket:
    """The API's, from the engine, which is killed for it; the next is about a second in starting."""
    port = urlsplit(serve.api).port
    deadline = time.monotonic() + TOLD_SECONDS
    os.kill(serve.pid_of("lockstep: engine"), signal.SIGKILL)
    while True:
        try:
            return socket.create_server(("127.0.0.1", port or 0))
        except OSError:
            assert time.monotonic() < deadline, "the next engine was quicker"


def says(serve: Served, words: str) -> bool:
    return words in serve.status().message


def test_a_missing_key_file_and_a_port_that_was_taken_are_told_until_they_are_mended(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    environment = {API_KEY_FILE_VARIABLE: str(file)}
    with served(tmp_path, "--threads-per-rank", "1", environment=environment) as serve:
        serve.until(lambda: _answers(serve), "the status is served")
        serve.until(lambda: says(serve, f"so no client can be let in: {file} does not exist"), "the keys are told")
        status = serve.status()
        assert (status.state, status.accepting, status.may_pass) == (GroupState.FAILED, False, False)
        file.write_text("\n")
        serve.until(lambda: says(serve, f"{file} holds no API key"), "an empty file is told", TOLD_SECONDS)
        file.write_text("secret\n")
        serve.ready()

        with take_port(serve):
            serve.until(lambda: says(serve, f"can't listen on 127.0.0.1:{urlsplit(serve.api).port}"), "it is told",
                        TOLD_SECONDS)  # fmt: skip
            assert "Address already in use" in serve.status().message
        serve.ready()
        headers = {"Authorization": "Bearer secret"}
        assert HTTP.get(f"{serve.api}/v1/models", headers=headers).status_code == 200


def _answers(serve: Served) -> bool:
    try:
        serve.status()
    except httpx.TransportError:
        return False
    return True
