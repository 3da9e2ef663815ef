"""Qwen2 and Qwen2.5, dense (https://arxiv.org/abs/2412.15115); the oracle is transformers' `Qwen2ForCausalLM`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from lockstep_runtime.layers.placement import Placement
from lockstep_runtime.models.decoder import Decoder, DecoderLayer, Parts
from lockstep_runtime.models.settings import Count, DecoderSettings, check, check_layer_types, read_settings
from lockstep_runtime.weights.sharding import RankInfo


class Qwen2Settings(DecoderSettings, frozen=True, kw_only=True):
    positions: ClassVar[int] = 32768

    num_key_value_heads: Count | None = 32


def build_qwen2(raw: Mapping[str, Any], shard: RankInfo, placement: Placement) -> Decoder:
    """q, k and v always have biases, the output has none."""
    settings = read_settings(raw, Qwen2Settings)
    check_layer_types(settings)
    check(settings, shard, settings.intermediate_size)
    parts = Parts(settings, shard, placement)

    def layer(number: int, prefix: str) -> DecoderLayer:
        return parts.layer(prefix, parts.attention(prefix, bias=True), parts.mlp(prefix))

    return Decoder(parts, layer)
