"""The vocabulary split over ranks: each holds a range of rows, of the embedding and of the output head."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from lockstep_runtime.distributed.communicator import Communicator
from lockstep_runtime.layers.collective_name import collective_name
from lockstep_runtime.layers.matrix import PlainMatrix, matrix
from lockstep_runtime.layers.placement import Placement
from lockstep_runtime.layers.weight import PlainWeight
from lockstep_runtime.weights.sharding import RankInfo, padded_vocabulary, vocabulary_slice
from lockstep_runtime.weights.weight import StoredTable, Weight


class VocabularyEmbedding:
    """Looks up the rows it holds, gives zeros for the others, and sums over ranks."""

    def __init__(
        self, tensor: str, size: int, hidden: int, shard: RankInfo, placement: Placement, *, stored: bool = False
    ) -> None:
        """`stored`: leave the table in the checkpoint's file."""
        tensor_slice = vocabulary_slice(tensor, size, hidden, shard=shard)
        self.table = (
            StoredTable(tensor_slice)
            if stored
            else PlainWeight(tensor_slice, placement=placement, dtype=placement.dtype)
        )
        self._first, self._rows, self._activation = tensor_slice.start, tensor_slice.rows, placement.activation
        self._hidden, self._alone = hidden, shard.size == 1
        self._place = collective_name(tensor_slice.tensor)

    def weights(self) -> list[Weight | StoredTable]:
        return [self.table]

    def __call__(self, tokens: Tensor, group: Communicator) -> Tensor:
        """tokens: [n] -> [n, hidden]."""
        if self._alone:
            return self.table.lookup(tokens).to(self._activation)
        return group.all_reduce(self._mine(tokens - self._first), self._place)

    def _mine(self, local: Tensor) -> Tensor:
        """Of shapes that depend on no value, so that nobody waits for the device."""
        if not self._rows:  # a rank beyond the vocabulary's end
            return torch.zeros(local.shape[0], self._hidden, dtype=self._activation, device=local.device)
        rows = self.table.lookup(local.clamp(0, self._rows - 1)).to(self._activation)
        return torch.where(((local >= 0) & (local < self._rows))[:, None], rows, 0.0)


class VocabularyHead:
    """Scores of the whole vocabulary, on rank 0."""

    def __init__(self, tensor: str, size: int, hidden: int, shard: RankInfo, placement: Placement) -> None:
        tensor_slice = vocabulary_slice(tensor, size, hidden, shard=shard)
        self._size, self._first, self._held = size, tensor_slice.start, tensor_slice.rows
        self._matrix = matrix(tensor_slice, placement=placement)
        self._place = "lm_head" if "embed" in tensor else collective_name(tensor_slice.tensor)
        self._padding = padded_vocabulary(size, shard) // shard.size - tensor_slice.rows

    def weights(self) -> list[Weight]:
        return [self._matrix]

    def tie(self, embedding: VocabularyEmbedding) -> None:
        """Use the embedding's own tensor; of a matrix that is not packed."""
        if isinstance(self._matrix, PlainMatrix) and isinstance(embedding.table, PlainWeight):
            self._matrix.data = embedding.table.data

    def __call__(self, hidden: Tensor, group: Communicator) -> Tensor | None:
        """hidden: [n, hidden] -> logits [n, vocabulary] in float32 on rank 0, None elsewhere."""
        parts = group.gather(F.pad(self._matrix(hidden).float(), (0, self._padding)), self._place)
        return None if parts is None else torch.cat(parts, dim=1)[:, : self._size]

    def best(self, hidden: Tensor, group: Communicator) -> tuple[Tensor, Tensor] | None:
        """hidden: [n, hidden] -> the likeliest token and its logit, [n] each, on rank 0; None elsewhere.

        The first of equals, as argmax over the whole vocabulary gives; NaN when any logit of the row is NaN.
        """
        logits = self._matrix(hidden).float()
        if self._held:
            values, tokens = logits.max(dim=1)
        else:  # a rank beyond the vocabulary's end
            values = logits.new_full((hidden.shape[0],), float("-inf"))
            tokens = torch.zeros_like(values, dtype=torch.int64)
        # float64 carries both: token ids are far below 2^53
        parts = group.gather(torch.stack((values.double(), (tokens + self._first).double()), dim=1), self._place)
        if parts is None:
            return None
        values, tokens = torch.stack(parts).unbind(2)
        best, rank = values.max(dim=0)
        return tokens.gather(0, rank[None])[0].long(), best
