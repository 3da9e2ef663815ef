"""Qwen3.5, dense and with experts; the oracles are transformers' `Qwen3_5ForCausalLM`, `Qwen3_5MoeForCausalLM` and the
text models of the two `ForConditionalGeneration`.

The latter have a vision tower as well, if the checkpoint says how images are prepared; a text's positions are the same
in all three dimensions. Nothing else of a checkpoint (`mtp.*`) is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from lockstep_runtime.layers.delta_net import DeltaNetShape, convolved_slices
from lockstep_runtime.layers.placement import Placement
from lockstep_runtime.layers.vision import VisionTower, read_vision_config
from lockstep_runtime.models.decoder import Decoder
from lockstep_runtime.models.hybrid import HybridSettings, SparseSettings, build_hybrid
from lockstep_runtime.models.settings import Count, wrong
from lockstep_runtime.sources.image_processor import image_processor
from lockstep_runtime.sources.model_config import text_config
from lockstep_runtime.weights.sharding import RankInfo, TensorSlice, head_slice

TEXT_PREFIX: Final = "model.language_model"  # of the text model's tensors beside a vision tower's
TOWER_PREFIX: Final = "model.visual"


class Qwen35Settings(HybridSettings, frozen=True, kw_only=True):
    num_key_value_heads: Count | None = 4


def build_qwen3_5(raw: Mapping[str, Any], shard: RankInfo, placement: Placement) -> Decoder:
    return build_hybrid(raw, Qwen35Settings, shard, placement, inputs=input_slices)


def build_qwen3_5_moe(raw: Mapping[str, Any], shard: RankInfo, placement: Placement) -> Decoder:
    return build_hybrid(raw, SparseSettings, shard, placement, inputs=input_slices)


def build_qwen3_5_vision(raw: Mapping[str, Any], shard: RankInfo, placement: Placement) -> Decoder:
    return _with_vision(raw, Qwen35Settings, shard, placement)


def build_qwen3_5_moe_vision(raw: Mapping[str, Any], shard: RankInfo, placement: Placement) -> Decoder:
    return _with_vision(raw, SparseSettings, shard, placement)


def _with_vision(raw: Mapping[str, Any], kind: type[HybridSettings], shard: RankInfo, placement: Placement) -> Decoder:
    text = _text(raw)
    return build_hybrid(
        text, kind, shard, placement,
        inputs=input_slices, prefix=TEXT_PREFIX, vision=_tower(raw, text["hidden_size"], shard, placement),
    )  # fmt: skip


def _tower(raw: Mapping[str, Any], hidden: int, shard: RankInfo, placement: Placement) -> VisionTower | None:
    """None: nothing says how images are to be prepared, so that there will be none."""
    processor = image_processor(raw)
    if processor is None:
        return None
    config = read_vision_config(raw["vision_config"])
    if config.out_hidden_size != hidden:
        raise wrong(f"vision_config's out_hidden_size is {config.out_hidden_size}, and the text's hidden_size {hidden}")
    return VisionTower(config, TOWER_PREFIX, processor, shard, placement)


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
