"""RMSNorm in bfloat16 on a CPU by one call in C, where torch takes a dozen operations."""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable
from typing import Final

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from lockstep_runtime.layers.native.library import Argument, function, load
from lockstep_runtime.layers.trial import DIFFERS, failure_of

logger = logging.getLogger(__name__)

Normalize = Callable[[Tensor, float, Tensor], Tensor]  # x, epsilon and weight, laid out as `is_laid_out` says
_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64
_KERNEL: Final[tuple[Argument, ...]] = (
    *(_POINTER, _SIZE, _POINTER, _SIZE, _POINTER),
    *(_SIZE, _SIZE, _SIZE, ctypes.c_double),
)
TRIED_TOKENS, TRIED_HEADS, TRIED_WIDTH = 3, 5, 48


def is_laid_out(x: Tensor, weight: Tensor) -> bool:
    """Whether x is [tokens, n] or [tokens, heads, n] of rows side by side, and the weight [n] or [heads, n]."""
    width, ends = x.shape[-1], (x.shape[-1], 1)
    rows_fit = x.stride(1) == 1 if x.ndim == 2 else x.ndim == 3 and x.stride()[1:] == ends
    return rows_fit and weight.is_contiguous() and weight.shape in ((width,), x.shape[1:])


@functools.cache
def native_norm(dtype: torch.dtype) -> Normalize | None:
    """None where it isn't compiled for this CPU and type, or gives other numbers than torch's."""
    found: list[Normalize] = []
    if failure := failure_of(lambda: _failure(dtype, found)):
        logger.warning("norms are computed by torch, which is slow for small models: %s", failure)
        return None
    return found[0]


def _failure(dtype: torch.dtype, found: list[Normalize]) -> str | None:
    normalize = normalize_by(load(dtype))
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(*shape, TRIED_WIDTH, generator=generator).to(dtype)
        for shape in ((TRIED_TOKENS, TRIED_HEADS + 1), (TRIED_HEADS,))
    )
    heads = x[:, :TRIED_HEADS]
    expected = F.rms_norm(heads.float(), (TRIED_WIDTH,), None, 1e-6) * weight.float()
    tolerance = 4 * torch.finfo(dtype).eps
    if not torch.allclose(normalize(heads, 1e-6, weight).float(), expected, rtol=tolerance, atol=tolerance):
        return DIFFERS
    found.append(normalize)
    return None


def normalize_by(library: ctypes.CDLL) -> Normalize:
    kernel = function(library, "normalize", *_KERNEL)

    def normalize(x: Tensor, epsilon: float, weight: Tensor) -> Tensor:
        out = torch.empty(x.shape, dtype=x.dtype)
        rows = 1 if x.ndim == 2 else x.shape[1]
        kernel(
            x.data_ptr(), x.stride(0), weight.data_ptr(), weight.ndim == 1, out.data_ptr(),
            x.shape[0], rows, x.shape[-1], epsilon,
        )  # fmt: skip
        return out

    return normalize
