"""What Qwen3-Next and Qwen3.5 have in common: layers of Gated DeltaNet, with gated attention in every fourth, each
followed by an MLP or by experts, of which all tokens share one; norms have zero-centred weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Final

import msgspec

from lockstep_runtime.layers.delta_net import DeltaNet, DeltaNetPlanner, DeltaNetShape
from lockstep_runtime.layers.gated_attention import GatedAttention, GatedAttentionShape
from lockstep_runtime.layers.mlp import GatedMLP
from lockstep_runtime.layers.moe import MoeShape, SparseMoe
from lockstep_runtime.layers.norm import ZeroCentredRMSNorm
from lockstep_runtime.layers.placement import Placement
from lockstep_runtime.layers.vision import VisionTower
from lockstep_runtime.models.decoder import Decoder, DecoderLayer, Parts
from lockstep_runtime.models.settings import Count, DecoderSettings, check, read_settings, wrong
from lockstep_runtime.weights.sharding import RankInfo, TensorSlice, replicated

FULL, LINEAR = "full_attention", "linear_attention"  # of `layer_types`
ROTATED: Final = 0.25  # of a head, where config.json is silent
InputSlices = Callable[[str, int, DeltaNetShape, RankInfo], tuple[TensorSlice, ...]]
"""(prefix of a delta net's tensors, hidden, the whole's shape, rank) -> what `DeltaNet` takes as its inputs."""


class HybridSettings(DecoderSettings, frozen=True, kw_only=True):
    positions: ClassVar[int] = 32768

    num_key_value_heads: Count | None = 2
    head_dim: Count | None = 256
    attention_bias: bool = False
    full_attention_interval: Count = 4  # where there are no `layer_types`
    linear_conv_kernel_dim: Annotated[int, msgspec.Meta(ge=2)] = 4
    linear_key_head_dim: Count = 128
    linear_value_head_dim: Count = 128
    linear_num_key_heads: Count = 16
    linear_num_value_heads: Count = 32
    partial_rotary_factor: Annotated[float, msgspec.Meta(gt=0, le=1)] = ROTATED

    @property
    def rotated(self) -> int:
        return int(self.width * self.partial_rotary_factor)

    @property
    def kinds(self) -> list[str]:
        """Of the layers."""
        if self.layer_types is not None:
            return self.layer_types
        every = self.full_attention_interval
        return [FULL if number % every == every - 1 else LINEAR for number in range(self.num_hidden_layers)]

    def moe(self, layer: int) -> MoeShape | None:
        """None: the layer has an MLP."""
        return None

    @property
    def delta_net(self) -> DeltaNetShape:
        return DeltaNetShape(
            key_heads=self.linear_num_key_heads,
            value_heads=self.linear_num_value_heads,
            key_dim=self.linear_key_head_dim,
            value_dim=self.linear_value_head_dim,
            kernel=self.linear_conv_kernel_dim,
        )

    @property
    def attention(self) -> GatedAttentionShape:
        return GatedAttentionShape(
            hidden=self.hidden_size,
            heads=self.num_attention_heads,
            kv_heads=self.kv_heads,
            head_dim=self.width,
            bias=self.attention_bias,
            epsilon=self.rms_norm_eps,
        )


class SparseSettings(HybridSettings, frozen=True, kw_only=True):
    """Of models with experts."""

    intermediate_size: Annotated[int, msgspec.Meta(ge=0)] = 0  # of MLPs; there need be none
    moe_intermediate_size: Count = 512
    shared_expert_intermediate_size: Count = 512
    num_experts_per_tok: Count = 8
    num_experts: Annotated[int, msgspec.Meta(ge=0)] = 256

    @property
    def normalized(self) -> bool:
        """Whether the shares of a token's experts add up to one."""
        return True

    def is_sparse(self, layer: int) -> bool:
        return True

    def moe(self, layer: int) -> MoeShape | None:
        if not self.num_experts or not self.is_sparse(layer):
            return None
        return MoeShape(
            hidden=self.hidden_size,
            inner=self.moe_intermediate_size,
            experts=self.num_experts,
            chosen=self.num_experts_per_tok,
            normalized=self.normalized,
            shared_inner=self.shared_expert_intermediate_size,
        )


