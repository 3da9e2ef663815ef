"""Where a rank's tensors live, in which type, and how its matrices are multiplied."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lockstep_runtime.layers import grouped_product
from lockstep_runtime.layers.matmul_kernels import Kernel, candidates, choose_kernel


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """One rank's choice for the whole model."""

    device: torch.device
    dtype: torch.dtype  # the model's, as configured
    activation: torch.dtype  # of hidden states, small weights and the KV cache
    kernel: Kernel | None = None  # packs matrices; None: they stay row-major, as in the checkpoint
    grouped: bool = False  # several matrices are multiplied by at once (`grouped_product`)


def choose_placement(device: torch.device, dtype: torch.dtype) -> Placement:
    """The fastest way that works here and is at least as exact as computing in `dtype`."""
    if device.type == "cpu":
        return place(device, dtype, choose_kernel(candidates(dtype)))
    return Placement(device=device, dtype=dtype, activation=dtype, grouped=grouped_product.works(device, dtype))


def place(device: torch.device, dtype: torch.dtype, kernel: Kernel | None) -> Placement:
    return Placement(device=device, dtype=dtype, activation=kernel.activation if kernel else dtype, kernel=kernel)
