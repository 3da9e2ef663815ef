"""`lockstep serve` on networks of one family, of both, and on addresses of the user's choice."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import httpx
import pytest
from tests.support.http import HTTP
from tests.support.network import WITHOUT_IPV4, WITHOUT_IPV6, in_network, why_not
from tests.support.ports import free_port
from tests.support.serve import Served, served

TWO_RANKS = ("--tensor-parallel-size", "2", "--dtype", "float32", "--threads-per-rank", "1")
needs_namespaces = pytest.mark.skipif(bool(why_not()), reason=why_not())


def status_of(serve: Served, path: str) -> int:
    return HTTP.get(f"{serve.status_url}{path}", timeout=30).status_code


def serves_and_heals(serve: Served) -> None:
    serve.ready()
    serve.until(lambda: status_of(serve, "/readyz") == 200, "the pod is ready")
    answer = serve.complete("The", 5)
    before = serve.status().recoveries
    os.kill(serve.pid_of("rank=1"), signal.SIGKILL)
    serve.until(lambda: serve.status().recoveries > before, "the repair is told")
    assert serve.complete("The", 5) == answer
    assert "Traceback" not in serve.log.read_text()


@needs_namespaces
def test_without_ipv4_a_group_on_one_machine_serves_and_heals(tmp_path: Path) -> None:
    def scenario() -> str:
        with served(tmp_path, *TWO_RANKS, host="::1") as serve:
            serves_and_heals(serve)
            return serve.log.read_text()

    assert "ready: http://localhost:" in in_network(WITHOUT_IPV4, scenario)


@needs_namespaces
def test_without_ipv4_two_pods_meet_over_tcp(tmp_path: Path) -> None:
    def scenario() -> None:
        api, bus = free_port(), free_port()

        def pod(index: int) -> dict[str, str]:
            return {"LOCKSTEP_POD_INDEX": str(index), "LOCKSTEP_LEADER": "fd00::1", "LOCKSTEP_HOST": "::"}

        arguments = (*TWO_RANKS, "--ranks-per-pod", "1")
        with (
            served(tmp_path, *arguments, ports=[api, bus, free_port()], environment=pod(0), host="fd00::1") as leader,
            served(tmp_path, *arguments, ports=[api, bus, free_port()], environment=pod(1), host="fd00::2") as member,
        ):
            leader.ready()
            member.until(lambda: status_of(member, "/readyz") == 200, "the member follows its group")
            answer = leader.complete("The", 5)
            os.kill(member.pid_of("rank=1"), signal.SIGKILL)
            leader.until(lambda: leader.status().recoveries == 1, "the repair is told")
            assert leader.complete("The", 5) == answer

    in_network(WITHOUT_IPV4, scenario)


@needs_namespaces
@pytest.mark.parametrize("host", ["::", "localhost"])
def test_where_ipv6_is_switched_off_both_families_are_one(tmp_path: Path, host: str) -> None:
    def scenario() -> None:
        with served(tmp_path, *TWO_RANKS, "--host", host) as serve:
            serves_and_heals(serve)

    in_network(WITHOUT_IPV6, scenario)


@pytest.mark.parametrize("host", ["::", "localhost"])
def test_both_families_are_served_at_once(tmp_path: Path, host: str) -> None:
    ports = [free_port() for _ in range(3)]
    with served(tmp_path, *TWO_RANKS, "--host", host, ports=ports) as serve:
        serve.ready()
        for address in ("127.0.0.1", "[::1]"):
            assert httpx.get(f"http://{address}:{ports[0]}/health", timeout=30).status_code == 200
            assert httpx.get(f"http://{address}:{ports[2]}/readyz", timeout=30).status_code == 200


@pytest.mark.parametrize("host", ["127.0.0.2", "::1"])
def test_an_address_of_the_users_choice_is_ready_there_and_nowhere_else(tmp_path: Path, host: str) -> None:
    ports = [free_port() for _ in range(3)]
    with served(tmp_path, *TWO_RANKS, "--host", host, ports=ports, host=host) as serve:
        serves_and_heals(serve)
        for port in (ports[0], ports[2]):
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=30)
