"""`lockstep serve` as a user starts it: real processes, a real model, real signals."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import httpx
import pytest
import torch
from tests.support.file_watch import accesses
from tests.support.http import HTTP
from tests.support.ports import free_port
from tests.support.serve import TINY_CHAT, TOKEN, Served, is_running, lasting_threads_of, served, threads_of, title_of
from tests.support.stream import Stream
from transformers import AutoModelForCausalLM, AutoTokenizer

from lockstep_runtime.protocol.status import Fault, GroupState, GroupStatus, RankState
from lockstep_runtime.protocol.tokens import Purpose, purpose_token

PROMPTS = [
    "The",
    "A function definition",
    "The for statement is used to",
    "In Python, a class is " * 6,
    "What is a module? " * 40,
    "An exception",
]
ANSWER = 24


@pytest.fixture(scope="module")
def unloaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, GroupStatus]]:
    """A group of two ranks in float32 whose model is not there yet, and what it says of that."""
    directory = tmp_path_factory.mktemp("serve")
    arguments = ("--tensor-parallel-size", "2", "--dtype", "float32", "--threads-per-rank", "1")
    with served(directory, *arguments, model=directory / "tiny-chat") as serve:
        serve.until(lambda: _up(serve) and serve.status().state is GroupState.FAILED, "the failure is told", 120)
        yield serve, serve.status()


@pytest.fixture(scope="module")
def server(unloaded: tuple[Served, GroupStatus]) -> Served:
    """The same, serving. All tests of this file share it: each leaves it ready, but the last, which ends it."""
    serve, _ = unloaded
    (serve.log.parent / "tiny-chat").symlink_to(TINY_CHAT)
    serve.ready()
    return serve


@pytest.fixture(scope="module")
def oracle() -> dict[str, str]:
    """What transformers' greedy `generate` answers, as text."""
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(TINY_CHAT)
    model = AutoModelForCausalLM.from_pretrained(TINY_CHAT, dtype=torch.float32)
    answers = {}
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        tokens = model.generate(**inputs, max_new_tokens=300, do_sample=False)[0, length:]
        answers[prompt] = tokenizer.decode(tokens, skip_special_tokens=True)
    return answers


