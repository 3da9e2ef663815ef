"""`lockstep report`: what is in it, and that no secret is, wherever one stood."""

from __future__ import annotations

import http.server
import io
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Final

import msgspec
import pytest

from lockstep_runtime import redaction
from lockstep_runtime.cli import main
from lockstep_runtime.config import ServeConfig
from lockstep_runtime.host import discovery
from lockstep_runtime.protocol.status import Fault, FaultRecord, GroupStatus, RankStatus
from lockstep_runtime.protocol.tokens import Purpose, purpose_token
from lockstep_runtime.report import group, known_secrets, log_lines, machine
from lockstep_runtime.report.group import GroupFacts
from lockstep_runtime.report.report import MAX_SECTION, write

AT: Final = 1796032146.991
TOKEN: Final = 'group "token" with ünusual characters'
API_KEY: Final = "client-key-0123456789"
FILE_KEYS: Final = ("first-key-of-the-file", "k2")
HUB_TOKEN: Final = "hf_" + "Ab1" * 11
STORED_TOKEN: Final = "a stored token of another hub"
SHORT: Final = "xyz"


def fault(number: int, message: str, **more: object) -> FaultRecord:
    fields = {"id": number, "fault": "Hang", "rank": 1, "message": message, "at": AT, "epoch": 3, **more}
    return msgspec.convert(fields, FaultRecord)


def status(*faults: FaultRecord, message: str = "") -> GroupStatus:
    return GroupStatus(model="m", group=0, incarnation="i", message=message, faults=list(faults))


def same(text: str) -> str:
    return text


def test_each_fault_is_a_line_with_its_phases() -> None:
    healed = fault(
        7, "rank 1 stopped before embed_tokens", rung="Respawn", recoveredAt=AT + 0.25, requestsResumed=1,
        phases={"detect": 2.0, "abort": 0.031},
    )  # fmt: skip
    assert group.trail([healed, fault(8, "again", rank=None)], same) == [
        "2026-11-30T09:49:06.991Z fault 7 epoch 3: Hang, rank 1, Respawn, recovered 2026-11-30T09:49:07.241Z, 1 "
        "requests resumed (detect 2 s, abort 0.031 s): rank 1 stopped before embed_tokens",
        "2026-11-30T09:49:06.991Z fault 8 epoch 3: Hang, no rank named, no rung, open, 0 requests resumed (): again",
    ]


def test_of_a_log_the_newest_lines_about_faults_are_taken() -> None:
    lines = [
        "2026-11-30T09:49:06.991Z info    engine: step 4 took 8 ms",
        "2026-11-30T09:49:06.991Z info    engine: watchdog: fault 1 epoch 1: Hang: …",
        '{"time": "…", "level": "error", "part": "worker 1", "message": "no"}',
        "2026-11-30T09:49:06.991Z error   worker 0: a step failed",
        "Traceback (most recent call last):",
        '  File "a.py", line 1, in <module>',
        "ValueError: 1",
        "2026-11-30T09:49:06.991Z info    engine: ready",
        "  not of a traceback",
    ]
    assert log_lines.select(lines, same) == lines[1:7]
    many = [f"2026-11-30T09:49:06.991Z error   engine: {number} {'x' * 5000}\n" for number in range(1000)]
    kept = log_lines.select(many, same)
    assert len(kept) == log_lines.MAX_LINES
    assert kept[-1].startswith("2026-11-30T09:49:06.991Z error   engine: 999 ")
    assert max(map(len, kept)) == log_lines.MAX_CHARACTERS


def test_a_log_without_line_ends_is_read_in_parts() -> None:
    assert max(map(len, log_lines.read(io.StringIO("x" * 100_000)))) == log_lines.MAX_READ


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """With a secret in everything that may hold one."""
    (tmp_path / "keys").write_text("\n".join(FILE_KEYS))
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "token").write_text(HUB_TOKEN)
    (tmp_path / "hub" / "stored_tokens").write_text(f"[other]\nhf_token = {STORED_TOKEN}\n")
    return {
        "LOCKSTEP_TOKEN": TOKEN,
        "LOCKSTEP_API_KEY": API_KEY,
        "LOCKSTEP_API_KEY_FILE": str(tmp_path / "keys"),
        "HF_HOME": str(tmp_path / "hub"),
        "HF_TOKEN": HUB_TOKEN,
        "HF_ENDPOINT": "https://someone:hunter2hunter2@hub.example/",
        "AWS_SECRET_ACCESS_KEY": "not/a/variable/of/ours",
        "NCCL_DEBUG": f"INFO {SHORT}",
        "LOCKSTEP_MODEL_NAME": f"model of {API_KEY}",
        "MY_PASSWORD": SHORT,
    }


