"""Rotary position embedding (https://arxiv.org/abs/2104.09864), halves rotated against each other as Qwen does.

The scaled kinds are those of transformers' `modeling_rope_utils`: none, linear, yarn (https://arxiv.org/abs/2309.00071).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lockstep_runtime.weights.errors import ModelError


@dataclass(frozen=True, slots=True)
class Rotary:
    """Angles per position: `inverse_frequencies` [head_dim / 2], float32; `scale` multiplies cos and sin."""

    inverse_frequencies: Tensor
    scale: float

    def on(self, device: torch.device) -> Rotary:
        """The same, for positions that lie there."""
        return Rotary(self.inverse_frequencies.to(device), self.scale)

    def table(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions: [tokens] -> cos and signed sin, each [tokens, 1, head_dim], for `rotate_`."""
        angles = positions.float()[:, None] * self.inverse_frequencies
        cos, sin = angles.cos() * self.scale, angles.sin() * self.scale
        return (
            torch.cat((cos, cos), -1)[:, None].to(dtype),
            torch.cat((-sin, sin), -1)[:, None].to(dtype),
        )


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [tokens, heads, head_dim], rotated in place by the tables of `Rotary.table`."""
    swapped = x.roll(x.shape[-1] // 2, -1)
    return x.mul_(cos).addcmul_(swapped, sin)


def build_rotary(head_dim: int, theta: float, scaling: Mapping[str, Any], max_positions: int) -> Rotary:
    """`scaling` is config.json's `rope_scaling` or `rope_parameters`.

    Raises:
        ModelError: a kind that is not known here.
    """
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return Rotary(frequencies, 1.0)
    if kind == "linear":
        return Rotary(frequencies / float(scaling["factor"]), 1.0)
    if kind == "yarn":
        return _yarn(frequencies, head_dim, theta, scaling, max_positions)
    raise ModelError(f"config.json asks for rotary embeddings of the kind {kind!r}; known are default, linear and yarn")


def _yarn(frequencies: Tensor, dim: int, theta: float, scaling: Mapping[str, Any], max_positions: int) -> Rotary:
    """High frequencies stay, low ones are stretched by the factor, a ramp lies between."""
    original = int(scaling.get("original_max_position_embeddings") or max_positions)
    factor = float(scaling.get("factor") or max_positions / original)

    def dimension(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(float(scaling.get("beta_fast") or 32)), dimension(float(scaling.get("beta_slow") or 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = ((torch.arange(dim // 2).float() - low) / max(high - low, 0.001)).clamp(0, 1)
    attention = scaling.get("attention_factor")
    return Rotary(
        frequencies / factor * ramp + frequencies * (1 - ramp),
        float(attention) if attention is not None else _magnitude(factor, scaling),
    )


def _magnitude(factor: float, scaling: Mapping[str, Any]) -> float:
    def scale(multiplier: float) -> float:
        return 0.1 * multiplier * math.log(factor) + 1.0 if factor > 1 else 1.0

    mscale, mscale_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return scale(float(mscale)) / scale(float(mscale_all)) if mscale and mscale_all else scale(1.0)
