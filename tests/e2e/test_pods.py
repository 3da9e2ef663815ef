"""What rank pods are allowed, and what they have: the namespace of the served model admits only restricted pods."""

from __future__ import annotations

import subprocess

import pytest
from tests.support import kubectl
from tests.support.cluster_model import Model
from tests.support.pod_security import violations


def test_rank_pods_keep_to_the_restricted_profile(served: Model) -> None:
    pods = served.pods()

    assert [pod["metadata"]["name"] for pod in pods] == ["tiny-chat-0-0", "tiny-chat-0-1"]
    for pod in pods:
        assert violations(pod["spec"]) == []
        [container] = pod["spec"]["containers"]
        assert container["securityContext"]["readOnlyRootFilesystem"] is True


def test_rank_pods_have_no_credentials_for_the_api_server(served: Model) -> None:
    for pod in served.pods():
        assert pod["spec"]["automountServiceAccountToken"] is False
        assert not [volume for volume in pod["spec"]["volumes"] if "projected" in volume]
        found = _python(served, pod["metadata"]["name"], "print(pathlib.Path('/var/run/secrets').exists())")
        assert found.stdout.strip() == "False", found


def test_the_group_token_reaches_the_pods_only_by_reference(served: Model) -> None:
    for pod in served.pods():
        [token] = [entry for entry in pod["spec"]["containers"][0]["env"] if entry["name"] == "LOCKSTEP_TOKEN"]
        assert set(token) == {"name", "valueFrom"}
        assert token["valueFrom"]["secretKeyRef"]["name"] == f"tiny-chat-token-{served.status()['tokens']['id']}"


def test_rank_pods_leave_a_lost_node_after_half_a_minute(served: Model) -> None:
    """The API server adds its own 300 s to pods that say nothing."""
    for pod in served.pods():
        seconds = {one["key"]: one.get("tolerationSeconds") for one in pod["spec"]["tolerations"]}
        assert seconds == {"node.kubernetes.io/not-ready": 30, "node.kubernetes.io/unreachable": 30}


@pytest.mark.parametrize(
    ("path", "writable"), [("/", False), ("/opt/lockstep", False), ("/tmp", True), ("/dev/shm", True)]
)
def test_only_scratch_places_can_be_written(served: Model, path: str, writable: bool) -> None:
    result = _python(served, "tiny-chat-0-1", f"p = pathlib.Path('{path}') / 'probe'; p.write_text(''); p.unlink()")

    assert (result.returncode == 0) is writable, result.stderr
    if not writable:
        assert "Read-only file system" in result.stderr


def test_a_report_has_the_status_and_not_the_token(served: Model) -> None:
    token = served.token()
    log = f"2026-11-30T09:49:06.991Z error   engine: refused {token}\n"
    leader = ["exec", "-i", "tiny-chat-0-0", "--", "lockstep", "report", "--log", "-"]

    report = served.kubectl(*leader, stdin=log)

    assert '"state": "Ready"' in report.partition("== Status")[2], report
    assert '"tensor_parallel_size": 2' in report.partition("== Configuration")[2]
    assert "error   engine: refused [secret]" in report
    assert token not in report
    member = served.kubectl("exec", "tiny-chat-0-1", "--", "lockstep", "report")
    assert "answered 404: only the leader pod serves the status" in member
    assert '"pod_index": 1' in member.partition("== Configuration")[2]


def _python(model: Model, pod: str, code: str) -> subprocess.CompletedProcess[str]:
    program = f"import pathlib; {code}"
    return kubectl.attempt("-n", model.namespace, "exec", pod, "--", "python", "-c", program)
