"""Claim: between CPU ranks of several pods an all-reduce of a decode step takes a fraction of gloo's time.

Every rank is a process of one thread that holds three communicators: Lockstep's over TCP, as between pods, and over
shared memory, as within one, and gloo's. Each kind gets its turn in every round, so all meet the same noise. Medians
of rounds; the network is the loopback device.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from typing import Final

import torch
import torch.distributed as dist
from bench.report import Row, report

from lockstep_runtime.config import TOKEN_VARIABLE, ServeConfig
from lockstep_runtime.distributed.communicator import Communicator
from lockstep_runtime.distributed.join import join, open_rendezvous

# Bytes of one tensor: a decode step's, a small prefill's and a long one's; and how many of them a round takes.
SIZES: Final = ((4 * 1024, 200), (256 * 1024, 50), (8 * 1024 * 1024, 3))
KINDS: Final = ("TCP", "shared memory", "gloo")
JOIN_SECONDS: Final = 60.0


class Gloo:
    """torch's, behind the same method."""

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(tensor)
        return tensor


def config(kind: str, ranks: int) -> ServeConfig:
    return ServeConfig(
        model="none", served_name="none", tensor_parallel_size=ranks, backend="cpu",
        ranks_per_pod=ranks if kind == "shared memory" else 1,
    )  # fmt: skip


def serve_rank(pipe: Connection, rank: int, ranks: int, addresses: dict[str, str], rounds: int) -> None:
    """Rank 0 sends, for each size, each kind's seconds per all-reduce in every round."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=addresses["gloo"], rank=rank, world_size=ranks)
    groups: dict[str, Communicator | Gloo] = {
        kind: join(config(kind, ranks), rank, 1, addresses[kind], JOIN_SECONDS) for kind in KINDS if kind != "gloo"
    }
    groups["gloo"] = Gloo()
    for size, count in SIZES:
        tensor, found = torch.ones(size // 4), {kind: list[float]() for kind in KINDS}
        for _ in range(rounds):
            for kind in KINDS:
                dist.barrier()
                began = time.perf_counter()
                for _ in range(count):
                    groups[kind].all_reduce(tensor)
                found[kind].append((time.perf_counter() - began) / count)
                tensor.fill_(1.0)
        if rank == 0:
            pipe.send(found)


def measure(ranks: int, rounds: int, folder: str) -> list[Row]:
    context = multiprocessing.get_context("spawn")
    places = {kind: open_rendezvous(config(kind, ranks), 1) for kind in KINDS if kind != "gloo"}
    addresses = {kind: place.address for kind, place in places.items()} | {"gloo": f"file://{folder}/{ranks}"}
    mine, theirs = context.Pipe()
    processes = [
        context.Process(target=serve_rank, args=(theirs, rank, ranks, addresses, rounds), daemon=True)
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    rows = []
    for size, _ in SIZES:
        found = mine.recv()
        micros = {kind: statistics.median(found[kind]) * 1e6 for kind in KINDS}
        rows += [
            Row(
                case=f"{ranks} ranks, {size // 1024} KiB", metric=f"all-reduce, {kind}", value=micros[kind], unit="us",
                peer="gloo", peer_value=micros["gloo"],
            )
            for kind in KINDS if kind != "gloo"
        ]  # fmt: skip
    for process in processes:
        process.join()
    return rows


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=15)
    options = arguments.parse_args()
    os.environ.setdefault(TOKEN_VARIABLE, "of the bench")
    with tempfile.TemporaryDirectory() as folder:
        report("all-reduce", measure(2, options.rounds, folder) + measure(4, options.rounds, folder))


if __name__ == "__main__":
    main()
