"""What the logs of rank pods and operator look like."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta

import pytest

from lockstep_operator import log as operator_log
from lockstep_runtime import log as runtime_log

Configure = Callable[[str], None]


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(params=["runtime", "operator"])
def configure(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Configure:
    def runtime(style: str) -> None:
        monkeypatch.setenv(runtime_log.FORMAT_VARIABLE, style)
        runtime_log.configure("engine")

    return runtime if request.param == "runtime" else lambda style: operator_log.configure("info", style)


def test_a_line_begins_with_a_time_that_every_tool_reads(
    configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    configure("text")
    logging.getLogger("engine").warning("a fault")
    (line,) = capsys.readouterr().err.splitlines()
    when, _, rest = line.partition(" ")
    assert when.endswith("Z")
    assert datetime.fromisoformat(when).utcoffset() == timedelta(0)
    assert "warning engine: a fault" in " ".join(rest.lower().split())


def test_in_json_a_record_is_one_object_whatever_it_tells(
    configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    configure("json")
    logging.getLogger("engine").info("two\nlines, %s", "ünïcode")
    try:
        raise ValueError("of itself")
    except ValueError:
        logging.getLogger("engine").exception("it failed")
    plain, failed = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert {name: plain[name] for name in ("level", "part", "message")} == {
        "level": "info", "part": "engine", "message": "two\nlines, ünïcode",
    }  # fmt: skip
    assert datetime.fromisoformat(plain["time"]).utcoffset() == timedelta(0)
    assert "exception" not in plain
    assert failed["message"] == "it failed"
    assert failed["exception"].splitlines()[-1] == "ValueError: of itself"


def test_what_a_record_is_about_are_fields_of_its_json_and_no_part_of_its_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    about = runtime_log.fields(fault=3, epoch=8, rank=0, phase="verify", seconds=0.02149, kept=False)
    for style in ("json", "text"):
        monkeypatch.setenv(runtime_log.FORMAT_VARIABLE, style)
        runtime_log.configure("engine")
        logging.getLogger("engine").info("verify: …", extra=about)
    as_json, as_text = capsys.readouterr().err.splitlines()
    record = json.loads(as_json)
    known = {"fault": 3, "epoch": 8, "rank": 0, "phase": "verify", "seconds": 0.0215, "kept": False}
    assert {name: value for name, value in record.items() if name not in ("time", "level", "part", "message")} == known
    assert as_text.endswith(" engine: verify: …")
