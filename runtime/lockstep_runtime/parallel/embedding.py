"""The vocabulary split over ranks: each holds a range of rows, of the embedding and of the output head."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from lockstep_runtime.layers.matrix import matrix
from lockstep_runtime.layers.placement import Placement
from lockstep_runtime.layers.weight import PlainWeight, Weight
from lockstep_runtime.parallel.group import Group
from lockstep_runtime.weights.plan import Shard, padded_vocabulary, vocabulary


class VocabularyEmbedding:
    """Looks up the rows it holds, gives zeros for the others, and sums over ranks."""

    def __init__(self, tensor: str, size: int, hidden: int, shard: Shard, placement: Placement) -> None:
        cut = vocabulary(tensor, size, hidden, shard=shard)
        rows = padded_vocabulary(size, shard) // shard.size
        self.weight = PlainWeight(cut, placement=placement, rows=rows, dtype=placement.dtype)
        self._first, self._rows, self._activation = cut.start, rows, placement.activation
        self._alone = shard.size == 1

    def weights(self) -> list[Weight]:
        return [self.weight]

    def __call__(self, tokens: Tensor, group: Group) -> Tensor:
        """tokens: [n] -> [n, hidden]."""
        if self._alone:
            return F.embedding(tokens, self.weight.data).to(self._activation)
        local = tokens - self._first
        absent = (local < 0) | (local >= self._rows)
        rows = F.embedding(local.masked_fill_(absent, 0), self.weight.data).to(self._activation)
        return group.all_reduce(rows.masked_fill_(absent[:, None], 0))


class VocabularyHead:
    """Scores of the whole vocabulary, on rank 0."""

    def __init__(self, tensor: str, size: int, hidden: int, shard: Shard, placement: Placement) -> None:
        cut = vocabulary(tensor, size, hidden, shard=shard)
        self._size = size
        self._matrix = matrix(cut, placement=placement, rows=padded_vocabulary(size, shard) // shard.size)

    def weights(self) -> list[Weight]:
        return [self._matrix]

    def tie(self, embedding: VocabularyEmbedding) -> None:
        """Use the embedding's own tensor instead of reading it again."""
        self._matrix.take(embedding.weight.data)

    def __call__(self, hidden: Tensor, group: Group) -> Tensor | None:
        """hidden: [n, hidden] -> logits [n, vocabulary] in float32 on rank 0, None elsewhere."""
        parts = group.gather(self._matrix(hidden).float())
        return None if parts is None else torch.cat(parts, dim=1)[:, : self._size]
