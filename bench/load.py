"""Loading a Qwen3-0.6B shape in bfloat16, the first of two ranks, from the page cache, beside a plain read.

The plain read is the best that a program can do which wants these bytes in memory: as many threads as the loader's
read as many bytes as the rank's slices have, in large calls, into memory of their own. (Most of its time goes to
getting the memory's pages from the kernel; what the calls alone take stands beside it.) Every case takes turns with it,
and the medians are reported:

- into memory: the loader alone, every weight as it is in the checkpoint, as on a GPU's host or where nothing is packed;
- converted: the same in float16;
- weight cache: the rank's slices into a new file on tmpfs, with their checksums;
- whole: all of it as `lockstep serve` does it on a CPU, the weight cache first and then the matrices packed from it;
- again: what a process in its place does, from the weight cache.

The bytes read are the kernel's own count (`rchar` of /proc/self/io); the peak is the most that was resident (`VmHWM`)
of a process that loads once, less that of one that has imported the same and loaded nothing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch
from bench.ranks import RANKS, Child, config, model_directory
from bench.report import Row, report

from lockstep_runtime.host import shm_files
from lockstep_runtime.host.process_init import PARENT_VARIABLE
from lockstep_runtime.layers.placement import choose_placement, place
from lockstep_runtime.models.registry import build_model
from lockstep_runtime.sources.model_folder import read_config
from lockstep_runtime.weights.cache import Identity
from lockstep_runtime.weights.load import fill_cache, load_weights
from lockstep_runtime.weights.parallel_map import threads
from lockstep_runtime.weights.sharding import RankInfo
from lockstep_runtime.weights.weight import StoredTable, Weight
from lockstep_runtime.worker.memory import give_back_freed_memory
from lockstep_runtime.worker.model_runner import ModelRunner

CHUNK: Final = 4 * 1024 * 1024  # of the plain read; the fastest of 256 KiB to 16 MiB
PEER: Final = "plain read"
CASE: Final = f"rank 0 of {RANKS}"
Timed = Callable[[], object]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=9)
    rounds = arguments.parse_args().rounds
    model = model_directory()
    nothing, loaded = measured(load_nothing, model), measured(load_once, model)
    weights = loaded["weights"]
    times = measured(load_in_turns, model, rounds)
    rates = {name: weights / seconds / 1e9 for name, seconds in times.items()}
    rows = [
        Row(case=CASE, metric="read", value=loaded["read"], unit="B", peer="slices", peer_value=weights),
        Row(
            case=CASE, metric="peak memory", value=loaded["peak"] - nothing["peak"], unit="B",
            peer="slices", peer_value=weights,
        ),
        *(
            Row(case=CASE, metric=f"load, {name}", value=rates[name], unit="GB/s", peer=PEER, peer_value=rates[PEER])
            for name in ("into memory", "converted", "weight cache", "whole", "again")
        ),
        Row(case=CASE, metric="plain read into one buffer", value=rates["calls"], unit="GB/s"),
        Row(case=CASE, metric="load, whole", value=times["whole"], unit="s"),
    ]  # fmt: skip
    report("load", rows)


def measured(job: Any, *arguments: Any) -> dict[str, float]:
    """The job's result, from a fresh process."""
    with closing(Child(job, *arguments)) as child:
        result: dict[str, float] = child.receive()
        return result


def load_nothing(pipe: Connection, model: Path) -> None:
    ModelRunner(config(model), 0)
    torch.ones(64, 64) @ torch.ones(64, 64)  # the libraries' own buffers
    pipe.send({"peak": peak_memory()})


def load_once(pipe: Connection, model: Path) -> None:
    """By the loader alone, packed: the weight cache would count as resident once more, and so would the steps by which
    a rank finds out what room they need."""
    ModelRunner(config(model), 0)  # as many threads as a rank has
    give_back_freed_memory()
    placement = choose_placement(torch.device("cpu"), torch.bfloat16)
    weights = list(build_model(read_config(model), RankInfo(0, RANKS), placement).weights())
    before = bytes_read()
    with torch.inference_mode():
        loaded = load_weights(model, weights, lambda done, total: None)
    pipe.send({"weights": loaded.weight_bytes, "read": bytes_read() - before, "peak": peak_memory()})


