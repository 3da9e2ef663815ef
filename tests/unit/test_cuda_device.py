"""How a GPU is chosen and made ready, as far as that goes without one."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lockstep_runtime.config import Backend, Device, ServeConfig
from lockstep_runtime.layers.cache import CacheMemory, CacheShape, CacheSize, Footprint, KVCache, PagedShape
from lockstep_runtime.layers.placement import Placement
from lockstep_runtime.supervisor import accelerator
from lockstep_runtime.worker import device as devices
from lockstep_runtime.worker.memory import blocks_as_before, needed_bytes

GIB = 2**30
CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("device", "backend", "gpus", "settled"),
    [
        ("auto", "auto", True, ("cuda", "nccl")),
        ("auto", "auto", False, ("cpu", "cpu")),
        ("auto", "cpu", True, ("cpu", "cpu")),
        ("auto", "nccl", False, ("cuda", "nccl")),  # which fails, and says so
        ("cuda", "auto", False, ("cuda", "nccl")),
        ("cpu", "auto", True, ("cpu", "cpu")),
        ("cuda", "cpu", True, ("cuda", "cpu")),
    ],
)
def test_auto_is_settled_once(device: Device, backend: Backend, gpus: bool, settled: tuple[str, str]) -> None:
    config = accelerator.settle(ServeConfig(model="m", served_name="m", device=device, backend=backend), gpus=gpus)
    assert (config.device, config.backend) == settled


def test_gpus_are_seen_by_their_device_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "torch_knows_cuda", lambda: True)  # which depends on what is installed
    assert not accelerator.has_gpus({}, tmp_path)
    (tmp_path / "nvidiactl").touch()
    assert not accelerator.has_gpus({}, tmp_path)
    (tmp_path / "nvidia0").touch()
    assert accelerator.has_gpus({}, tmp_path)
    assert accelerator.has_gpus({"CUDA_VISIBLE_DEVICES": "0"}, tmp_path)
    assert not accelerator.has_gpus({"CUDA_VISIBLE_DEVICES": ""}, tmp_path)
    assert not accelerator.has_gpus({"CUDA_VISIBLE_DEVICES": "-1"}, tmp_path)
    monkeypatch.setattr(accelerator, "torch_knows_cuda", lambda: False)
    assert not accelerator.has_gpus({}, tmp_path)


def test_the_installed_torch_says_what_it_was_built_for() -> None:
    assert accelerator.torch_knows_cuda() == (torch.version.cuda is not None)


def uses_cudnn() -> bool:
    return bool(torch.backends.cuda.cudnn_sdp_enabled())  # type: ignore[no-untyped-call]


@pytest.fixture
def cudnn() -> Iterator[None]:
    """As torch has it at its start."""
    before = uses_cudnn()
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.usefixtures("cudnn")
def test_a_gpu_attends_without_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would build a plan for every length of a context."""
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (GIB, GIB))
    devices.prepare(torch.device("cpu"))
    assert uses_cudnn()
    devices.prepare(CUDA)
    assert not uses_cudnn()


def answers(monkeypatch: pytest.MonkeyPatch, errors: list[str]) -> list[torch.device]:
    """The driver, which refuses a device with these words, one after the other, then gives it."""
    asked: list[torch.device] = []

    def set_device(device: torch.device) -> None:
        asked.append(device)
        if errors:
            raise torch.AcceleratorError(f"CUDA error: {errors.pop(0)}")

    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (GIB, GIB))
    monkeypatch.setattr(devices, "LOOK_SECONDS", 0.0)
    return asked


BUSY = "CUDA-capable device(s) is/are busy or unavailable"


@pytest.mark.usefixtures("cudnn")
def test_a_device_that_the_process_before_still_holds_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answers(monkeypatch, [BUSY, "out of memory"])
    devices.prepare(CUDA)
    assert asked == [CUDA] * 3


