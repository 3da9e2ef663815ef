"""Whether a decode step can be captured in a CUDA graph, replays to the same bits, and what it saves."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tests.gpu.checks.steps import GREEDY, loaded, step
from tests.gpu.findings import Row, answer
from tests.support.models import QWEN3_0_6B
from torch import Tensor

from lockstep_runtime.distributed.join import SingleCommunicator
from lockstep_runtime.layers.batch import build_batch
from lockstep_runtime.worker.model_runner import ModelRunner

BATCHES = (1, 8)
TRIES = 20


def milliseconds(work: Callable[[], object]) -> float:
    found = []
    for _ in range(TRIES):
        torch.cuda.synchronize()
        begun = time.monotonic()
        work()
        torch.cuda.synchronize()
        found.append((time.monotonic() - begun) * 1e3)
    return statistics.median(found)


def captured(runner: ModelRunner, batch: int) -> tuple[bool, float, float, float]:
    """Whether it gives the same, and the milliseconds of: eager, replayed, capturing."""
    cache, group = runner.cache, SingleCommunicator()
    assert cache is not None
    given = build_batch(step(0, batch, GREEDY).sequences, torch.device("cuda", 0))

    def forward() -> Tensor:
        return runner.model.forward(given, cache, group)

    eager = forward().clone()
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            forward()
    torch.cuda.current_stream().wait_stream(side)
    begun = time.monotonic()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = forward()
    capturing = (time.monotonic() - begun) * 1e3
    graph.replay()
    torch.cuda.synchronize()
    same = torch.equal(out, eager)
    return same, milliseconds(forward), milliseconds(graph.replay), capturing


def rows() -> list[Row]:
    found = []
    with tempfile.TemporaryDirectory() as directory, torch.inference_mode():
        runner = loaded(Path(directory), "cuda", QWEN3_0_6B, max(BATCHES))
        for batch in BATCHES:
            same, eager, replayed, capturing = captured(runner, batch)
            found.append(
                Row("graphs", f"decode at batch {batch} can be captured, and is the same", "holds" if same else "fails",
                    f"eager {eager:.2f} ms, replayed {replayed:.2f}, captured in {capturing:.0f}")
            )  # fmt: skip
    return found


if __name__ == "__main__":
    answer(rows())
