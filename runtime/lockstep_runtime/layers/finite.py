"""Whether what the layers remember of some sequences is numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lockstep_runtime.layers.attention import context_of
from lockstep_runtime.layers.cache import KVCache, LayerCache
from lockstep_runtime.protocol.step import SequenceSlice


def is_finite(cache: KVCache, sequences: Sequence[SequenceSlice], device: torch.device) -> bool:
    """Whether the contexts that these attend to, and the states that they begin with, hold neither NaN nor infinity."""
    return all(bool(torch.isfinite(held.sum(dtype=torch.float32))) for held in _held(cache, sequences, device))


def _held(cache: KVCache, sequences: Sequence[SequenceSlice], device: torch.device) -> Iterator[Tensor]:
    for sequence in sequences:
        context = context_of(sequence, device)
        for layer in cache.layers:
            if isinstance(layer, LayerCache):
                yield context.of(layer.keys)
                yield context.of(layer.values)
            else:
                yield from (part[sequence.state.read] for part in layer.parts.values())
