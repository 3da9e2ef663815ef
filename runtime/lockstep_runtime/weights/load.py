"""The loader: one loop over a model's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from lockstep_runtime.layers.weight import StoredTable, Weight
from lockstep_runtime.weights.read import Checkpoint


@dataclass(frozen=True, slots=True)
class Loaded:
    weight_bytes: int  # what this rank's slices take in the checkpoint
    read_bytes: int


def load_weights(
    directory: Path, weights: Iterable[Weight | StoredTable], progress: Callable[[int, int], None]
) -> Loaded:
    """Fill every weight. `progress(done, total)` is called often, in bytes of the checkpoint.

    All tensors are looked up before the first is read, so that what is missing is told at once.

    Raises:
        ModelError: a tensor or a file is missing, malformed, or of another shape than expected.
    """
    total = 0
    checkpoint = Checkpoint(directory, lambda _: progress(checkpoint.bytes_read, total))
    try:
        wanted: list[Weight] = []
        for weight in weights:
            if isinstance(weight, StoredTable):
                weight.rows = checkpoint.rows(weight.cut)
            else:
                wanted.append(weight)
        total = sum(checkpoint.nbytes(cut) for weight in wanted for cut in weight.cuts)
        for weight in wanted:
            for start, stop, buffer in weight.receive():
                checkpoint.read(weight.cuts, start, stop, buffer)
        return Loaded(weight_bytes=total, read_bytes=checkpoint.bytes_read)
    finally:
        checkpoint.close()
