"""The weight cache: what it holds, who may use it, and that damage never gets through."""

from __future__ import annotations

import functools
import mmap
import os
import re
from collections.abc import Generator
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from tests.support.file_watch import accesses
from tests.support.models import ModelShape, write_model

from lockstep_runtime.config import EngineLimits, ServeConfig, WeightCache
from lockstep_runtime.distributed.join import SingleCommunicator
from lockstep_runtime.host import shm_files
from lockstep_runtime.host.process_init import PARENT_VARIABLE
from lockstep_runtime.layers.cache import CacheSize
from lockstep_runtime.layers.weight import PlainWeight
from lockstep_runtime.protocol import bus
from lockstep_runtime.protocol.step import SampledToken, SamplingParams, SequenceSlice
from lockstep_runtime.weights.checksum import PAGE_BYTES, PART_BYTES, RunningChecksum, checksum
from lockstep_runtime.worker.model_runner import LoadReport, ModelRunner
from lockstep_runtime.worker.scrub import CorruptionError, Scrub, Watched

STEP = bus.Step(
    epoch=1,
    step=1,
    sequences=[
        SequenceSlice(sequence_id=1, position=0, tokens=[5, 9, 2, 77], blocks=[0], sample=SamplingParams(temperature=0))
    ],
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This process is the supervisor, and the cache lies in a folder of the test's own."""
    found = tmp_path / "shm"
    found.mkdir()
    monkeypatch.setenv(shm_files.FOLDER_VARIABLE, str(found))
    monkeypatch.setenv(PARENT_VARIABLE, str(os.getpid()))
    return found


def config(model: Path, cache: WeightCache = "Memory", *, size: int = 1) -> ServeConfig:
    limits = EngineLimits(kv_cache_bytes=1 << 22)
    return ServeConfig(
        model=str(model),
        served_name="m",
        tensor_parallel_size=size,
        ranks_per_pod=size,
        weight_cache=cache,
        limits=limits,
    )


def load(config: ServeConfig, rank: int = 0) -> tuple[ModelRunner, LoadReport]:
    runner = ModelRunner(config, rank)
    return runner, runner.load(lambda done, total: None)


def output(runner: ModelRunner) -> tuple[int, list[SampledToken]]:
    runner.allocate(CacheSize(blocks=2))
    step = runner.step(STEP, SingleCommunicator())
    return step.fingerprint, step.sampled


SHAPES = {
    "float32": ModelShape(),
    "tied, float32": ModelShape(tied=True),
    "tied, bfloat16": ModelShape(tied=True, dtype="bfloat16"),
    "bfloat16 with biases": ModelShape(bias=True, dtype="bfloat16"),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_a_rank_that_is_started_again_has_the_same_weights_without_the_checkpoint(
    shape: ModelShape, tmp_path: Path
) -> None:
    model = write_model(tmp_path / "model", shape)
    plain, told = load(config(model, "Off"))
    expected = output(plain)
    first, filled = load(config(model))
    assert output(first) == expected
    with accesses(*model.glob("*.safetensors"), model / "config.json") as seen:
        assert output(load(config(model))[0]) == expected
        assert seen() == []  # the kernel has seen nobody open or read any of it
        (model / "config.json").read_text()
        assert "open config.json" in seen()
    for file in model.iterdir():
        file.unlink()
    second, mapped = load(config(model))
    assert output(second) == expected
    assert (told.read_bytes, filled.read_bytes, mapped.read_bytes) == (told.weight_bytes, told.weight_bytes, 0)
    assert mapped.weight_bytes == filled.weight_bytes == told.weight_bytes


def test_a_process_that_gets_ready_has_all_of_its_weights_in_its_page_table(tmp_path: Path, folder: Path) -> None:
    runner, _ = load(config(write_model(tmp_path / "model", ModelShape(layers=9))))
    [file] = folder.iterdir()
    pages = -(-file.stat().st_size // mmap.PAGESIZE)
    pid = os.fork()  # no page of a file is in a child's table at first
    if pid == 0:
        try:
            before = pages_of(file)
            runner.touch_weights()
            found = pages_of(file)  # not the header's, and the kernel may have taken a few away again to move them
            os._exit(0 if before == 0 and found >= pages * 0.9 else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def pages_of(file: Path) -> int:
    """How many of the file's pages are in this process's page table."""
    sections = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    sizes = [re.search(r"^Rss: +(\d+) kB", one, re.MULTILINE) for one in sections if str(file) in one]
    return sum(int(size[1]) * 1024 // mmap.PAGESIZE for size in sizes if size)


def test_parameters_are_the_file_and_a_stray_write_does_not_reach_it(tmp_path: Path, folder: Path) -> None:
    settings = config(write_model(tmp_path / "model", ModelShape()))
    runner, _ = load(settings)
    expected = output(runner)
    before = next(folder.iterdir()).read_bytes()
    with torch.inference_mode():
        for weight in runner.weights():
            assert isinstance(weight, PlainWeight)
            weight.data.fill_(7.0)
    assert next(folder.iterdir()).read_bytes() == before
    assert output(load(settings)[0]) == expected


@pytest.mark.parametrize("where", ["header", "middle", "last byte"])
def test_a_damaged_file_is_found_out_and_made_anew(
    where: str, tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = config(write_model(tmp_path / "model", ModelShape()))
    runner, filled = load(settings)
    expected, file = output(runner), next(folder.iterdir())
    damaged = bytearray(file.read_bytes())
    at = {"header": 100, "middle": len(damaged) // 2, "last byte": -1}[where]
    damaged[at] ^= 1
    file.write_bytes(damaged)
    again, report = load(settings)
    assert report.read_bytes == filled.read_bytes
    assert "the weight cache is discarded" in caplog.text
    assert output(again) == expected
    assert load(settings)[1].read_bytes == 0


def test_it_is_a_safetensors_file_whose_tensors_are_aligned(tmp_path: Path, folder: Path) -> None:
    load(config(write_model(tmp_path / "model", ModelShape(dtype="bfloat16", vocabulary=101)), size=2), rank=1)
    [file] = folder.iterdir()
    with safe_open(file, framework="pt") as stored:
        known = msgspec.json.decode(stored.metadata()["lockstep"])
        names = [name for name in stored.keys() if not name.startswith("gap before ")]  # noqa: SIM118
        assert sorted(known["checksums"]) == sorted(names)
        assert all(stored.get_tensor(name).data_ptr() % 64 == 0 for name in names)
        assert all(checksum(stored.get_tensor(name)) == known["checksums"][name] for name in names)
    assert "lm_head.weight[51:101]" in names
    assert any("self_attn.q_proj.weight[" in name and "+" in name for name in names)
    assert any("self_attn.o_proj.weight[:, " in name for name in names)


@pytest.mark.parametrize("length", [0, 3, 1000, -1])
def test_a_truncated_file_is_made_anew(length: int, tmp_path: Path, folder: Path) -> None:
    settings = config(write_model(tmp_path / "model", ModelShape()))
    load(settings)
    file = next(folder.iterdir())
    os.truncate(file, length if length >= 0 else file.stat().st_size - 1)
    assert load(settings)[1].read_bytes > 0
    assert load(settings)[1].read_bytes == 0


def test_what_was_kept_for_another_model_is_not_used(tmp_path: Path) -> None:
    first = config(write_model(tmp_path / "a", ModelShape(), seed=1))
    second = config(write_model(tmp_path / "b", ModelShape(), seed=2))
    load(first)
    runner, report = load(second)
    assert report.read_bytes > 0
    assert output(runner) == output(load(config(tmp_path / "b", "Off"))[0])


def test_without_room_the_rank_loads_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = config(write_model(tmp_path / "model", ModelShape()))
    monkeypatch.setenv(shm_files.FOLDER_VARIABLE, str(tmp_path / "not there"))
    runner, report = load(settings)
    assert report.read_bytes == report.weight_bytes
    assert output(runner)
    assert "no weight cache" in caplog.text


def test_without_a_supervisor_and_when_switched_off_nothing_is_left(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model(tmp_path / "model", ModelShape())
    load(config(model, "Off"))
    monkeypatch.delenv(PARENT_VARIABLE)
    load(config(model))
    assert list(folder.iterdir()) == []


def test_ranks_have_files_of_their_own_which_the_supervisor_removes(tmp_path: Path, folder: Path) -> None:
    settings = config(write_model(tmp_path / "model", ModelShape()), size=2)
    for rank in (0, 1):
        load(settings, rank)
    assert len(list(folder.iterdir())) == 2
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in folder.iterdir())
    assert shm_files.remove(os.environ) >= 2  # in /dev/shm there may be leftovers of others
    assert list(folder.iterdir()) == []


@given(st.binary(min_size=1, max_size=3 * PAGE_BYTES), st.data())
def test_any_changed_bit_changes_the_checksum(raw: bytes, data: st.DataObject) -> None:
    tensor = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    before = checksum(tensor)
    bit = data.draw(st.integers(0, len(raw) * 8 - 1))
    tensor[bit // 8] ^= 1 << bit % 8
    assert checksum(tensor) != before
    tensor[bit // 8] ^= 1 << bit % 8
    assert checksum(tensor) == before


@given(st.integers(0, 3 * PAGE_BYTES + 7), st.data())
def test_a_checksum_is_the_same_however_its_bytes_come(size: int, data: st.DataObject) -> None:
    tensor = torch.arange(size, dtype=torch.int64).mul_(2654435761).to(torch.uint8)
    cuts = sorted({0, size, *data.draw(st.lists(st.integers(0, size), max_size=8))})
    running, raw = RunningChecksum(size), tensor.numpy().data
    pieces = data.draw(st.permutations(list(pairwise(cuts))))
    for done, (start, stop) in enumerate(pieces):
        with pytest.raises(ValueError, match=f"{size - sum(b - a for a, b in pieces[:done])} bytes are missing"):
            running.hexdigest()
        running.add(start, raw[start:stop])
    assert running.hexdigest() == checksum(tensor)


def test_pages_and_parts_are_kept_in_order() -> None:
    pages = torch.arange(2 * PART_BYTES // 8, dtype=torch.int64).view(-1, PAGE_BYTES // 8)
    assert checksum(pages) != checksum(pages.flip(0))
    assert checksum(pages.clone()) == checksum(pages)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_the_scrub_finds_nothing_after_steps_and_names_a_changed_tensor(shape: ModelShape, tmp_path: Path) -> None:
    runner, report = load(config(write_model(tmp_path / "model", shape)))
    scrub = report.scrub
    assert scrub is not None
    output(runner)
    _whole_round(scrub)
    name = runner.flip_bit(12345)
    with pytest.raises(CorruptionError, match=name.replace("+", r"\+")):
        _whole_round(scrub)


def _whole_round(scrub: Scrub) -> None:
    rounds = scrub.rounds
    while scrub.rounds == rounds:
        scrub.turn(0.0)


def test_the_scrub_spreads_its_turns_over_the_interval() -> None:
    looked: list[float] = []
    now = 1000.0

    def parts(count: int) -> Generator[None, None, str]:
        for _ in range(count):
            looked.append(now)
            yield
        return "same"

    watched = [Watched(f"tensor {count}", functools.partial(parts, count), "same") for count in (1, 3, 0, 2)]
    scrub = Scrub(watched, 100.0, now)
    while scrub.rounds < 2:
        now += scrub.wait(now) or 0.0
        scrub.turn(now)
    assert now == 1200.0
    assert looked == [1025, 1050, 1050, 1050, 1100, 1100, 1125, 1150, 1150, 1150, 1200, 1200]


def test_the_scrub_can_be_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCKSTEP_SCRUB_SECONDS", "0")
    assert load(config(write_model(tmp_path / "model", ModelShape())))[1].scrub is None
