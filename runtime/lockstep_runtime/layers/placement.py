"""Where a rank's tensors live, in which type, and how its matrices are multiplied."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch


class Packing(enum.Enum):
    """How a matrix is laid out for multiplication."""

    NONE = "none"  # row-major, as in the checkpoint
    FBGEMM = "fbgemm"  # float16 weights, float32 activations and sums: CPUs without bfloat16 arithmetic
    ONEDNN = "onednn"  # oneDNN's blocked layout in the model's own type


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """One rank's choice for the whole model."""

    device: torch.device
    dtype: torch.dtype  # the model's, as configured
    activation: torch.dtype  # of hidden states, small weights and the KV cache
    packing: Packing


def choose_placement(device: torch.device, dtype: torch.dtype) -> Placement:
    """The fastest way that is at least as exact as computing in `dtype`."""
    packing = Packing.NONE if device.type != "cpu" else _packing(dtype)
    activation = torch.float32 if packing is Packing.FBGEMM else dtype
    return Placement(device=device, dtype=dtype, activation=activation, packing=packing)


def _packing(dtype: torch.dtype) -> Packing:
    if dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported() and _has_fast_bfloat16():
        return Packing.ONEDNN
    if dtype != torch.float32 and "fbgemm" in torch.backends.quantized.supported_engines:
        return Packing.FBGEMM
    return Packing.NONE


def _has_fast_bfloat16() -> bool:
    """oneDNN packs bfloat16 only where AVX512 can multiply it; elsewhere it raises or emulates it slowly."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"
