"""Qwen3-Next (https://qwenlm.github.io/blog/qwen3_next/); the oracle is transformers' `Qwen3NextForCausalLM`.

Its delta nets' inputs are interleaved by key head: of each the queries, keys, values and output gates in one tensor,
beta and decay in another. Read head by head, they come to lie as `DeltaNet` wants them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import msgspec

from lockstep_runtime.layers.delta_net import DeltaNetShape
from lockstep_runtime.layers.placement import Placement
from lockstep_runtime.models.decoder import Decoder
from lockstep_runtime.models.hybrid import SparseSettings, build_hybrid
from lockstep_runtime.models.settings import Count
from lockstep_runtime.weights.sharding import RankInfo, TensorSlice, head_range


class Qwen3NextSettings(SparseSettings, frozen=True, kw_only=True):
    intermediate_size: Annotated[int, msgspec.Meta(ge=0)] = 5632
    num_experts: Annotated[int, msgspec.Meta(ge=0)] = 512
    num_experts_per_tok: Count = 10
    norm_topk_prob: bool = True
    decoder_sparse_step: Count = 1
    mlp_only_layers: tuple[int, ...] = ()

    @property
    def normalized(self) -> bool:
        return self.norm_topk_prob

    def is_sparse(self, layer: int) -> bool:
        return (layer + 1) % self.decoder_sparse_step == 0 and layer not in self.mlp_only_layers


def build_qwen3_next(raw: Mapping[str, Any], shard: RankInfo, placement: Placement) -> Decoder:
    return build_hybrid(raw, Qwen3NextSettings, shard, placement, inputs=input_slices)


def input_slices(prefix: str, hidden: int, shape: DeltaNetShape, shard: RankInfo) -> tuple[TensorSlice, ...]:
    """Of a rank's key heads all queries, then all keys, and so on."""
    shared = shape.value_heads // shape.key_heads
    wide = (shape.key_dim, shape.key_dim, shared * shape.value_dim, shared * shape.value_dim)
    return (
        *_by_head(f"{prefix}.in_proj_qkvz.weight", wide, hidden, shape.key_heads, shard),
        *_by_head(f"{prefix}.in_proj_ba.weight", (shared, shared), hidden, shape.key_heads, shard),
    )


def _by_head(tensor: str, parts: tuple[int, ...], hidden: int, heads: int, shard: RankInfo) -> Iterator[TensorSlice]:
    """`parts`: how many rows of each a head has."""
    width = sum(parts)
    for part, rows in enumerate(parts):
        for head in range(*head_range(heads, shard)):
            start = head * width + sum(parts[:part])
            yield TensorSlice(tensor=tensor, shape=(heads * width, hidden), start=start, stop=start + rows)
