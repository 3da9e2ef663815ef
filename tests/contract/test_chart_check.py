"""`helm test` runs files/check.py in the operator's image: it passes when all is well, else it says why not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from tests.support.chart import CHART, one, render

SCRIPT = CHART / "files" / "check.py"


class Answers(BaseHTTPRequestHandler):
    """`/ok` answers 200, `/later` does from the third time on, everything else is forbidden."""

    asked = 0

    def do_GET(self) -> None:
        if self.path == "/later":
            Answers.asked += 1
        healthy = self.path == "/ok" or Answers.asked >= 3
        self.send_response(200 if healthy else 403)
        self.end_headers()
        self.wfile.write(b"" if healthy else b"not yours to read")

    def log_message(self, format: str, *args: object) -> None:
        """Keeps the test's output quiet."""


@pytest.fixture
def server() -> Iterator[str]:
    Answers.asked = 0
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as http:
        thread = Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def check(
    *arguments: str, deadline: float = 30, credentials: Path = Path("/nowhere")
) -> subprocess.CompletedProcess[str]:
    """Runs the script as the pod does: its text after `-c`, by an interpreter that sees only the standard library."""
    environment = {**os.environ, "DEADLINE_SECONDS": str(deadline), "CREDENTIALS": str(credentials)}
    command = [sys.executable, "-I", "-S", "-c", SCRIPT.read_text(), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_it_passes_when_everything_answers(server: str) -> None:
    result = check(f"operator={server}/ok", f"models={server}/ok")
    assert (result.returncode, result.stdout) == (0, "ok operator\nok models\n")


def test_it_waits_for_an_operator_that_is_still_starting(server: str) -> None:
    result = check(f"operator={server}/later")
    assert (result.returncode, result.stdout) == (0, "ok operator\n")


def test_it_fails_with_the_servers_words_and_checks_the_rest(server: str) -> None:
    result = check(f"models={server}/forbidden", f"operator={server}/ok", deadline=0.1)
    assert result.returncode == 1
    assert "FAILED models" in result.stdout
    assert "answered 403: not yours to read" in result.stdout
    assert "ok operator" in result.stdout


def test_it_fails_when_nobody_listens() -> None:
    assert check("operator=http://127.0.0.1:1/ok", deadline=0.1).returncode == 1


def test_it_fails_without_credentials_for_the_api_server(tmp_path: Path) -> None:
    result = check("models=https://127.0.0.1:1/ok", deadline=0.1, credentials=tmp_path)
    assert result.returncode == 1
    assert "No such file" in result.stdout


def test_it_fails_when_asked_nothing() -> None:
    assert check().returncode == 1


def test_the_pod_runs_that_script_as_the_operators_account() -> None:
    manifests = render()
    pod = one(manifests, "Pod")
    container = pod["spec"]["containers"][0]
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    assert pod["spec"]["serviceAccountName"] == one(manifests, "ServiceAccount")["metadata"]["name"]
    assert pod["spec"]["automountServiceAccountToken"] is True
    assert container["command"] == ["python3", "-c", SCRIPT.read_text()]
    assert container["args"] == [
        "operator=http://lockstep-metrics.lockstep-system:8080/healthz",
        "models=https://kubernetes.default.svc/apis/lockstep.dev/v1alpha1/tensorparallelmodels?limit=1",
    ]


def test_the_pod_asks_only_in_the_namespaces_that_are_served() -> None:
    arguments = one(render({"watchNamespaces": ["a", "b"]}), "Pod")["spec"]["containers"][0]["args"]
    prefix = "https://kubernetes.default.svc/apis/lockstep.dev/v1alpha1/namespaces"
    assert arguments[1:] == [f"models in {n}={prefix}/{n}/tensorparallelmodels?limit=1" for n in ("a", "b")]