SECRETS: Final = (
    "token\\\" with", "ünusual characters", "\\u00fcnusual", API_KEY, *FILE_KEYS, HUB_TOKEN, STORED_TOKEN, SHORT,
    "hunter2hunter2", "not/a/variable/of/ours", "abcdefghijklmnopqrstuvwxyz", "eyJhbGciOi",
)  # fmt: skip


def test_no_secret_is_in_it_wherever_one_stood(environment: dict[str, str]) -> None:
    planted = " ".join((
        TOKEN, API_KEY, *FILE_KEYS, HUB_TOKEN, STORED_TOKEN, SHORT,
        "Authorization: Bearer abcdefghijklmnopqrstuvwxyz", "api_key=abcdefghijklmnopqrstuvwxyz",
        "hf_abcdefghijklmnopqrstuvwxyz", "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N",
        "https://someone:hunter2hunter2@hub.example/",
    ))  # fmt: skip
    long = "." * (group.MAX_MESSAGE - 5) + API_KEY  # the cut is within it
    facts = GroupFacts(
        status=msgspec.structs.replace(
            status(fault(1, planted), fault(2, long), message=planted),
            ranks=[RankStatus(rank=0, pod_index=0, message=planted)],
        ),
        config=ServeConfig(model=planted, served_name=TOKEN, leader=planted),
        problems=(planted,),
    )
    log = [f"2026-11-30T09:49:06.991Z error engine: {planted}\n", "x error " + "." * 985 + API_KEY]
    text = write(facts, environment, redaction.redactor(known_secrets.known(environment)), log=log, now=AT)
    assert text.count(redaction.MASK) > 30
    assert [one for one in SECRETS if one in text] == []
    assert "client-k" not in text
    assert "HF_TOKEN: [set]" in text
    assert "NCCL_DEBUG: INFO [secret]" in text
    assert "hub.example" in text


def test_what_is_no_secret_is_left(environment: dict[str, str]) -> None:
    redact = redaction.redactor(known_secrets.known(environment))
    for text in ("a bearer token is needed", "max_batch_tokens: 2048", "12 xyzzy tokens", "firstToken 0.3 s"):
        assert redact(text) == text


def test_it_is_bounded() -> None:
    ranks = [RankStatus(rank=rank, pod_index=rank, message="m" * 500) for rank in range(2000)]
    facts = GroupFacts(status=msgspec.structs.replace(status(*(fault(n, "m" * 9999) for n in range(99))), ranks=ranks))
    text = write(facts, {}, same, log=["x error " + "y" * 9999] * 9999, now=AT)
    assert len(text) < 4 * MAX_SECTION
    assert text.count("[the rest is left out: the section is longer than") == 3


