"""A served group on one GPU: contexts really lost, memory that really runs out, two ranks that share it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import httpx
import pytest
from tests.support.chaos import healed, ranks_of, read, tell
from tests.support.faults import inject
from tests.support.gpu import MIB, Ballast, until_used, used_bytes
from tests.support.http import HTTP
from tests.support.models import ModelShape, write_model
from tests.support.serve import TINY_CHAT, Served, served, title_of
from tests.support.stream import answers

from lockstep_runtime.host.shm_files import FOLDER_VARIABLE
from lockstep_runtime.protocol.chaos import FaultPhase, Injection
from lockstep_runtime.protocol.status import Fault, FaultRecord, GroupState

ON_GPU: Final = ("--device", "cuda")
SHARED: Final = (*ON_GPU, "--backend", "cpu", "--tensor-parallel-size", "2")
COMMON: Final = ("--dtype", "float32", "--kv-cache-memory", "128Mi", "--allow-faults")
SLACK: Final = 64 * MIB  # what a driver may keep
ROOM: Final = 512 * MIB  # beside the ballast
KINDS: Final = (Injection.DEVICE_ASSERT, Injection.ILLEGAL_ACCESS)
LOST: Final = Fault.CONTEXT_FAULT
WIDE: Final = ModelShape(  # a prefill takes a megabyte per token for a moment, a long one far more than all weights
    hidden=64, intermediate=1 << 17, layers=1, heads=4, kv_heads=2, head_dim=16, vocabulary=2048, max_positions=4096
)
LONG_PROMPT: Final = 1500  # tokens


@contextlib.contextmanager
def group(directory: Path, *arguments: str, model: Path = TINY_CHAT) -> Iterator[Served]:
    (directory / "shm").mkdir()
    with served(
        directory, *arguments, *COMMON, model=model, environment={FOLDER_VARIABLE: str(directory / "shm")}
    ) as serve:
        serve.ready()
        yield serve
        assert serve.end() == 0, serve.log.read_text()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One rank, one GPU."""
    with group(tmp_path_factory.mktemp("alone"), *ON_GPU) as serve:
        yield serve


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Two ranks that share one GPU."""
    with group(tmp_path_factory.mktemp("pair"), *SHARED) as serve:
        yield serve


def survive(serve: Served, rank: int, kind: Injection, phase: FaultPhase) -> FaultRecord:
    """A fault under two streams, which go on with the same tokens; the memory of the lost context is free again."""
    undisturbed = answers(read(serve))
    assert all(one.text and one.finish == "length" and not one.error for one in undisturbed)
    before, pids, used = {one.id for one in serve.status().faults}, ranks_of(serve.status()), used_bytes()
    if phase is FaultPhase.PREFILL:
        inject(serve, kind, rank, phase=phase)
    streams = read(serve)
    if phase is FaultPhase.DECODE:
        serve.until(lambda: all(stream.pieces > 3 or stream.error for stream in streams), "the streams have begun")
        inject(serve, kind, rank, phase=phase)
    assert answers(streams) == undisturbed, serve.log.read_text()
    healed(serve)
    print(tell(serve, before))
    [record] = [one for one in serve.status().faults if one.id not in before]
    after = ranks_of(serve.status())
    assert (record.fault, record.rank, record.rung) == (LOST, rank, "Respawn")
    assert {other for other in pids if after[other] == pids[other]} == pids.keys() - {rank}
    until_used(used + SLACK)
    return record


@pytest.mark.parametrize("phase", [FaultPhase.DECODE, FaultPhase.PREFILL])
@pytest.mark.parametrize("kind", KINDS)
def test_a_lost_context_is_a_respawn_that_frees_its_memory(alone: Served, kind: Injection, phase: FaultPhase) -> None:
    record = survive(alone, 0, kind, phase)
    assert "the device context is lost" in record.message


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_rank_whose_context_is_lost_is_replaced(pair: Served, rank: int) -> None:
    survive(pair, rank, KINDS[0], FaultPhase.DECODE)


def test_two_ranks_on_one_gpu_answer_as_one_does(alone: Served, pair: Served) -> None:
    prompt = "The for statement is used to"
    assert pair.complete(prompt, 32) == alone.complete(prompt, 32)
    told = [rank.memory_bytes for rank in pair.status().ranks]
    assert len(told) == 2
    assert all(100 * MIB < one <= 128 * MIB for one in told)
    assert used_bytes() > sum(told)


def test_a_killed_rank_of_two_comes_back_on_the_same_gpu(pair: Served) -> None:
    undisturbed, used = answers(read(pair)), used_bytes()
    streams = read(pair)
    pair.until(lambda: all(stream.pieces > 3 for stream in streams), "the streams have begun")
    os.kill(ranks_of(pair.status())[0], signal.SIGKILL)
    assert answers(streams) == undisturbed
    healed(pair)
    until_used(used + SLACK)


def test_the_zygote_holds_nothing_of_the_gpu(alone: Served) -> None:
    """Nor could a process that is forked from it use CUDA, if it did."""
    name = "lockstep: zygote"
    alone.until(lambda: any(name in title_of(pid) for pid in alone.child_pids()), "there is a zygote")
    opened = [str(one.readlink()) for one in Path(f"/proc/{alone.pid_of(name)}/fd").iterdir()]
    assert opened
    assert not [one for one in opened if "nvidia" in one]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A model whose prefill needs far more memory than its weights."""
    directory = tmp_path_factory.mktemp("wide")
    model = write_model(directory / "wide", WIDE)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TINY_CHAT / name, model / name)
    with group(directory, *ON_GPU, "--served-name", "tiny-chat", model=model) as serve:
        yield serve


def ask(serve: Served, tokens: int) -> httpx.Response:
    """A prompt of so many tokens, four more wanted."""
    ids = [100 + number % 1000 for number in range(tokens)]
    body = {"model": "tiny-chat", "prompt": ids, "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    return HTTP.post(f"{serve.api}/v1/completions", json=body, timeout=120)


def test_a_prefill_that_runs_out_of_memory_is_one_clean_error(wide: Served) -> None:
    """The memory is really gone: this process holds it. The group lives on, with its process and for other requests."""
    pids, short = ranks_of(wide.status()), ask(wide, 5)
    assert short.status_code == httpx.codes.OK, short.text
    with Ballast(ROOM):
        failed = ask(wide, LONG_PROMPT)
        assert failed.status_code == httpx.codes.INTERNAL_SERVER_ERROR, failed.text
        assert "out of memory" in failed.text
        healed(wide)
        status = wide.status()
        assert (status.state, ranks_of(status)) == (GroupState.READY, pids)
        assert status.faults[-1].fault is Fault.STEP_FAILED
        assert "out of memory" in status.faults[-1].message
        again = ask(wide, 5)
        assert again.json()["choices"] == short.json()["choices"]
    enough = ask(wide, LONG_PROMPT)
    assert enough.status_code == httpx.codes.OK, enough.text
    assert ranks_of(wide.status()) == pids
