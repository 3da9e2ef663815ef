"""Faults on purpose: each does what it says, once, where it was asked for, and nothing without permission."""

from __future__ import annotations

import http.server
import logging
import os
import resource
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import httpx
import msgspec
import pytest
import torch
from torch import Tensor

from lockstep_runtime.chaos import pending
from lockstep_runtime.chaos.injector import InjectedError, Injector
from lockstep_runtime.cli import check_faults, main
from lockstep_runtime.config import ServeConfig, UsageError
from lockstep_runtime.distributed.communicator import Communicator
from lockstep_runtime.distributed.errors import CommunicatorAborted
from lockstep_runtime.distributed.join import SingleCommunicator
from lockstep_runtime.distributed.traced import TracedCommunicator
from lockstep_runtime.host import discovery
from lockstep_runtime.host.process_init import PARENT_VARIABLE
from lockstep_runtime.host.shm_files import FOLDER_VARIABLE, remove
from lockstep_runtime.protocol import bus
from lockstep_runtime.protocol.chaos import CollectivePoint, FaultPhase, Inject, Injection
from lockstep_runtime.protocol.progress_record import Progress, new_memory
from lockstep_runtime.protocol.step import SequenceSlice
from lockstep_runtime.protocol.tokens import Purpose, purpose_token
from lockstep_runtime.supervisor.callers import Callers
from lockstep_runtime.supervisor.member_readiness import MemberReadiness
from lockstep_runtime.supervisor.server import create_app

SECONDS = 10.0


def step(*lengths: int) -> bus.Step:
    sequences = [
        SequenceSlice(sequence_id=index, position=0, tokens=[7] * length, blocks=[0])
        for index, length in enumerate(lengths)
    ]
    return bus.Step(epoch=1, step=1, sequences=sequences)


PREFILL, DECODE = step(1, 3), step(1, 1)


class Bench:
    """An injector, what it calls, and a group that notes where it was used."""

    def __init__(self) -> None:
        self.progress = Progress(new_memory("test"))
        self.called: list[str] = []
        self.injector = Injector(0, self.progress, lambda: self.called.append("bus"))
        self.injector.begin_load(self._flip)

    def _flip(self, number: int) -> str:
        self.called.append(f"bit {number}")
        return "a tensor"

    def arm(self, kind: Injection, **more: object) -> None:
        self.injector.arm(msgspec.convert({"type": "Inject", "rank": 0, "kind": kind, **more}, Inject))

    def run(self, one: bus.Step, *places: str, values: float = 1.0) -> tuple[bus.Step, list[Tensor]]:
        """The step as it is given on, and the result of an all-reduce of ones at each place."""
        watched = TracedCommunicator(SingleCommunicator(), self.progress)
        given, group = self.injector.step(one, watched)
        return given, [group.all_reduce(torch.full((2, 2), values), place) for place in places or ("a", "b")]


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_nothing_is_changed_without_a_fault(bench: Bench) -> None:
    watched = TracedCommunicator(SingleCommunicator(), bench.progress)
    assert bench.injector.step(PREFILL, watched) == (PREFILL, watched)


@pytest.mark.parametrize(("phase", "hit", "spared"), [("prefill", PREFILL, DECODE), ("decode", DECODE, PREFILL)])
def test_a_fault_waits_for_its_phase_and_happens_once(
    bench: Bench, phase: str, hit: bus.Step, spared: bus.Step
) -> None:
    bench.arm(Injection.RAISE, phase=phase)
    bench.run(spared)
    with pytest.raises(InjectedError):
        bench.run(hit)
    bench.run(hit)


def test_it_happens_at_the_named_place_after_so_many_steps(bench: Bench) -> None:
    bench.arm(Injection.RAISE, phase="decode", place="layers.1.mlp", skip=2)
    for _ in range(2):
        bench.run(DECODE, "layers.1.mlp.down_proj")
    bench.run(PREFILL, "layers.1.mlp.down_proj")
    watched = TracedCommunicator(SingleCommunicator(), bench.progress)
    _, group = bench.injector.step(DECODE, watched)
    group.all_reduce(torch.ones(1), "layers.0.mlp.down_proj")
    with pytest.raises(InjectedError):
        group.all_reduce(torch.ones(1), "layers.1.mlp.down_proj")


def test_after_a_collective_means_that_the_others_have_passed_it(bench: Bench) -> None:
    bench.arm(Injection.RAISE, at="after")
    with pytest.raises(InjectedError):
        bench.run(DECODE)
    assert (bench.progress.read().collective, bench.progress.read().inside) == (1, False)