def test_the_machine_is_described_from_its_files(tmp_path: Path) -> None:
    for name, content in {
        "etc/os-release": 'NAME="Debian"\nPRETTY_NAME="Debian GNU/Linux 12"\n',
        "proc/cpuinfo": "model name\t: AMD EPYC\nflags\t\t: fpu sse4_2 avx2 amx_bf16\n\nprocessor\t: 1\n",
        "proc/meminfo": "MemTotal:       100 kB\nBuffers: 1 kB\nMemAvailable:    50 kB\n",
        "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.1\nGCC version: 12\n",
        "proc/driver/nvidia/gpus/0000:0f:00.0/information": "Model: \t\t NVIDIA H200\nIRQ: 1\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    facts = machine.machine(tmp_path)
    assert facts["system"] == "Debian GNU/Linux 12"
    assert (facts["processor"], facts["processor flags"]) == ("AMD EPYC", "sse4_2 avx2 amx_bf16")
    assert facts["memory"] == "MemTotal 100 kB, MemAvailable 50 kB"
    assert facts["gpu 0000:0f:00.0"] == "Model NVIDIA H200"
    assert facts["shared memory"] == "unreadable: No such file or directory"
    assert machine.versions(tmp_path)["nvidia driver"] == "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.1"


def test_versions_need_no_import_of_torch() -> None:
    facts = machine.versions()
    assert facts["torch"]
    assert facts["torch built for"] == "no CUDA" or facts["torch built for"].startswith("CUDA ")


class _Answering(http.server.BaseHTTPRequestHandler):
    """A supervisor, for those who have its token."""

    answers: ClassVar[dict[str, bytes]] = {}

    def do_GET(self) -> None:
        known = self.headers["Authorization"] == f"Bearer {purpose_token('secret-of-the-group', Purpose.STATUS)}"
        answer = self.answers.get(self.path, b"only the leader pod serves the status\n")
        self.send_response(401 if not known else 200 if self.path in self.answers else 404)
        self.end_headers()
        self.wfile.write(answer if known else b"a bearer token is needed\n")

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def leader(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("LOCKSTEP_TOKEN", raising=False)
    _Answering.answers = {
        "/status": msgspec.json.encode(status(fault(1, "it hung"), message="the group serves")),
        "/config": msgspec.json.encode(ServeConfig(model="examples/tiny-chat", served_name="tiny-chat")),
    }
    with http.server.HTTPServer(("127.0.0.1", 0), _Answering) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_the_command_writes_it_to_a_file(leader: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LOCKSTEP_TOKEN", "secret-of-the-group")
    (tmp_path / "log").write_text("2026-11-30T09:49:06.991Z error engine: secret-of-the-group\n")
    words = ["report", "--url", leader, "--log", str(tmp_path / "log"), "--output", str(tmp_path / "report")]
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 0
    text = (tmp_path / "report").read_text()
    sections = [line[3:] for line in text.splitlines() if line.startswith("== ")]
    assert sections == ["Versions", "Machine", "Variables", "Configuration", "Faults", "Status", "Log"]
    assert "fault 1 epoch 3: Hang, rank 1" in text
    assert "error engine: [secret]" in text
    config = json.loads(text.partition("== Configuration\n")[2].partition("\n\n==")[0])
    assert config["model"] == "examples/tiny-chat"
    assert "secret-of-the-group" not in text


def test_a_group_that_serves_here_is_found_with_the_token_that_it_made(
    leader: str, capsys: pytest.CaptureFixture[str]
) -> None:
    here = discovery.Running(
        pid=os.getpid(), model="m", port=1, status_url=leader, token="secret-of-the-group", faults=False
    )
    discovery.leave(here)
    with pytest.raises(SystemExit):
        main(["report"])
    text = capsys.readouterr().out
    assert "the group serves" in text
    assert "secret-of-the-group" not in text
    [path] = (discovery.folder()).iterdir()
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("token", "url", "answers", "words"),
    [
        ("another", "", {}, "answered 401: a bearer token is needed; set LOCKSTEP_TOKEN to the group's token"),
        ("", "http://127.0.0.1:1", {}, "nothing from http://127.0.0.1:1/status: "),
        ("", "nowhere", {}, "nothing from nowhere/status: "),
        ("secret-of-the-group", "", {"/status": b"<html>"}, "nothing from "),
        ("secret-of-the-group", "", {"/status": b" " * (group.MAX_ANSWER_BYTES + 1)}, "its answer is longer than"),
    ],
)
def test_what_the_group_does_not_answer_is_a_line_of_the_report(
    leader: str,
    token: str,
    url: str,
    answers: dict[str, bytes],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _Answering.answers |= answers
    monkeypatch.setenv("LOCKSTEP_TOKEN", token)
    with pytest.raises(SystemExit) as ended:
        main(["report", "--url", url or leader])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert words in text.partition("== Versions")[0]
    assert "== Machine\nkernel: Linux" in text


def test_a_pod_without_a_status_still_has_its_settings(
    leader: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    del _Answering.answers["/status"]
    monkeypatch.setenv("LOCKSTEP_TOKEN", "secret-of-the-group")
    with pytest.raises(SystemExit):
        main(["report", "--url", leader])
    text = capsys.readouterr().out
    assert "/status answered 404: only the leader pod serves the status\n" in text
    assert '"served_name": "tiny-chat"' in text


def test_a_log_that_is_not_there_is_an_error(leader: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["report", "--url", leader, "--log", "/nowhere"])
    assert ended.value.code == 1
    assert capsys.readouterr().err == "lockstep: /nowhere: No such file or directory\n"


def test_every_fault_has_a_name_in_the_trail() -> None:
    lines = group.trail([fault(n, "m", fault=str(one)) for n, one in enumerate(Fault)], same)
    assert all(str(one) in line for one, line in zip(Fault, lines, strict=True))
