"""The loader: one loop over a model's weights, from the checkpoint or from the weight cache."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lockstep_runtime.weights.cache import CacheWriter, Identity, Wanted, WeightCache
from lockstep_runtime.weights.checkpoint import Checkpoint
from lockstep_runtime.weights.parallel_map import in_threads
from lockstep_runtime.weights.sharding import TensorSlice
from lockstep_runtime.weights.weight import StoredTable, Weight

Progress = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(frozen=True, slots=True)
class LoadResult:
    weight_bytes: int  # what this rank's slices take in the checkpoint
    read_bytes: int


def load_weights(directory: Path, weights: Iterable[Weight | StoredTable], progress: Progress) -> LoadResult:
    """Fill every weight. `progress(done, total)` is called often, in bytes of the checkpoint.

    All tensors are looked up before the first is read, so that a missing one is reported at once.

    Raises:
        ModelError: a tensor or a file is missing, malformed, or of another shape than expected.
    """
    total = 0
    checkpoint = Checkpoint(directory, lambda done: progress(done, total))
    try:
        wanted: list[Weight] = []
        for weight in weights:
            if isinstance(weight, StoredTable):
                weight.rows = checkpoint.rows(weight.tensor_slice)
            else:
                wanted.append(weight)
        total = sum(checkpoint.nbytes(tensor_slice) for weight in wanted for tensor_slice in weight.slices)
        for _ in in_threads(functools.partial(_fill, checkpoint), wanted):
            pass
        return LoadResult(weight_bytes=total, read_bytes=checkpoint.bytes_read)
    finally:
        checkpoint.close()


def _fill(checkpoint: Checkpoint, weight: Weight) -> None:
    for start, stop, buffer in weight.load():
        checkpoint.read(weight.slices, start, stop, buffer)


def fill_cache(
    path: Path,
    identity: Identity,
    settings: Mapping[str, Any],
    directory: Path,
    weights: Iterable[Weight | StoredTable],
    progress: Progress,
    reserve: int,
) -> tuple[WeightCache, LoadResult]:
    """Read what the weights are made of into a new cache file, beside which `reserve` bytes are left; the weights are
    not filled yet.

    Raises:
        ModelError: as `load_weights`.
        OSError: there is no room for the file.
    """
    total = 0
    checkpoint = Checkpoint(directory, lambda done: progress(done, total))
    try:
        wanted = {weight.slices: _wanted(checkpoint, weight) for weight in weights}
        total = sum(checkpoint.nbytes(tensor_slice) for slices in wanted for tensor_slice in slices)
        writer = CacheWriter(path, identity, settings, total, wanted.values(), reserve)
        try:
            for _ in in_threads(lambda one: checkpoint.copy(one[0].slices, one[1]), writer.targets()):
                pass
            cache = writer.publish()
        except BaseException:
            writer.discard()
            raise
        return cache, LoadResult(weight_bytes=total, read_bytes=checkpoint.bytes_read)
    finally:
        checkpoint.close()


def attach_weights(cache: WeightCache, weights: Sequence[Weight | StoredTable], progress: Progress) -> LoadResult:
    """Fill every weight from the cache.

    Raises:
        CacheError: it does not hold what the weights are made of.
    """
    stored = [cache.tensor(weight.slices, weight.cached_dtype) for weight in weights]
    done, total = 0, sum(one.nbytes for one in stored)

    def attach(index: int) -> int:
        weights[index].attach(stored[index])
        return stored[index].nbytes

    for nbytes in in_threads(attach, range(len(weights))):
        done += nbytes
        progress(done, total)
    return LoadResult(weight_bytes=cache.contents.weight_bytes, read_bytes=0)


def _wanted(checkpoint: Checkpoint, weight: Weight | StoredTable) -> Wanted:
    dtype = weight.cached_dtype or _common_dtype(checkpoint, weight.slices)
    return Wanted(slices=weight.slices, dtype=str(dtype).removeprefix("torch."))


def _common_dtype(checkpoint: Checkpoint, slices: tuple[TensorSlice, ...]) -> torch.dtype:
    """The tensors' own; of several the widest, in which each is exact."""
    dtypes = {checkpoint.find(tensor_slice).dtype for tensor_slice in slices}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32