def test_a_nan_and_an_altered_activation_are_in_one_sum_only(bench: Bench) -> None:
    bench.arm(Injection.NAN, place="a")
    bench.arm(Injection.ACTIVATION, place="b")
    _, (first, second, third) = bench.run(DECODE, "a", "b", "c")
    assert first.isnan().sum() == 1
    assert second.tolist() == [[2.0, 1.0], [1.0, 1.0]]
    assert third.tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_an_altered_input_is_another_token(bench: Bench) -> None:
    bench.arm(Injection.INPUT, phase="prefill")
    given, _ = bench.run(PREFILL)
    assert [one.tokens for one in given.sequences] == [[6], [7, 7, 7]]
    assert bench.run(PREFILL)[0] == PREFILL


def test_a_hang_inside_a_collective_ends_by_an_abort_and_the_record_shows_it(bench: Bench) -> None:
    bench.arm(Injection.HANG, at="inside", place="b")
    group = SingleCommunicator()
    caught: list[str] = []

    def work() -> None:
        _, faulty = bench.injector.step(DECODE, TracedCommunicator(group, bench.progress))
        faulty.all_reduce(torch.ones(1), "a")
        try:
            faulty.all_reduce(torch.ones(1), "b")
        except CommunicatorAborted as error:
            caught.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    wait_for(lambda: bench.progress.read().inside)
    assert bench.progress.read().place == "b"
    group.release()
    thread.join(SECONDS)
    assert caught


def test_memory_runs_out_for_real_and_is_there_again(bench: Bench) -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    bench.arm(Injection.MEMORY)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        bench.run(DECODE)
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert torch.ones(100_000_000).sum() == 1e8


def test_what_needs_no_step_happens_at_once_or_when_idle(bench: Bench) -> None:
    bench.arm(Injection.CLOSE_BUS)
    assert bench.called == ["bus"]
    bench.arm(Injection.FLIP_BIT, phase="idle", number=9)
    assert bench.called == ["bus"]
    bench.injector.idle()
    assert bench.called == ["bus", "bit 9"]
    bench.injector.idle()
    assert bench.called == ["bus", "bit 9"]


def test_what_needs_a_step_waits_for_the_next_when_it_was_to_be_idle(bench: Bench) -> None:
    bench.arm(Injection.NAN, phase="idle")
    bench.run(DECODE)
    bench.injector.idle()
    assert bench.run(DECODE, "a")[1][0].isnan().any()


@pytest.mark.parametrize(("phase", "act"), [("joining", Injector.joining), ("loading", Injector.loading)])
def test_joining_and_loading_have_their_own(bench: Bench, phase: str, act: Callable[[Injector], None]) -> None:
    bench.arm(Injection.RAISE, phase=phase)
    bench.injector.idle()
    bench.run(PREFILL)
    with pytest.raises(InjectedError):
        act(bench.injector)
    act(bench.injector)