@pytest.mark.usefixtures("cudnn")
def test_a_device_that_is_gone_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answers(monkeypatch, ["no CUDA-capable device is detected"] * 2)
    with pytest.raises(torch.AcceleratorError, match="no CUDA-capable device"):
        devices.prepare(CUDA)
    assert len(asked) == 1
    monkeypatch.setattr(devices, "SETTLE_SECONDS", 0.0)
    answers(monkeypatch, [BUSY] * 1000)
    with pytest.raises(torch.AcceleratorError, match="busy"):
        devices.prepare(CUDA)


class Driver:
    """Free memory, by the second; `now` moves with every look."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free: list[float]) -> None:
        self.now, self._free = 0.0, free
        monkeypatch.setattr(time, "sleep", self._sleep)

    def _sleep(self, seconds: float) -> None:
        self.now += seconds

    def free(self) -> int:
        return int(self._free[min(int(self.now), len(self._free) - 1)] * GIB)

    def wait(self, needed: int | None) -> int:
        return devices.wait_for_memory(self.free, needed, lambda: self.now)


def test_what_a_killed_process_held_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(monkeypatch, [14, 14, 60, 139])
    assert driver.wait(125 * GIB) == 139 * GIB
    assert 3 <= driver.now < 3.1


def test_memory_that_does_not_come_back_is_waited_for_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(monkeypatch, [14])
    assert driver.wait(125 * GIB) == 14 * GIB
    assert 10 <= driver.now < 10.1


def test_where_nobody_knows_how_much_it_was_it_ends_when_no_more_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    steady = Driver(monkeypatch, [139])
    assert steady.wait(None) == 139 * GIB
    assert steady.now < 0.5
    growing = Driver(monkeypatch, [14])
    growing.free = lambda: int(min(139, 14 + 60 * growing.now) * GIB)  # type: ignore[method-assign]
    assert growing.wait(None) == 139 * GIB
    assert 2 < growing.now < 3


def test_a_rank_on_a_gpu_leaves_word_for_its_next_process() -> None:
    descriptor = os.memfd_create("test")
    first, second = CacheMemory(descriptor), CacheMemory(descriptor)
    assert second.footprint() is None
    footprint = Footprint(device_bytes=125 * GIB, size=CacheSize(blocks=9000), block_bytes=1 << 20)
    first.leave_footprint(footprint)
    assert second.footprint() == footprint
    shape = CacheShape(layers=(PagedShape(kv_heads=1, head_dim=8, sharing=1),))
    assert second.held(shape, torch.float32) is None, "which is no cache"
    second.open(shape, torch.float32, CacheSize(blocks=2))
    assert first.footprint() is None


def test_a_rank_that_comes_back_offers_what_it_had() -> None:
    """A few megabytes that a driver keeps are no reason to lay out every rank's cache anew; gigabytes are."""
    before = Footprint(device_bytes=120 * GIB, size=CacheSize(blocks=9000), block_bytes=1 << 20)
    assert needed_bytes(before, 140 * GIB, sharers=1) == 134 * GIB
    assert needed_bytes(before, 140 * GIB, sharers=2) == 120 * GIB, "the others have taken their part of the rest"
    assert needed_bytes(None, 140 * GIB, sharers=1) is None
    assert blocks_as_before(8950, 1 << 20, before, 140 * GIB) == 9000
    assert blocks_as_before(9100, 1 << 20, before, 140 * GIB) == 9100
    assert blocks_as_before(5000, 1 << 20, before, 140 * GIB) == 5000
    assert blocks_as_before(8950, 1 << 21, before, 140 * GIB) == 8950, "it was another model"
    assert blocks_as_before(8950, 1 << 20, None, 140 * GIB) == 8950


def test_a_cache_on_a_device_is_renewed_in_place() -> None:
    """Of a device without memory: what counts is which tensor it is."""
    meta = Placement(device=torch.device("meta"), dtype=torch.bfloat16, activation=torch.bfloat16)
    cache = KVCache(CacheShape(layers=(PagedShape(kv_heads=1, head_dim=8, sharing=1),) * 2), CacheSize(blocks=4), meta)
    before, layers = cache.name, list(cache.layers)
    cache.renew()
    assert cache.name != before
    assert all(one is other for one, other in zip(cache.layers, layers, strict=True))