def stream(serve: Served, prompt: str, max_tokens: int) -> Stream:
    """A greedy completion, streamed."""
    request = {"model": "tiny-chat", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": False}
    return Stream(serve.api, request, 180)


def test_a_missing_model_is_reported_and_served_once_it_is_there(
    unloaded: tuple[Served, GroupStatus], server: Served
) -> None:
    serve, told = unloaded
    assert f"{serve.log.parent / 'tiny-chat'} does not exist" in told.message
    assert server.status().state is GroupState.READY
    assert server.status().faults == []


def test_greedy_answers_equal_transformers_for_concurrent_prompts(server: Served, oracle: dict[str, str]) -> None:
    with ThreadPoolExecutor(len(PROMPTS)) as clients:
        answers = list(clients.map(lambda prompt: server.complete(prompt, ANSWER), PROMPTS))
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert answer
        assert oracle[prompt].startswith(answer)


def test_processes_show_what_they_are(server: Served) -> None:
    def titles() -> list[str]:
        return sorted(title_of(pid) for pid in (server.process.pid, *server.child_pids()))

    def to_come() -> list[str]:
        return [title for title in titles() if "zygote" in title or "standby" in title]

    server.until(lambda: len(to_come()) == 5, "there are all zygotes, and the ranks' standbys", 120)
    assert titles() == [
        "lockstep: engine model=local group=0",
        "lockstep: loaded zygote of rank 0 model=local group=0",
        "lockstep: loaded zygote of rank 1 model=local group=0",
        "lockstep: standby of rank 0 model=local group=0",
        "lockstep: standby of rank 1 model=local group=0",
        "lockstep: supervisor model=local group=0",
        "lockstep: worker model=local group=0 rank=0",
        "lockstep: worker model=local group=0 rank=1",
        "lockstep: zygote model=local group=0",
    ]


@pytest.mark.parametrize("title", ["lockstep: zygote", "loaded zygote of rank 0", "loaded zygote of rank 1"])
def test_a_zygote_has_one_thread_so_that_it_may_be_forked(server: Served, title: str) -> None:
    assert threads_of(server.pid_of(title)) == 1


def test_status_is_for_those_with_the_token_and_tells_every_rank(server: Served) -> None:
    assert HTTP.get(f"{server.status_url}/healthz", timeout=60).status_code == 200
    assert HTTP.get(f"{server.status_url}/status").status_code == 401
    wrong = {"Authorization": "Bearer wrong"}
    assert HTTP.get(f"{server.status_url}/status", headers=wrong).status_code == 401
    reader = {"Authorization": f"Bearer {purpose_token(TOKEN, Purpose.STATUS)}"}
    assert HTTP.get(f"{server.status_url}/status", headers=reader).status_code == 200
    assert HTTP.get(f"{server.status_url}/config", headers=reader).status_code == 200
    server.complete("The", 5)
    server.until(lambda: server.status().ranks[0].step_latency.p50_ms is not None, "latencies are told")
    status = server.status()
    assert status.state is GroupState.READY
    assert [rank.state for rank in status.ranks] == [RankState.READY] * 2
    assert {rank.pid for rank in status.ranks} <= set(server.child_pids())
    assert all(rank.memory_bytes > 0 and rank.last_step >= 0 for rank in status.ranks)


def test_status_long_poll_answers_at_once_or_when_something_changes(server: Served) -> None:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    url = f"{server.status_url}/status"
    known = server.status().revision
    begun = time.monotonic()
    assert HTTP.get(url, params={"after": known - 1}, headers=headers, timeout=40).json()["revision"] >= known
    assert time.monotonic() - begun < 5
    with ThreadPoolExecutor(1) as reader:
        known = server.status().revision
        poll = reader.submit(httpx.get, url, params={"after": known}, headers=headers, timeout=40)
        server.complete("The", 3)
        assert poll.result(20).json()["revision"] > known
    assert HTTP.get(url, params={"after": "x"}, headers=headers).status_code == 400


@pytest.mark.parametrize("rank", [1, 0])
def test_a_killed_rank_is_a_pause_and_the_stream_goes_on_with_the_same_tokens(
    server: Served, oracle: dict[str, str], rank: int
) -> None:
    before = server.status()
    streams = [stream(server, prompt, 300) for prompt in PROMPTS[:3]]
    server.until(lambda: all(one.pieces > 5 for one in streams), "the streams have begun")
    with accesses(TINY_CHAT / "model.safetensors") as seen:
        os.kill(server.pid_of(f"rank={rank}"), signal.SIGKILL)
        for one, prompt in zip(streams, PROMPTS[:3], strict=True):
            answer = one.wait()
            assert (answer.text, answer.error) == (oracle[prompt], "")
            assert answer.finish in ("length", "stop")
        server.until(lambda: server.status().recoveries == before.recoveries + 1, "the repair is told")
        assert seen() == []  # nobody has opened or read the checkpoint
    fault = server.status().faults[-1]
    assert (fault.fault, fault.rank, fault.rung) == (Fault.RANK_LOST, rank, "Respawn")
    assert "was killed by SIGKILL" in fault.message
    assert server.status().ranks[rank].respawns == before.ranks[rank].respawns + 1
    assert server.status().ranks[1 - rank].pid == before.ranks[1 - rank].pid
    assert f"rank {rank} has a new process from its loaded zygote" in server.log.read_text()


def test_a_killed_engine_comes_back_and_the_ranks_keep_their_weights(server: Served, oracle: dict[str, str]) -> None:
    before = server.status()
    os.kill(server.pid_of("engine"), signal.SIGKILL)
    server.until(lambda: not server.is_ready(), "it is unready")
    server.ready()
    server.until(lambda: server.status().state is GroupState.READY, "the status is told anew")
    after = server.status()
    assert after.epoch > before.epoch
    assert after.revision > before.revision
    assert [fault.id for fault in after.faults] == [fault.id for fault in before.faults]
    assert [rank.pid for rank in after.ranks] == [rank.pid for rank in before.ranks]
    assert oracle[PROMPTS[0]].startswith(server.complete(PROMPTS[0], ANSWER))


def test_a_stopped_zygote_holds_up_no_probe_and_no_repair(server: Served, oracle: dict[str, str]) -> None:
    before = server.status()
    stopped = server.pid_of("loaded zygote of rank 0")
    os.kill(stopped, signal.SIGSTOP)
    os.kill(server.pid_of("lockstep: zygote"), signal.SIGSTOP)
    os.kill(server.pid_of("rank=0"), signal.SIGKILL)
    seconds: list[float] = []

    def is_healed() -> bool:
        begun = time.monotonic()
        assert HTTP.get(f"{server.status_url}/healthz", timeout=60).status_code == 200
        seconds.append(time.monotonic() - begun)
        return server.status().recoveries > before.recoveries

    server.until(is_healed, "the rank came from another zygote", 120)
    assert max(seconds) < 0.8  # the loaded zygote is given a second to answer
    assert not is_running(stopped)
    assert oracle[PROMPTS[0]].startswith(server.complete(PROMPTS[0], ANSWER))


@pytest.mark.parametrize("port", ["api", "bus", "status"])
def test_a_thousand_malformed_messages_on_every_port(server: Served, port: str) -> None:
    chance = random.Random(port)
    before = server.child_pids()
    url = server.status_url if port == "status" else server.api
    number = int(url.rsplit(":", 1)[1])
    if port == "bus":
        number = int(_flag(server, "--bus-port"))
    for _ in range(1000):
        message = chance.choice(NONSENSE)(chance)
        # The server may close before all has been sent: its right.
        with socket.create_connection(("127.0.0.1", number), timeout=60) as connection, suppress(ConnectionError):
            connection.sendall(message)
    assert set(before) <= set(server.child_pids())  # a zygote may have come meanwhile
    # More connections than are served at once are turned away until it has seen that they are closed.
    server.until(lambda: HTTP.get(f"{server.status_url}/healthz", timeout=60).status_code == 200, "it serves on")
    assert server.complete("The", 3)
    assert "Traceback" not in server.log.read_text()


def _flag(serve: Served, name: str) -> str:
    arguments = serve.process.args
    assert isinstance(arguments, list)
    return str(arguments[arguments.index(name) + 1])


NONSENSE: list[Callable[[random.Random], bytes]] = [
    lambda chance: chance.randbytes(chance.randint(1, 500)),
    lambda chance: b"\x00\x00\x00\x00",
    lambda chance: b"\xff\xff\xff\xff" + chance.randbytes(50),
    lambda chance: (200).to_bytes(4, "big") + chance.randbytes(200),
    lambda chance: b"GET /status?after=" + b"9" * chance.randint(1, 5000) + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    lambda chance: b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 20\r\n\r\n" + chance.randbytes(20),
    lambda chance: b"GET /" + chance.randbytes(30) + b" HTTP/1.1\r\n\r\n",
    lambda chance: b"POST /status HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
]


def test_nothing_outlives_a_killed_supervisor(tmp_path: Path) -> None:
    with served(tmp_path, "--tensor-parallel-size", "2") as serve:
        serve.until(lambda: len(serve.child_pids()) >= 3, "its children run")
        children = serve.child_pids()
        serve.process.kill()
        serve.process.wait()
        deadline = time.monotonic() + 20
        while any(is_running(pid) for pid in children):
            assert time.monotonic() < deadline, [title_of(pid) for pid in children]
            time.sleep(0.02)


def test_a_process_from_a_loaded_zygote_computes_in_as_many_threads_as_the_one_before_it(tmp_path: Path) -> None:
    with served(tmp_path, "--dtype", "float32", "--threads-per-rank", "2") as serve:
        serve.ready()
        answer = serve.complete(PROMPTS[4], ANSWER)
        threads = lasting_threads_of(serve.pid_of("rank=0"))
        assert threads > 2  # one computes, another listens to the engine
        os.kill(serve.pid_of("rank=0"), signal.SIGKILL)
        assert serve.complete(PROMPTS[4], ANSWER) == answer
        assert "rank 0 has a new process from its loaded zygote" in serve.log.read_text()
        assert lasting_threads_of(serve.pid_of("rank=0")) == threads


def test_recycle_pods_only_says_that_it_is_poisoned(tmp_path: Path) -> None:
    with served(
        tmp_path, "--tensor-parallel-size", "2", "--dtype", "float32", "--recovery-strategy", "RecyclePods"
    ) as serve:
        serve.ready()
        running = stream(serve, PROMPTS[0], 300)
        serve.until(lambda: running.pieces > 5, "the stream has begun")
        os.kill(serve.pid_of("rank=1"), signal.SIGKILL)
        assert "poisoned" in running.wait().error
        serve.until(lambda: serve.status().state is GroupState.POISONED, "it is told")
        assert not serve.is_ready()
        assert serve.status().faults[-1].fault is Fault.RANK_LOST
        assert serve.end() == 0


def test_two_pods_form_a_group_though_the_leader_comes_late(tmp_path: Path, oracle: dict[str, str]) -> None:
    api, bus = free_port(), free_port()
    ports = [[api, bus, free_port()], [api, bus, free_port()]]
    arguments = ["--tensor-parallel-size", "2", "--ranks-per-pod", "1", "--dtype", "float32"]

    def pod(index: int) -> AbstractContextManager[Served]:
        environment = {"LOCKSTEP_POD_INDEX": str(index), "LOCKSTEP_POD": f"tiny-0-{index}"}
        return served(tmp_path, *arguments, ports=ports[index], environment=environment)

    with pod(1) as member:
        member.until(lambda: _up(member), "it is up", 120)
        with pod(0) as leader:
            leader.ready()
            assert oracle[PROMPTS[0]].startswith(leader.complete(PROMPTS[0], ANSWER))
            assert [rank.pod for rank in leader.status().ranks] == ["tiny-0-0", "tiny-0-1"]
            headers = {"Authorization": f"Bearer {TOKEN}"}
            assert HTTP.get(f"{member.status_url}/status", headers=headers).status_code == 404
            assert member.end() == 0  # released, though the group serves
            leader.until(lambda: leader.status().state is GroupState.RECOVERING, "the loss is told")
            assert "rank 1" in leader.status().message


def _up(serve: Served) -> bool:
    try:
        HTTP.get(f"{serve.status_url}/healthz", timeout=5)
    except httpx.TransportError:
        return False
    return True


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tensor-parallel-size", "3", "--ranks-per-pod", "2"], "--ranks-per-pod 2 does not divide"),
        (["--tensor-parallel-size", "two"], "'two' is not a whole number above 0"),
        (["--kv-cache-memory", "lots"], "'lots' is not a size; write it like 2Gi"),
        (["--port", "99999"], "is not a port"),
        (["--pod-index", "1"], "a group of 1 pods has the indexes 0 to 0"),
    ],
)
def test_a_wrong_command_line_says_what_to_change(arguments: list[str], words: str) -> None:
    command = [sys.executable, "-m", "lockstep_runtime", "serve", str(TINY_CHAT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_in_use_is_named_with_its_flag() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "lockstep_runtime", "serve", str(TINY_CHAT), "--bus-port", str(port),
                   "--port", str(free_port()), "--status-port", str(free_port())]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert f"127.0.0.1:{port}: Address already in use; choose another with --bus-port" in done.stderr


def test_sigterm_drains_the_running_stream_is_finished_and_nothing_is_left(server: Served) -> None:
    running = stream(server, PROMPTS[0], 300)
    server.until(lambda: running.pieces > 2, "the stream has begun")
    children = server.child_pids()
    server.process.send_signal(signal.SIGTERM)
    server.until(lambda: not server.is_ready(), "it is unready")
    answer = running.wait()
    assert (answer.error, answer.finish) in (("", "length"), ("", "stop"))
    assert server.process.wait(60) == 0
    assert not [pid for pid in children if is_running(pid)]
