"""Five thousand requests made from the served /openapi.json: what it says is what the server does.

The requests are valid ones, ones at every bound of the schema, and ones that are wrong in one way; every answer, event
by event where it is streamed, is held against the document.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from tests.support.scripted_model import Script, write_scripted_model
from tests.support.serve import Served, served

ROOT: Final = Path(__file__).resolve().parents[2]
SETTINGS: Final = Path(__file__).parent / "openapi" / "schemathesis.toml"
KEY: Final = "a key of the tests"
SEED: Final = 1
REQUESTS: Final = 5000
EXAMPLES: Final = 700  # for each operation that takes a body; the others have few inputs
CONTEXT: Final = 384  # tokens: an answer ends there at the latest
SECONDS: Final = 1800.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Served]:
    """A model of few words on one rank, since it is the API that is asked, and an API key."""
    model = write_scripted_model(tmp_path / "scripted", [Script("", "", "Yes.")])
    arguments = ("--dtype", "float32", "--threads-per-rank", "1", "--max-model-len", str(CONTEXT))
    with served(tmp_path, *arguments, model=model, environment={"LOCKSTEP_API_KEY": KEY}) as serve:
        serve.ready()
        yield serve


def test_the_server_does_what_its_document_says(server: Served, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    print(f"seed {SEED}")
    command = [
        sys.executable, "-m", "schemathesis.cli", "--config-file", str(SETTINGS), "--no-color",
        "run", f"{server.api}/openapi.json", "--seed", str(SEED), "--max-examples", str(EXAMPLES),
        "--report-json-path", str(report), "--report", "json",
    ]  # fmt: skip
    ended = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"LOCKSTEP_API_KEY": KEY}, capture_output=True, text=True, timeout=SECONDS
    )
    lines = [line[:1000] for line in ended.stdout.splitlines()]  # a body may be one of a million characters
    assert ended.returncode == 0, "\n".join([*lines, ended.stderr[-2000:]])
    told: dict[str, Any] = json.loads(report.read_text())
    assert told["complete"]
    assert told["operations"]["tested"] == told["operations"]["total"]
    assert told["test_cases"]["generated"] >= REQUESTS
