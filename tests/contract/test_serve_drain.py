"""A member pod gets SIGTERM: on real processes, a group of two pods drains as one and is whole again with the next."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
from tests.support.http import HTTP
from tests.support.ports import free_port
from tests.support.serve import Served, served
from tests.support.stream import Stream

from lockstep_runtime.protocol.status import GroupState

PROMPT = {"prompt": "The for statement is used to", "temperature": 0, "model": "tiny-chat"}
LONG, SHORT = 600, 12
SECONDS = 120.0


class Group:
    """Of two ranks, one in each pod."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._bus = directory, free_port()

    def pod(self, index: int) -> AbstractContextManager[Served]:
        arguments = (
            "--tensor-parallel-size", "2", "--ranks-per-pod", "1", "--threads-per-rank", "1", "--dtype", "float32",
            "--pod-index", str(index), "--leader", "127.0.0.1", "--grace-seconds", "60",
        )  # fmt: skip
        return served(self._directory, *arguments, ports=(free_port(), self._bus, free_port()))


def probe(serve: Served) -> int:
    """As the kubelet asks; 0: nobody answers."""
    try:
        return HTTP.get(f"{serve.status_url}/readyz", timeout=30).status_code
    except httpx.TransportError:
        return 0


def test_a_members_sigterm_drains_its_group(tmp_path: Path) -> None:
    group = Group(tmp_path)
    with contextlib.ExitStack() as pods:
        leader = pods.enter_context(group.pod(0))
        member = pods.enter_context(group.pod(1))
        leader.ready()
        member.until(lambda: probe(member) == 200, "the member follows its group")
        reference = Stream(leader.api, {**PROMPT, "max_tokens": LONG}, SECONDS).wait()
        assert (reference.error, reference.finish) == ("", "length")

        recoveries = leader.status().recoveries
        os.kill(member.pid_of("rank=1"), signal.SIGKILL)
        while leader.status().recoveries == recoveries:
            assert (probe(leader), probe(member)) == (200, 200), "a short repair changes no pod's readiness"
            time.sleep(0.05)

        running = Stream(leader.api, {**PROMPT, "max_tokens": LONG}, SECONDS)
        leader.until(lambda: running.pieces > 2, "the stream has begun")
        member.process.send_signal(signal.SIGTERM)
        leader.until(lambda: probe(leader) == 503, "the leader is unready")
        member.until(lambda: probe(member) == 503, "so is the member")
        assert running.wait() == reference
        assert running.pause < 2, "nobody waited for a pod"
        assert member.process.wait(SECONDS) == 0
        leader.until(lambda: leader.status().state is GroupState.RECOVERING, "its rank is missed")
        assert probe(leader) == 503

        late = Stream(leader.api, {**PROMPT, "max_tokens": SHORT}, SECONDS)
        successor = pods.enter_context(group.pod(1))
        answer = late.wait()
        assert (answer.error, answer.finish) == ("", "length"), "what came meanwhile has waited"
        assert reference.text.startswith(answer.text)
        successor.until(lambda: (probe(leader), probe(successor)) == (200, 200), "the group is whole again")
