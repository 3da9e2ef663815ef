"""From the weight cache to the GPU: right to the last bit, and at the bus's speed."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
import torch
from tests.support.models import QWEN3_0_6B, write_model

from lockstep_runtime.config import EngineLimits, ServeConfig
from lockstep_runtime.host.process_init import PARENT_VARIABLE
from lockstep_runtime.host.shm_files import FOLDER_VARIABLE, SHARED_MEMORY, cache_file
from lockstep_runtime.layers.placement import choose_placement
from lockstep_runtime.models.registry import build_model
from lockstep_runtime.weights.cache import Identity, WeightCache, open_cache
from lockstep_runtime.weights.checksum import checksum
from lockstep_runtime.weights.load import attach_weights
from lockstep_runtime.weights.sharding import RankInfo
from lockstep_runtime.worker.model_runner import ModelRunner

DEVICE = torch.device("cuda", 0)
TRIES = 3


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WeightCache:
    """As a rank's first process leaves it, in shared memory where there is room for its 1.2 GB."""
    room = shutil.disk_usage(SHARED_MEMORY).free > 2 * 10**9
    monkeypatch.setenv(PARENT_VARIABLE, str(os.getpid()))
    monkeypatch.setenv(FOLDER_VARIABLE, str(SHARED_MEMORY if room else tmp_path))
    model = write_model(tmp_path / "model", QWEN3_0_6B)
    config = ServeConfig(
        model=str(model), served_name="m", device="cuda", backend="cpu", limits=EngineLimits(kv_cache_bytes=1 << 28)
    )
    report = ModelRunner(config, 0).load(lambda done, total: None)
    assert report.read_bytes > 0
    path = cache_file(os.environ, 0)
    assert path is not None
    found = open_cache(path, Identity(model=str(model), revision=None, dtype="auto", size=1, rank=0))
    path.unlink()  # the mapping keeps it
    assert found is not None
    return found


def test_a_respawned_rank_gets_its_weights_at_the_buss_speed(cache: WeightCache) -> None:
    model = build_model(cache.contents.settings, RankInfo(0, 1), choose_placement(DEVICE, torch.bfloat16))
    weights = list(model.weights())
    stored = [cache.tensor(weight.slices, weight.cached_dtype) for weight in weights]
    total = sum(one.nbytes for one in stored)
    pinned = torch.empty(total, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(total, dtype=torch.uint8, device=DEVICE)
    seconds = {
        "weight cache to device": best(lambda: attach_weights(cache, weights, lambda done, all_of_it: None)),
        "the same bytes, one pageable copy each": best(lambda: [one.to(DEVICE) for one in stored]),
        "as many bytes, one pinned copy": best(lambda: there.copy_(pinned)),
    }
    for what, each in seconds.items():
        print(f"{what}: {total / each / 1e9:.1f} GB/s ({total / 1e9:.2f} GB in {each:.3f} s)")
    for weight, one in zip(weights, stored, strict=True):
        weight.attach(one)
        assert last(weight.checksum_in_parts()) == checksum(one)
    first, second, _ = seconds.values()
    assert first < 1.25 * second, "windows of pinned memory are to be no slower than what they replace"


def best(work: Callable[[], object]) -> float:
    """Seconds of the quickest try."""
    found = []
    for _ in range(TRIES):
        torch.cuda.synchronize()
        begun = time.monotonic()
        work()
        torch.cuda.synchronize()
        found.append(time.monotonic() - begun)
    return min(found)


def last(parts: Generator[None, None, str]) -> str:
    """What it returns in the end."""
    while True:
        try:
            next(parts)
        except StopIteration as end:
            return str(end.value)
