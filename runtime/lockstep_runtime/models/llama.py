"""Llama 2 and 3, and what is built like them (https://arxiv.org/abs/2407.21783); the oracle is transformers'
`LlamaForCausalLM`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lockstep_runtime.layers.placement import Placement
from lockstep_runtime.models.decoder import Decoder, DecoderLayer, Parts
from lockstep_runtime.models.settings import DecoderSettings, check, read_settings
from lockstep_runtime.weights.sharding import RankInfo


class LlamaSettings(DecoderSettings, frozen=True, kw_only=True):
    attention_bias: bool = False
    mlp_bias: bool = False


def build_llama(raw: Mapping[str, Any], shard: RankInfo, placement: Placement) -> Decoder:
    settings = read_settings(raw, LlamaSettings)
    check(settings, shard, settings.intermediate_size)
    parts, bias = Parts(settings, shard, placement), settings.attention_bias

    def layer(number: int, prefix: str) -> DecoderLayer:
        attention = parts.attention(prefix, bias=bias, out_bias=bias)
        return parts.layer(prefix, attention, parts.mlp(prefix, bias=settings.mlp_bias))

    return Decoder(parts, layer)