def test_a_slow_rank_is_slow_for_so_many_steps(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("lockstep_runtime.chaos.injector.time.sleep", slept.append)
    bench.arm(Injection.SLOW, seconds=0.25, times=3)
    for _ in range(5):
        bench.run(DECODE)
    assert slept == [0.25] * 3


@pytest.mark.parametrize("kind", list(Injection))
@pytest.mark.parametrize("at", list(CollectivePoint))
def test_every_kind_has_a_deed(
    bench: Bench, kind: Injection, at: CollectivePoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Process-level deeds are only noted here; tests/chaos does them for real."""
    deeds: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *_: deeds.append(name)

    module = "lockstep_runtime.chaos.injector"
    monkeypatch.setattr(f"{module}.os.kill", note("kill"))
    monkeypatch.setattr(f"{module}.os._exit", note("exit"))
    monkeypatch.setattr(f"{module}.ctypes.string_at", note("segv"))
    monkeypatch.setattr(f"{module}.hang", note("hang"))
    monkeypatch.setattr(f"{module}.exhaust_memory", note("memory"))
    monkeypatch.setattr(f"{module}.harm_device", note("device"))
    monkeypatch.setattr(f"{module}.time.sleep", note("slow"))
    bench.arm(kind, phase=FaultPhase.DECODE, at=at)
    group: Communicator = SingleCommunicator()
    if kind is Injection.HANG and at is CollectivePoint.INSIDE:
        group.release()
    try:
        given, faulty = bench.injector.step(DECODE, TracedCommunicator(group, bench.progress))
        changed = given != DECODE or not torch.equal(faulty.all_reduce(torch.ones(2)), torch.ones(2))
    except (InjectedError, CommunicatorAborted):
        changed = True
    assert changed or deeds or bench.called


@pytest.mark.parametrize("kind", sorted(pending.ON_GPU))
def test_a_rank_without_a_gpu_says_so_and_is_unharmed(
    bench: Bench, kind: Injection, caplog: pytest.LogCaptureFixture
) -> None:
    bench.arm(kind)
    given, sums = bench.run(DECODE)
    assert given == DECODE
    assert all(torch.equal(one, torch.ones(2, 2)) for one in sums)
    assert f"{kind} is refused: this rank does not compute on a GPU" in caplog.text


def wait_for(condition: Callable[[], bool]) -> None:
    done = threading.Event()
    for _ in range(int(SECONDS / 0.005)):
        if condition():
            return
        done.wait(0.005)
    raise AssertionError("it did not happen")


# --- how a fault gets there


@pytest.fixture
def box(tmp_path: Path) -> dict[str, str]:
    """The environment of a worker whose supervisor is this process."""
    return {FOLDER_VARIABLE: str(tmp_path), PARENT_VARIABLE: str(os.getpid())}


def test_a_fault_left_for_a_rank_is_found_once_and_by_no_other(box: dict[str, str], tmp_path: Path) -> None:
    faults = [Inject(rank=1, kind=kind) for kind in (Injection.EXIT, Injection.RAISE)]
    for fault in faults:
        pending.leave(box, fault)
    assert pending.take(box, 0) == []
    assert pending.take(box | {PARENT_VARIABLE: "1"}, 1) == []
    assert pending.take(box, 1) == faults
    assert pending.take(box, 1) == []
    pending.leave(box, faults[0])
    remove(box)
    assert list(tmp_path.iterdir()) == []


def test_the_one_shot_variable_is_checked_at_the_start() -> None:
    # A prompt is prefilled for practice before any request's.
    assert pending.parse_once("hang:1") == Inject(rank=1, kind=Injection.HANG, phase=FaultPhase.PREFILL, skip=1)
    config = ServeConfig(model="m", served_name="m", allow_faults=True)
    for wrong in ("hang", "hang:", "crash:0", "hang:x"):
        with pytest.raises(UsageError, match="LOCKSTEP_FAULT_ONCE"):
            check_faults(config, {pending.ONCE_VARIABLE: wrong})
    check_faults(ServeConfig(model="m", served_name="m"), {pending.ONCE_VARIABLE: "not read: no faults are allowed"})


def client(inject: Callable[[Inject], bool] | None) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app=create_app(MemberReadiness(), Callers("secret"), inject=inject))
    return httpx.AsyncClient(transport=transport, base_url="http://test", headers={"Authorization": "Bearer secret"})


async def test_the_endpoint_is_there_only_where_faults_are_allowed() -> None:
    body = msgspec.json.encode(Inject(rank=0, kind=Injection.EXIT))
    async with client(None) as http:
        assert (await http.post("/inject", content=body)).status_code == 404
    taken: list[Inject] = []

    def take(fault: Inject) -> bool:
        taken.append(fault)
        return True

    async with client(take) as http:
        assert (await http.post("/inject", content=body, headers={"Authorization": ""})).status_code == 401
        reader = {"Authorization": f"Bearer {purpose_token('secret', Purpose.STATUS)}"}
        assert (await http.post("/inject", content=body, headers=reader)).status_code == 401, "who reads breaks nothing"
        assert (await http.post("/inject", content=b"{}")).status_code == 400
        assert (await http.post("/inject", content=b" " * 10_000)).status_code == 400
        assert taken == []
        assert (await http.post("/inject", content=body)).status_code == 202
    assert taken == [Inject(rank=0, kind=Injection.EXIT)]
    async with client(lambda _: False) as http:
        assert (await http.post("/inject", content=body)).status_code == 503


@pytest.mark.parametrize("kind", sorted(pending.ON_GPU))
async def test_faults_of_a_gpu_are_refused_where_there_is_none(
    kind: Injection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pending, "DEVICES", tmp_path)
    taken: list[Inject] = []

    def take(fault: Inject) -> bool:
        taken.append(fault)
        return True

    body = msgspec.json.encode(Inject(rank=0, kind=kind))
    config = ServeConfig(model="m", served_name="m", allow_faults=True)
    once = {pending.ONCE_VARIABLE: f"{kind}:0"}
    async with client(take) as http:
        refused = await http.post("/inject", content=body)
        assert (refused.status_code, refused.text) == (409, f"{kind} happens on a GPU, and there is none here\n")
        with pytest.raises(UsageError, match="there is none here"):
            check_faults(config, once)
        (tmp_path / "nvidia0").touch()
        check_faults(config, once)
        assert (await http.post("/inject", content=body)).status_code == 202
    assert taken == [Inject(rank=0, kind=kind)]


def test_the_command_explains_what_a_gpu_is_needed_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["inject", "--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert "device-assert and illegal-access break the CUDA context" in words
    assert "without one they are refused" in words


class _Answering(http.server.BaseHTTPRequestHandler):
    """Takes what it is sent; refuses faults of rank 9."""

    taken: ClassVar[list[tuple[str, str, Inject]]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        fault = msgspec.json.decode(body, type=Inject)
        self.taken.append((self.path, self.headers["Authorization"], fault))
        self.send_response(202 if fault.rank != 9 else 503)
        self.end_headers()
        self.wfile.write(b"there is no engine just now\n")

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def leader() -> Iterator[str]:
    with http.server.HTTPServer(("127.0.0.1", 0), _Answering) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_the_command_asks_for_the_fault_it_was_told(
    leader: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCKSTEP_TOKEN", "secret")
    words = ["hang", "--rank", "1", "--phase", "decode", "--at", "inside", "--place", "layers.2.mlp", "--url", leader]
    with pytest.raises(SystemExit) as ended:
        main(["inject", *words])
    assert ended.value.code == 0
    wanted = Inject(
        rank=1, kind=Injection.HANG, phase=FaultPhase.DECODE, at=CollectivePoint.INSIDE, place="layers.2.mlp"
    )
    assert _Answering.taken[-1] == ("/inject", f"Bearer {purpose_token('secret', Purpose.FAULTS)}", wanted)
    assert "hang on rank 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rank", "url", "words"), [("9", "", "there is no engine just now"), ("1", "http://127.0.0.1:1", "no answer from")]
)
def test_the_command_says_why_it_could_not(
    leader: str, rank: str, url: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["inject", "exit", "--rank", rank, "--url", url or leader])
    assert ended.value.code == 1
    assert words in capsys.readouterr().err


@pytest.fixture
def runtime_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "lockstep"


def test_the_command_finds_the_one_that_serves_on_this_machine(runtime_folder: Path) -> None:
    assert discovery.choose(discovery.found(), "http://otherwise") == ("http://otherwise", "")
    here = discovery.Running(pid=os.getpid(), model="m", port=8000, status_url="http://127.0.0.1:23456")
    discovery.leave(here)
    assert discovery.choose(discovery.found(), "http://otherwise") == (here.status_url, "")
    assert runtime_folder.stat().st_mode & 0o777 == 0o700
    discovery.forget(here.pid)
    assert discovery.found() == []


def test_several_are_listed_and_those_that_ended_are_forgotten(runtime_folder: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    for pid in (os.getpid(), os.getppid(), ended.pid):
        discovery.leave(discovery.Running(pid=pid, model="m", port=pid, status_url=f"http://127.0.0.1:{pid}"))
    url, problem = discovery.choose(discovery.found(), "http://otherwise")
    assert url == ""
    assert f"--url http://127.0.0.1:{os.getpid()} (m on port {os.getpid()})" in problem
    assert str(ended.pid) not in problem
    assert len(list(runtime_folder.iterdir())) == 2


def test_a_folder_of_another_user_is_not_written_to(
    runtime_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    runtime_folder.symlink_to(elsewhere)
    discovery.leave(discovery.Running(pid=os.getpid(), model="m", port=1, status_url="http://x"))
    assert "need --url" in caplog.text
    assert list(elsewhere.iterdir()) == []


def test_faults_that_wait_for_a_rank_are_bounded(tmp_path: Path) -> None:
    environment = {FOLDER_VARIABLE: str(tmp_path), PARENT_VARIABLE: str(os.getpid())}
    fault = Inject(rank=1, kind=Injection.EXIT, phase=FaultPhase.LOADING)
    left = [pending.leave(environment, fault) for _ in range(pending.MOST_WAITING + 3)]
    assert left == [True] * pending.MOST_WAITING + [False] * 3
    assert pending.leave(environment, msgspec.structs.replace(fault, rank=0))
    assert len(pending.take(environment, 1)) == pending.MOST_WAITING
    assert pending.leave(environment, fault)
