"""`lockstep serve` on a host that gives it little: descriptors, shared memory, processes, memory."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
from tests.support import memory_cgroup
from tests.support.http import HTTP
from tests.support.serve import Served, served

from lockstep_runtime.protocol.status import Fault, PodProblemReason

TWO_RANKS = ("--tensor-parallel-size", "2", "--dtype", "float32", "--threads-per-rank", "1")
MIB = 2**20
LONGEST_VARIABLE = 128 * 1024 - 32  # Linux allows no longer one, its name included
STACK = resource.getrlimit(resource.RLIMIT_STACK)
needs_memory_cgroup = pytest.mark.skipif(bool(memory_cgroup.why_not()), reason=memory_cgroup.why_not())
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a /dev/shm of its own, which needs root")
needs_prlimit = pytest.mark.skipif(shutil.which("prlimit") is None, reason="sets limits with util-linux' prlimit")


@contextmanager
def idle(url: str, count: int) -> Iterator[list[socket.socket]]:
    """So many connections that say nothing; a server may close some of them."""
    port = httpx.URL(url).port
    with ExitStack() as stack:
        found = []
        for _ in range(count):
            found.append(stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30)))
        yield found


def answers(serve: Served) -> bool:
    try:
        return HTTP.get(f"{serve.status_url}/healthz", timeout=30).status_code == 200
    except httpx.TransportError:
        return False


def kill_and_heal(serve: Served) -> None:
    before = serve.status().recoveries
    os.kill(serve.pid_of("rank=1"), signal.SIGKILL)
    serve.until(lambda: serve.status().recoveries > before, "the repair is told", 30)


@needs_prlimit
@pytest.mark.parametrize("limits", ["256:256", "256:4096"])
def test_idle_clients_hold_up_neither_repair_nor_probe_nor_request(tmp_path: Path, limits: str) -> None:
    with served(tmp_path, *TWO_RANKS, before=("prlimit", f"--nofile={limits}", "--")) as serve:
        serve.ready()
        bus = serve.url_of("--bus-port")
        with idle(serve.api, 300), idle(serve.status_url, 300), idle(bus, 150):
            kill_and_heal(serve)
            with httpx.Client(timeout=60) as client:
                assert client.get(f"{serve.status_url}/readyz").status_code == 200
                body = {"model": "tiny-chat", "prompt": "The", "max_tokens": 3}
                assert client.post(f"{serve.api}/v1/completions", json=body).status_code == 200
        assert HTTP.get(f"{serve.status_url}/healthz", timeout=60).status_code == 200
        assert "Too many open files" not in serve.log.read_text()
        assert "Traceback" not in serve.log.read_text()


def limit_stack(serve: Served, limits: str) -> None:
    """`limits`: soft and hard, in bytes; of the one who serves. Its children's arguments and environment may take a
    quarter of the soft one (execve(2))."""
    subprocess.run(["prlimit", f"--pid={serve.process.pid}", f"--stack={limits}"], check=True, timeout=60)


def tried(serve: Served, line: str) -> bool:
    return serve.log.read_text().count(line) >= 3


@needs_prlimit
def test_what_the_kernel_refuses_to_start_is_told_and_tried_again(tmp_path: Path) -> None:
    crowd = {f"LOCKSTEP_TEST_{number}": "x" * LONGEST_VARIABLE for number in range(12)}
    soft, hard = (str(limit) if limit != resource.RLIM_INFINITY else "unlimited" for limit in STACK)
    with served(tmp_path, *TWO_RANKS, environment=crowd) as serve:
        serve.ready()
        limit_stack(serve, f"{4 * MIB}:{hard}")
        for name in ("lockstep: engine", "lockstep: zygote"):
            os.kill(serve.pid_of(name), signal.SIGKILL)
        refused = "can't be started: Argument list too long"
        serve.until(lambda: bool(serve.status().pod_problems), "it is told", 60)
        [problem] = serve.status().pod_problems
        assert problem.reason is PodProblemReason.SPAWN_FAILED
        assert refused in problem.message
        serve.until(lambda: "the engine can't be started" in serve.status().message, "why nothing is served", 60)
        assert not serve.status().accepting
        serve.until(lambda: tried(serve, f"the engine {refused}"), "the engine is tried again", 60)
        serve.until(lambda: tried(serve, f"the zygote {refused}"), "the zygote is tried again", 60)
        limit_stack(serve, f"{soft}:{hard}")
        serve.ready()
        kill_and_heal(serve)


@needs_memory_cgroup
def test_a_zygote_that_has_no_room_is_why_the_ranks_are_waited_for(tmp_path: Path) -> None:
    with memory_cgroup.memory_group(150 * MIB) as group, served(tmp_path, *TWO_RANKS, before=group.before) as serve:
        serve.until(lambda: answers(serve) and bool(serve.status().pod_problems), "it is told", 90)
        [problem] = serve.status().pod_problems
        assert problem.reason is PodProblemReason.OUT_OF_MEMORY
        assert "was killed by the kernel: out of memory (limit 150 MiB, used 1" in problem.message
        serve.until(lambda: "waiting for ranks 0, 1 to connect: the " in serve.status().message, "and why", 60)
        assert "out of memory (limit 150 MiB" in serve.status().message
        group.limit(4096 * MIB)
        serve.ready()  # once there is room


# Takes memory until that process is gone. The kernel chooses it first, this one next, and nothing of what is served.
HUNGRY = """
import sys
from pathlib import Path
Path(f"/proc/{sys.argv[1]}/oom_score_adj").write_text("1000")
Path("/proc/self/oom_score_adj").write_text("999")
taken = []
def state():
    try:
        return open(f"/proc/{sys.argv[1]}/stat").read().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return "X"
