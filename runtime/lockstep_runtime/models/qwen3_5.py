"""Qwen3.5, dense and with experts; the oracles are transformers' `Qwen3_5ForCausalLM`, `Qwen3_5MoeForCausalLM` and the
text models of the two `ForConditionalGeneration`.

Of the latter the text model is built: a text's positions are the same in all three dimensions, so that its rotary
embedding is the plain one. Nothing else of a checkpoint (`model.visual.*`, `mtp.*`) is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from lockstep_runtime.layers.delta_net import DeltaNetShape, convolved_slices
from lockstep_runtime.layers.placement import Placement
from lockstep_runtime.models.decoder import Decoder
from lockstep_runtime.models.hybrid import HybridSettings, SparseSettings, build_hybrid
from lockstep_runtime.models.settings import Count
from lockstep_runtime.sources.model_config import text_config
from lockstep_runtime.weights.sharding import RankInfo, TensorSlice, head_slice

VISION_PREFIX: Final = "model.language_model"  # of the text model's tensors beside a vision tower's


class Qwen35Settings(HybridSettings, frozen=True, kw_only=True):
    num_key_value_heads: Count | None = 4


def build_qwen3_5(raw: Mapping[str, Any], shard: RankInfo, placement: Placement) -> Decoder:
    return build_hybrid(raw, Qwen35Settings, shard, placement, inputs=input_slices)


def build_qwen3_5_moe(raw: Mapping[str, Any], shard: RankInfo, placement: Placement) -> Decoder:
    return build_hybrid(raw, SparseSettings, shard, placement, inputs=input_slices)


def build_qwen3_5_vision(raw: Mapping[str, Any], shard: RankInfo, placement: Placement) -> Decoder:
    return build_hybrid(_text(raw), Qwen35Settings, shard, placement, inputs=input_slices, prefix=VISION_PREFIX)


def build_qwen3_5_moe_vision(raw: Mapping[str, Any], shard: RankInfo, placement: Placement) -> Decoder:
    return build_hybrid(_text(raw), SparseSettings, shard, placement, inputs=input_slices, prefix=VISION_PREFIX)


def _text(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The text model's settings. Whether the head is tied is said beside them, as in transformers."""
    return {**text_config(raw), "tie_word_embeddings": raw.get("tie_word_embeddings", False)}


def input_slices(prefix: str, hidden: int, shape: DeltaNetShape, shard: RankInfo) -> tuple[TensorSlice, ...]:
    """Queries, keys and values are packed in one tensor; the others have their own."""
    values, heads = shape.values, shape.value_heads
    return (
        *convolved_slices(f"{prefix}.in_proj_qkv.weight", shape, hidden, shard=shard),
        head_slice(f"{prefix}.in_proj_z.weight", values, hidden, count=heads, shard=shard),
        head_slice(f"{prefix}.in_proj_b.weight", heads, hidden, count=heads, shard=shard),
        head_slice(f"{prefix}.in_proj_a.weight", heads, hidden, count=heads, shard=shard),
    )