def load_in_turns(pipe: Connection, model: Path, rounds: int) -> None:
    """Median seconds of each case."""
    give_back_freed_memory()
    with TemporaryDirectory(dir=shm_files.SHARED_MEMORY) as folder, torch.inference_mode():
        os.environ |= {shm_files.FOLDER_VARIABLE: folder, PARENT_VARIABLE: str(os.getpid())}
        cases = timed_cases(model, Path(folder))
        times: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(rounds + 1):
            for name, case in cases.items():
                started = time.perf_counter()
                kept = case()
                times[name].append(time.perf_counter() - started)
                del kept
    pipe.send({name: statistics.median(seconds[1:]) for name, seconds in times.items()})  # the first warms up


def timed_cases(model: Path, folder: Path) -> dict[str, Timed]:
    cached = shm_files.cache_file(os.environ, 0)
    size = sum(stored_bytes(one) for one in rank_weights(model, torch.bfloat16))

    def whole() -> object:
        (cached or folder).unlink(missing_ok=True)
        return load_through_cache(model)

    return {
        PEER: lambda: plain_read(model / "model.safetensors", size, torch.empty(size, dtype=torch.uint8)),
        "calls": lambda: plain_read(
            model / "model.safetensors", size, torch.empty(CHUNK * threads(), dtype=torch.uint8)
        ),
        "into memory": lambda: load_plainly(model, torch.bfloat16),
        "converted": lambda: load_plainly(model, torch.float16),
        "weight cache": lambda: fill(model, folder / "cache"),
        "whole": whole,
        "again": lambda: load_through_cache(model),
    }


def plain_read(file: Path, size: int, memory: torch.Tensor) -> torch.Tensor:
    """Read so many bytes, by as many threads as the loader has; the memory is used again where it is smaller."""
    descriptor, raw = os.open(file, os.O_RDONLY), memory.numpy().data
    room = len(raw)

    def read(start: int) -> None:
        at = start % room
        os.preadv(descriptor, [raw[at : at + min(CHUNK, size - start)]], start)

    with ThreadPoolExecutor(threads()) as pool:
        list(pool.map(read, range(0, size, CHUNK)))
    os.close(descriptor)
    return memory


def load_plainly(model: Path, dtype: torch.dtype) -> list[Weight | StoredTable]:
    weights = rank_weights(model, dtype)
    load_weights(model, weights, lambda done, total: None)
    return weights


def fill(model: Path, path: Path) -> None:
    path.unlink(missing_ok=True)
    identity = Identity(model="bench", revision=None, dtype="auto", size=RANKS, rank=0)
    fill_cache(path, identity, {}, model, rank_weights(model, torch.bfloat16), lambda done, total: None, 0)
    path.unlink()


def load_through_cache(model: Path) -> ModelRunner:
    runner = ModelRunner(config(model), 0)
    runner.load(lambda done, total: None)
    return runner


def rank_weights(model: Path, dtype: torch.dtype) -> list[Weight | StoredTable]:
    placement = place(torch.device("cpu"), dtype, None)
    return list(build_model(read_config(model), RankInfo(0, RANKS), placement).weights())


def stored_bytes(weight: Weight | StoredTable) -> int:
    return sum(one.numel for one in weight.slices) * torch.bfloat16.itemsize


def bytes_read() -> int:
    return _field(Path("/proc/self/io"), "rchar:")


def peak_memory() -> int:
    return _field(Path("/proc/self/status"), "VmHWM:") * 1024


def _field(file: Path, name: str) -> int:
    return next(int(line.split()[1]) for line in file.read_text().splitlines() if line.startswith(name))


if __name__ == "__main__":
    main()
