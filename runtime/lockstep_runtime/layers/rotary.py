"""Rotary position embedding (https://arxiv.org/abs/2104.09864), halves rotated against each other as Qwen does.

The scaled kinds are those of transformers' `modeling_rope_utils`: none, linear, yarn (https://arxiv.org/abs/2309.00071),
llama3. Its `dynamic` and `longrope` change the angles of tokens that are in the cache already, as a text grows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from lockstep_runtime.protocol.bus import LoadFailure
from lockstep_runtime.sources.errors import ModelError

Rotation = tuple[Tensor, Tensor]  # of a step's tokens: cos and signed sin, [tokens, 1, head_dim] each


@dataclass(frozen=True, slots=True)
class Rotary:
    """Angles per position: `inverse_frequencies` [head_dim / 2], float32; `scale` multiplies cos and sin. `axes`
    [head_dim / 2]: which of time, height and width each frequency turns with, where positions are of three kinds."""

    inverse_frequencies: Tensor
    scale: float
    axes: Tensor | None = None

    def on(self, device: torch.device) -> Rotary:
        """The same, for positions that lie there."""
        axes = None if self.axes is None else self.axes.to(device)
        return Rotary(self.inverse_frequencies.to(device), self.scale, axes)

    def interleaved(self, sections: Sequence[int]) -> Rotary:
        """The same, of positions of three kinds: as many frequencies as the sections say turn with time, height and
        width, in turn (https://arxiv.org/abs/2511.21631, interleaved MRoPE).

        Raises:
            ModelError: sections that don't fit the frequencies.
        """
        count = len(self.inverse_frequencies)
        if len(sections) != 3 or sum(sections) != count or min(sections) < 0:
            raise _wrong(f"gives mrope_section {list(sections)}, which don't share out {count} frequencies")
        axes = torch.zeros(count, dtype=torch.int64)
        for axis in (1, 2):
            axes[axis : sections[axis] * 3 : 3] = axis
        return Rotary(self.inverse_frequencies, self.scale, axes)

    def table(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """positions: [tokens], or [3, tokens] where they are of three kinds -> what `rotate_`
        takes."""
        if positions.ndim == 1 or self.axes is None:
            angles = positions.float()[:, None] * self.inverse_frequencies
        else:
            angles = positions.float().index_select(0, self.axes).T * self.inverse_frequencies
        cos, sin = angles.cos() * self.scale, angles.sin() * self.scale
        return (
            torch.cat((cos, cos), -1)[:, None].to(dtype),
            torch.cat((-sin, sin), -1)[:, None].to(dtype),
        )


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [tokens, heads, head_dim], rotated in place by the tables of `Rotary.table`."""
    swapped = x.roll(x.shape[-1] // 2, -1)
    return x.mul_(cos).addcmul_(swapped, sin)


def build_rotary(head_dim: int, rope: Mapping[str, Any], max_positions: int) -> Rotary:
    """`rope`: what `weights.model_config.rope_parameters` found in config.json.

    Raises:
        ModelError: a kind that is not known here, or one without what it needs.
    """
    kind = rope["rope_type"]
    if kind not in _KINDS:
        raise _wrong(f"asks for rotary embeddings of the kind {kind!r}; known are {', '.join(_KINDS)}")
    theta = _number(rope, "rope_theta")
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    return _KINDS[kind](frequencies, head_dim, rope, max_positions)


def _plain(frequencies: Tensor, dim: int, rope: Mapping[str, Any], max_positions: int) -> Rotary:
    return Rotary(frequencies, 1.0)


def _linear(frequencies: Tensor, dim: int, rope: Mapping[str, Any], max_positions: int) -> Rotary:
    return Rotary(frequencies / _number(rope, "factor"), 1.0)


def _llama3(frequencies: Tensor, dim: int, rope: Mapping[str, Any], max_positions: int) -> Rotary:
    """Low frequencies are stretched by the factor, high ones stay, those in between go over smoothly."""
    low, high, factor = (_number(rope, name) for name in ("low_freq_factor", "high_freq_factor", "factor"))
    original = _number(rope, "original_max_position_embeddings")
    if high <= low:
        raise _wrong(f"gives high_freq_factor {high:g}, which is not more than low_freq_factor {low:g}")
    wavelengths = 2 * math.pi / frequencies
    smooth = (original / wavelengths - low) / (high - low)
    between = (1 - smooth) * frequencies / factor + smooth * frequencies
    stretched = torch.where(wavelengths > original / low, frequencies / factor, frequencies)
    is_between = (wavelengths >= original / high) & (wavelengths <= original / low)
    return Rotary(torch.where(is_between, between, stretched), 1.0)


def _yarn(frequencies: Tensor, dim: int, rope: Mapping[str, Any], max_positions: int) -> Rotary:
    """High frequencies stay, low ones are stretched by the factor, a ramp lies between."""
    theta, original = _number(rope, "rope_theta"), _number(rope, "original_max_position_embeddings")
    factor = _number(rope, "factor") if rope.get("factor") is not None else max_positions / original

    def dimension(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(float(rope.get("beta_fast") or 32)), dimension(float(rope.get("beta_slow") or 1))
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = ((torch.arange(dim // 2).float() - low) / (high - low if high != low else 0.001)).clamp(0, 1)
    attention = rope.get("attention_factor")
    return Rotary(
        frequencies / factor * ramp + frequencies * (1 - ramp),
        float(attention) if attention is not None else _magnitude(factor, rope),
    )


def _magnitude(factor: float, rope: Mapping[str, Any]) -> float:
    def scale(multiplier: float) -> float:
        return 0.1 * multiplier * math.log(factor) + 1.0 if factor > 1 else 1.0

    mscale, mscale_all = rope.get("mscale"), rope.get("mscale_all_dim")
    return scale(float(mscale)) / scale(float(mscale_all)) if mscale and mscale_all else scale(1.0)


_KINDS: Final[Mapping[str, Callable[[Tensor, int, Mapping[str, Any], int], Rotary]]] = {
    "default": _plain,
    "linear": _linear,
    "yarn": _yarn,
    "llama3": _llama3,
}


def _number(rope: Mapping[str, Any], name: str) -> float:
    value = rope.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise _wrong(
            f"gives {name} {value!r} for rotary embeddings of the kind {rope['rope_type']!r}: a number is needed"
        )
    return float(value)


def _wrong(message: str) -> ModelError:
    return ModelError(f"config.json {message}", kind=LoadFailure.PERMANENT)
