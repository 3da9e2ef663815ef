"""Qwen3, dense (https://arxiv.org/abs/2505.09388); the oracle is transformers' `Qwen3ForCausalLM`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from lockstep_runtime.layers.placement import Placement
from lockstep_runtime.models.decoder import Decoder, DecoderLayer, Parts
from lockstep_runtime.models.settings import Count, DecoderSettings, check, check_layer_types, read_settings
from lockstep_runtime.weights.sharding import RankInfo


class Qwen3Settings(DecoderSettings, frozen=True, kw_only=True):
    positions: ClassVar[int] = 32768

    num_key_value_heads: Count | None = 32
    head_dim: Count = 128
    attention_bias: bool = False


def build_qwen3(raw: Mapping[str, Any], shard: RankInfo, placement: Placement) -> Decoder:
    """Every head of q and k is normed."""
    settings = read_settings(raw, Qwen3Settings)
    check_layer_types(settings)
    check(settings, shard, settings.intermediate_size)
    parts, bias = Parts(settings, shard, placement), settings.attention_bias

    def layer(number: int, prefix: str) -> DecoderLayer:
        attention = parts.attention(prefix, bias=bias, out_bias=bias, head_norms=True)
        return parts.layer(prefix, attention, parts.mlp(prefix))

    return Decoder(parts, layer)