while state() not in "XZ" and len(taken) < 4096:
    taken.append(bytearray(2**20))
"""


@needs_memory_cgroup
def test_a_rank_that_is_killed_for_want_of_memory_is_a_fault_that_says_so(tmp_path: Path) -> None:
    with (
        memory_cgroup.memory_group(4096 * MIB) as group,
        served(tmp_path, *TWO_RANKS, before=group.before) as serve,
    ):
        serve.ready()
        group.limit(group.used() + 64 * MIB)
        rank = serve.pid_of("rank=1")
        hungry = subprocess.run([*group.before, sys.executable, "-c", HUNGRY, str(rank)], timeout=60, check=False)
        serve.until(lambda: bool(serve.status().faults), "it is told", 30)
        group.limit(4096 * MIB)  # there is room for the next one
        assert hungry.returncode in (0, -signal.SIGKILL)
        serve.until(lambda: serve.status().recoveries > 0, "it is healed", 90)
        [fault] = serve.status().faults
        assert (fault.fault, fault.rank) == (Fault.RANK_LOST, 1)
        assert f"rank 1 (pid {rank}) was killed by the kernel: out of memory (limit " in fault.message
        [problem] = serve.status().pod_problems
        assert " was killed by the kernel: out of memory (limit " in problem.message
        assert serve.complete("The", 3)


def little_shared_memory(megabytes: float) -> tuple[str, ...]:
    """Runs the rest of the line where /dev/shm has so much room."""
    script = f'mount -t tmpfs -o size={int(megabytes * MIB)} tmpfs /dev/shm && exec "$@"'
    return ("unshare", "-m", "sh", "-c", script, "sh")


@needs_root
@pytest.mark.parametrize(
    ("megabytes", "words", "cached"),
    [
        (2, "/dev/shm has no room for the exchange of 2 ranks: it takes 4.0 MiB, and 2 MiB are left", 0),
        (6, "12.0 MiB are kept for the ranks' exchange, and 6 MiB are left", 0),
        (14, "12.0 MiB are kept for the ranks' exchange, and 14 MiB are left", 0),
        (64, "the weight cache takes", 2),
    ],
)
def test_the_weight_cache_gives_way_to_the_exchange(tmp_path: Path, megabytes: int, words: str, cached: int) -> None:
    with served(tmp_path, *TWO_RANKS, before=little_shared_memory(megabytes)) as serve:
        serve.ready()
        assert words in serve.log.read_text()
        shared = Path(f"/proc/{serve.process.pid}/root/dev/shm")
        assert len(list(shared.glob("lockstep-weights-*"))) == cached
        answer = serve.complete("The", 5)
        kill_and_heal(serve)
        assert serve.complete("The", 5) == answer
        assert serve.log.read_text().count("no weight cache") <= 2 * 2  # for each start of a rank one line
