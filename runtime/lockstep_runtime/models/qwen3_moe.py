"""Qwen3 with experts (https://arxiv.org/abs/2505.09388); the oracle is transformers' `Qwen3MoeForCausalLM`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import msgspec

from lockstep_runtime.layers.moe import MoeShape, SparseMoe
from lockstep_runtime.layers.placement import Placement
from lockstep_runtime.models.decoder import Decoder, DecoderLayer, Parts
from lockstep_runtime.models.settings import Count, DecoderSettings, check, read_settings
from lockstep_runtime.sources.errors import ModelError
from lockstep_runtime.weights.sharding import RankInfo


class Qwen3MoeSettings(DecoderSettings, frozen=True, kw_only=True):
    positions: ClassVar[int] = 32768

    intermediate_size: Count = 6144  # of the layers that have one MLP
    num_key_value_heads: Count | None = 4
    attention_bias: bool = False
    moe_intermediate_size: Count = 768
    num_experts: Annotated[int, msgspec.Meta(ge=0)] = 128
    num_experts_per_tok: Count = 8
    norm_topk_prob: bool = False
    decoder_sparse_step: Count = 1
    mlp_only_layers: tuple[int, ...] = ()

    def is_sparse(self, layer: int) -> bool:
        chosen = (layer + 1) % self.decoder_sparse_step == 0
        return self.num_experts > 0 and chosen and layer not in self.mlp_only_layers

    @property
    def moe(self) -> MoeShape:
        return MoeShape(
            hidden=self.hidden_size,
            inner=self.moe_intermediate_size,
            experts=self.num_experts,
            chosen=self.num_experts_per_tok,
            normalized=self.norm_topk_prob,
        )


def build_qwen3_moe(raw: Mapping[str, Any], shard: RankInfo, placement: Placement) -> Decoder:
    """As Qwen3, with experts in some layers' MLP's place."""
    # its number of experts has two names in transformers
    settings = read_settings({"num_experts": raw.get("num_local_experts"), **raw}, Qwen3MoeSettings)
    _check(settings, shard)
    parts, bias = Parts(settings, shard, placement), settings.attention_bias

    def layer(number: int, prefix: str) -> DecoderLayer:
        attention = parts.attention(prefix, bias=bias, out_bias=bias, head_norms=True)
        sparse = settings.is_sparse(number)
        mlp = SparseMoe(f"{prefix}.mlp", settings.moe, shard, placement) if sparse else parts.mlp(prefix)
        return parts.layer(prefix, attention, mlp)

    return Decoder(parts, layer)


def _check(settings: Qwen3MoeSettings, shard: RankInfo) -> None:
    kinds = {settings.is_sparse(layer) for layer in range(settings.num_hidden_layers)}
    inner = min(settings.moe_intermediate_size if sparse else settings.intermediate_size for sparse in kinds)
    check(settings, shard, inner)
    if True in kinds and settings.num_experts_per_tok > settings.num_experts:
        raise ModelError(
            f"config.json: {settings.num_experts_per_tok} experts a token can't be chosen of {settings.num_experts}"
        )
