"""Real faults in real processes under a stream: it pauses, goes on with the same tokens, and the culprit is named."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.contract.test_serve import Stream
from tests.support.faults import inject
from tests.support.serve import TINY_CHAT, Served, served, title_of

from lockstep_runtime.wire import Fault, FaultRecord, GroupState, Injection, Moment, Phase

PROMPT, TOKENS = "The for statement is used to", 200
PHASES = {"detect", "abort", "respawn", "rebuild", "verify", "firstToken"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("faults")
    with served(
        directory, "--tensor-parallel-size", "2", "--dtype", "float32", "--threads-per-rank", "1", "--allow-faults"
    ) as serve:
        serve.ready()
        yield serve


@pytest.fixture(scope="module")
def undisturbed(server: Served) -> str:
    return server.complete(PROMPT, TOKENS)


def has_spare(serve: Served) -> bool:
    return any(title_of(pid).startswith("lockstep: spare") for pid in serve.child_pids())


def meet(serve: Served, undisturbed: str, harm: Harm) -> FaultRecord:
    """The one fault that a stream met, which has the right text all the same."""
    serve.until(lambda: has_spare(serve), "there is a spare", 120)
    before = serve.status()
    stream = Stream(serve, PROMPT, TOKENS)
    serve.until(lambda: stream.chunks > 5, "the stream has begun")
    harm(serve)
    stream.wait()
    assert (stream.error, stream.text) == ("", undisturbed)
    serve.until(lambda: serve.status().recoveries == before.recoveries + 1, "the repair is told")
    fault = serve.status().faults[-1]
    assert fault.phases.keys() >= PHASES
    print(f"{fault.fault} {fault.rung} {fault.phases}: {fault.message}")
    return fault


class Harm:
    """What is done to rank 1."""

    def __init__(self, number: int = 0, kind: Injection | None = None, at: Moment = Moment.BEFORE) -> None:
        self._number, self._kind, self._at = number, kind, at

    def __call__(self, serve: Served) -> None:
        if self._kind is None:
            os.kill(serve.pid_of("rank=1"), self._number)
        else:
            inject(serve, self._kind, 1, phase=Phase.DECODE, at=self._at, place="layers.2.mlp.down_proj")


def test_a_rank_that_hangs_outside_a_collective_is_named_with_the_place(server: Served, undisturbed: str) -> None:
    fault = meet(server, undisturbed, Harm(kind=Injection.HANG))
    assert (fault.fault, fault.rank, fault.rung) == (Fault.HANG, 1, "Respawn")
    assert "rank 1 stopped before layers.2.mlp.down_proj, rank 0 waited" in fault.message


def test_a_rank_that_hangs_inside_a_collective_is_aborted_and_kept(server: Served, undisturbed: str) -> None:
    pids = [rank.pid for rank in server.status().ranks]
    fault = meet(server, undisturbed, Harm(kind=Injection.HANG, at=Moment.INSIDE))
    assert (fault.fault, fault.rung) == (Fault.HANG, "Rebuild")
    assert "layers.2.mlp.down_proj" in fault.message
    assert [rank.pid for rank in server.status().ranks] == pids


def test_a_stopped_process_is_noticed_before_any_deadline(server: Served, undisturbed: str) -> None:
    fault = meet(server, undisturbed, Harm(signal.SIGSTOP))
    assert (fault.fault, fault.rank, fault.rung) == (Fault.HANG, 1, "Respawn")
    assert "was stopped by SIGSTOP" in fault.message


def test_a_rank_that_raises_says_so_while_its_peer_still_waits(server: Served, undisturbed: str) -> None:
    fault = meet(server, undisturbed, Harm(kind=Injection.RAISE))
    assert (fault.fault, fault.rank, fault.rung) == (Fault.STEP_FAILED, 1, "Rebuild")


def test_a_crash_is_a_respawn_from_the_spare(server: Served, undisturbed: str) -> None:
    fault = meet(server, undisturbed, Harm(signal.SIGSEGV))
    assert (fault.fault, fault.rank, fault.rung) == (Fault.RANK_LOST, 1, "Respawn")
    assert "was killed by SIGSEGV" in fault.message


def test_the_log_tells_every_phase_in_one_line(server: Served, undisturbed: str) -> None:
    fault = meet(server, undisturbed, Harm(signal.SIGKILL))
    lines = server.log.read_text().splitlines()
    told = [line.split("engine: ", 1)[1].split(":")[0] for line in lines if f": fault {fault.id} epoch " in line]
    assert told == ["watchdog", "abort", "respawn", "rebuild", "verify", "resumed"]


def test_recycle_pods_only_says_that_it_is_poisoned(tmp_path: Path) -> None:
    with served(
        tmp_path, "--tensor-parallel-size", "2", "--dtype", "float32", "--recovery-strategy", "RecyclePods",
        model=TINY_CHAT,
    ) as serve:  # fmt: skip
        serve.ready()
        stream = Stream(serve, PROMPT, TOKENS)
        serve.until(lambda: stream.chunks > 5, "the stream has begun")
        os.kill(serve.pid_of("rank=1"), signal.SIGKILL)
        stream.wait()
        assert "poisoned" in stream.error
        serve.until(lambda: serve.status().state is GroupState.POISONED, "it is told")
        assert not serve.is_ready()
        assert serve.status().faults[-1].fault is Fault.RANK_LOST
        assert serve.end() == 0