def build_hybrid(
    raw: Mapping[str, Any], kind: type[HybridSettings], shard: RankInfo, placement: Placement, *, inputs: InputSlices,
    prefix: str = "model", vision: VisionTower | None = None,
) -> Decoder:  # fmt: skip
    """`raw`: the text model's settings; `prefix`: of its tensors, but the head's.

    Raises:
        ModelError: a setting is missing or not supported, or the model can't be split over so many ranks.
    """
    settings = _read(raw, kind)
    _check(settings, shard)
    make = HybridParts(settings, shard, placement, inputs, DeltaNetPlanner(settings.delta_net, placement))
    return Decoder(Parts(settings, shard, placement), make.layer, make.norm(f"{prefix}.norm"), prefix, vision)


def _read(raw: Mapping[str, Any], kind: type[HybridSettings]) -> HybridSettings:
    """How much of a head is rotated stands with the other settings of the rotation, or beside them."""
    for place in ("rope_scaling", "rope_parameters"):
        if isinstance(raw.get(place), Mapping) and "partial_rotary_factor" in raw[place]:
            return read_settings({**raw, "partial_rotary_factor": raw[place]["partial_rotary_factor"]}, kind)
    return read_settings(raw, kind)


@dataclass(frozen=True, slots=True)
class HybridParts:
    """Makes the layers."""

    settings: HybridSettings
    shard: RankInfo
    placement: Placement
    inputs: InputSlices
    planner: DeltaNetPlanner

    def norm(self, name: str) -> ZeroCentredRMSNorm:
        tensor = replicated(f"{name}.weight", self.settings.hidden_size)
        return ZeroCentredRMSNorm(tensor, self.settings.rms_norm_eps, self.placement)

    def layer(self, number: int, prefix: str) -> DecoderLayer:
        return DecoderLayer(
            self.norm(f"{prefix}.input_layernorm"),
            self._attention(prefix) if self.settings.kinds[number] == FULL else self._delta_net(prefix),
            self.norm(f"{prefix}.post_attention_layernorm"),
            self._mlp(f"{prefix}.mlp", number),
        )

    def _attention(self, prefix: str) -> GatedAttention:
        return GatedAttention(f"{prefix}.self_attn", self.settings.attention, self.shard, self.placement)

    def _delta_net(self, prefix: str) -> DeltaNet:
        settings, shape, place = self.settings, self.settings.delta_net, f"{prefix}.linear_attn"
        inputs = self.inputs(place, settings.hidden_size, shape, self.shard)
        return DeltaNet(
            place, settings.hidden_size, settings.rms_norm_eps, inputs,
            shape=shape, shard=self.shard, placement=self.placement, planner=self.planner,
        )  # fmt: skip

    def _mlp(self, prefix: str, number: int) -> GatedMLP | SparseMoe:
        settings, moe = self.settings, self.settings.moe(number)
        if moe is not None:
            return SparseMoe(prefix, moe, self.shard, self.placement)
        return GatedMLP(prefix, settings.hidden_size, settings.intermediate_size, self.shard, self.placement)


def _check(settings: HybridSettings, shard: RankInfo) -> None:
    layers = range(settings.num_hidden_layers)
    if unknown := set(settings.kinds) - {FULL, LINEAR}:
        raise wrong(f"there are layers of the kind {min(unknown)}; supported are {FULL}, {LINEAR}")
    if len(settings.kinds) != len(layers):
        raise wrong(f"layer_types has {len(settings.kinds)} layers, and num_hidden_layers {len(layers)}")
    keys, values = settings.linear_num_key_heads, settings.linear_num_value_heads
    if values % keys:
        raise wrong(f"{values} linear value heads can't share {keys} linear key heads")
    kinds = {settings.moe(number) for number in layers}
    if None in kinds and not settings.intermediate_size:
        raise wrong("intermediate_size is missing, and some layers have an MLP")
    for moe in kinds:
        if moe is not None and moe.chosen > moe.experts:
            raise wrong(f"{moe.chosen} experts a token can't be chosen of {moe.experts}")
    inner = min(min(moe.inner, moe.shared_inner) if moe else settings.intermediate_size for moe in kinds)
    check(settings, shard, inner, keys)
