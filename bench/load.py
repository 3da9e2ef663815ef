"""Loading a Qwen3-0.6B shape in bfloat16 with two ranks: bytes read, peak memory and rate, beside a plain read.

Each rank loads in a process of its own, one after the other, so that rates are not shared. The bytes read are the
kernel's own count (`rchar` of /proc/self/io); the peak is the most that was resident (`VmHWM`), less that of a
process which has imported the same and loaded nothing. The file is read whole once before, so that every read comes
from the page cache.
"""

from __future__ import annotations

import time
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from bench.ranks import RANKS, Child, config, model_directory
from bench.report import Row, report

from lockstep_runtime.worker.model_runner import ModelRunner

CHUNK = 8 * 1024 * 1024


def main() -> None:
    model = model_directory()
    file = model / "model.safetensors"
    plain_read(file)
    whole, seconds = file.stat().st_size, plain_read(file)
    plain = whole / seconds / 1e9
    baseline = measured(load_nothing, model, 0)
    rows = []
    for rank in range(RANKS):
        result = measured(load_rank, model, rank)
        weights, case = result["weights"], f"rank {rank} of {RANKS}"
        peak = result["peak"] - baseline["peak"]
        rate = result["read"] / result["seconds"] / 1e9
        rows += [
            Row(case=case, metric="read", value=result["read"], unit="B", peer="slice", peer_value=weights),
            Row(case=case, metric="peak memory", value=peak, unit="B", peer="slice", peer_value=weights),
            Row(case=case, metric="load", value=rate, unit="GB/s", peer="plain read", peer_value=plain),
            Row(case=case, metric="load", value=result["seconds"], unit="s"),
        ]
    report("load", rows)


def plain_read(file: Path) -> float:
    """Seconds to read all of it into one buffer."""
    buffer = bytearray(CHUNK)
    started = time.perf_counter()
    with file.open("rb", buffering=0) as stream:
        while stream.readinto(buffer):
            pass
    return time.perf_counter() - started


def measured(job: Any, model: Path, rank: int) -> dict[str, float]:
    """The job's result, from a fresh process."""
    with closing(Child(job, model, rank)) as child:
        result: dict[str, float] = child.receive()
        return result


def load_nothing(pipe: Connection, model: Path, rank: int) -> None:
    ModelRunner(config(model), rank)
    torch.ones(64, 64) @ torch.ones(64, 64)  # the libraries' own buffers
    pipe.send({"peak": peak_memory()})


def load_rank(pipe: Connection, model: Path, rank: int) -> None:
    runner = ModelRunner(config(model), rank)
    before, started = bytes_read(), time.perf_counter()
    loaded = runner.load(lambda done, total: None)
    seconds = time.perf_counter() - started
    read = bytes_read() - before
    pipe.send({"weights": loaded.weight_bytes, "read": read, "seconds": seconds, "peak": peak_memory()})


def bytes_read() -> int:
    return _field(Path("/proc/self/io"), "rchar:")


def peak_memory() -> int:
    return _field(Path("/proc/self/status"), "VmHWM:") * 1024


def _field(file: Path, name: str) -> int:
    return next(int(line.split()[1]) for line in file.read_text().splitlines() if line.startswith(name))


if __name__ == "__main__":
    main()
