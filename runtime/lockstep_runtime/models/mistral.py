"""Mistral, dense (https://arxiv.org/abs/2310.06825); the oracle is transformers' `MistralForCausalLM`.

With a sliding window the model's length is the window's: within it every token sees all tokens before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from lockstep_runtime.layers.placement import Placement
from lockstep_runtime.models.decoder import Decoder, DecoderLayer, Parts
from lockstep_runtime.models.settings import Count, DecoderSettings, check, read_settings
from lockstep_runtime.weights.sharding import RankInfo


class MistralSettings(DecoderSettings, frozen=True, kw_only=True):
    positions: ClassVar[int] = 131072

    num_key_value_heads: Count | None = 8


def build_mistral(raw: Mapping[str, Any], shard: RankInfo, placement: Placement) -> Decoder:
    settings = read_settings(raw, MistralSettings)
    check(settings, shard, settings.intermediate_size)
    parts = Parts(settings, shard, placement)

    def layer(number: int, prefix: str) -> DecoderLayer:
        return parts.layer(prefix, parts.attention(prefix), parts.mlp(prefix))

    return Decoder(parts, layer)
