"""D2, D12: what a step costs, by batch: wall, the device's own time, and kernels; greedy and with top-p."""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tests.gpu.findings import Row, answer
from tests.support.models import QWEN3_0_6B, ModelShape, write_model
from tests.support.ranks import piece
from torch.profiler import ProfilerActivity, profile

from lockstep_runtime.config import Device, EngineLimits, ServeConfig
from lockstep_runtime.distributed.join import SingleCommunicator
from lockstep_runtime.layers.cache import BLOCK_SIZE, CacheSize
from lockstep_runtime.protocol import bus
from lockstep_runtime.protocol.step import SamplingParams
from lockstep_runtime.worker.model_runner import ModelRunner

BATCHES = (1, 8, 64)
CONTEXT, STEPS, WARM = 1000, 12, 4
BLOCKS = -(-(CONTEXT + STEPS + WARM + 2) // BLOCK_SIZE)  # of a sequence
GREEDY, TOP_P = SamplingParams(temperature=0), SamplingParams(temperature=0.6, top_p=0.95, top_k=20, seed=1)


@dataclass(frozen=True, slots=True)
class Cost:
    wall_ms: float
    device_ms: float
    kernels: int

    def __str__(self) -> str:
        return f"{self.wall_ms:.1f} ms, the device {self.device_ms:.1f}, {self.kernels} kernels"


def loaded(directory: Path, device: Device, shape: ModelShape, batch: int) -> ModelRunner:
    config = ServeConfig(
        model=str(write_model(directory / "model", shape)), served_name="m", device=device, weight_cache="Off",
        backend="cpu", limits=EngineLimits(kv_cache_bytes=1 << 30),
    )  # fmt: skip
    runner = ModelRunner(config, 0)
    runner.load(lambda done, total: None)
    runner.allocate(CacheSize(blocks=batch * BLOCKS + 1))
    return runner


def step(number: int, batch: int, sample: SamplingParams) -> bus.Step:
    sequences = [
        piece(index + 1, CONTEXT + number, [5 + index], list(range(index * BLOCKS, (index + 1) * BLOCKS)), sample)
        for index in range(batch)
    ]
    return bus.Step(epoch=1, step=number, sequences=sequences)


def cost(runner: ModelRunner, batch: int, sample: SamplingParams) -> Cost:
    group, found = SingleCommunicator(), []
    for number in range(WARM + STEPS):
        begun = time.monotonic()
        runner.step(step(number, batch, sample), group)
        found.append((time.monotonic() - begun) * 1e3)
    activities = [ProfilerActivity.CPU] if runner.on_cpu else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities) as seen:
        runner.step(step(WARM + STEPS, batch, sample), group)
    device = [one for one in seen.events() or () if "CUDA" in str(one.device_type)]
    busy = sum(float(one.time_range.elapsed_us()) for one in device) / 1e3
    return Cost(statistics.median(found[WARM:]), busy, len(device))


def rows(device: Device, shape: ModelShape, batches: tuple[int, ...] = BATCHES) -> list[Row]:
    with tempfile.TemporaryDirectory() as directory:
        runner = loaded(Path(directory), device, shape, max(batches))
        greedy = {batch: cost(runner, batch, GREEDY) for batch in batches}
        drawn = {batch: cost(runner, batch, TOP_P) for batch in batches}
    first, last = batches[0], batches[-1]
    told = ["; ".join(f"b{batch}: {one}" for batch, one in costs.items()) for costs in (greedy, drawn)]
    grows = greedy[last].wall_ms / greedy[first].wall_ms
    draws = (drawn[last].wall_ms - greedy[last].wall_ms) / last
    return [
        Row("D2", "the host's loop over sequences rules a large batch", "confirmed" if grows > last / 8 else "refuted",
            told[0]),
        Row("D12", "a drawn row costs 0.1 to 0.4 ms more", "confirmed" if draws > 0.1 else "refuted",
            f"{told[1]}; {draws:.3f} ms a row"),
    ]  # fmt: skip


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    answer(rows("cuda", QWEN3_0_6B))
