"""Ways to multiply by a matrix on a CPU, and which of them this machine can use.

Nothing is believed of the CPU, of torch's version or of how torch was built: a kernel is tried on a small matrix, and
one that raises or gives other numbers than `F.linear` is left out.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from lockstep_runtime.layers.trial import failure_of

logger = logging.getLogger(__name__)

Multiply = Callable[[Tensor], Tensor]  # x: [tokens, inputs] -> [tokens, outputs]

FLOAT16_MAX: Final = 65504.0
ONEDNN_BATCH: Final = 8  # the layout that oneDNN takes for it serves one token as well as any, and several far better
TRIED_ROWS, TRIED_COLUMNS, TRIED_BATCHES = 40, 96, (1, 3, 16)  # rows that fill no whole block

# Said by the ops that torch means to remove one day; until then they cost 8 µs less a call than those that stay.
warnings.filterwarnings("ignore", message="fbgemm_.* is deprecated", category=UserWarning)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """`pack` takes rows [outputs, inputs] of type `rows`; what it returns takes and gives activations of its type."""

    name: str
    rows: torch.dtype
    activation: torch.dtype
    pack: Callable[[Tensor], Multiply]
    if_native: bool = False  # only where the CPU multiplies its type itself


def candidates(dtype: torch.dtype) -> tuple[Kernel, ...]:
    """The fastest first, for a model of that type; each is at least as exact as computing in it."""
    fbgemm = [
        Kernel(name=name, rows=torch.float32, activation=torch.float32, pack=functools.partial(within_float16, pack))
        for name, pack in (("FBGEMM float16", pack_fbgemm), ("FBGEMM float16, quantized", pack_fbgemm_quantized))
    ]
    native = [
        Kernel(name=name, rows=torch.bfloat16, activation=torch.bfloat16, pack=pack, if_native=True)
        for name, pack in (("oneDNN bfloat16", pack_onednn), ("oneDNN bfloat16, older torch", pack_onednn_of_mkldnn))
    ]
    emulated = [replace(kernel, name=f"{kernel.name}, emulated", if_native=False) for kernel in native]
    return {torch.bfloat16: (*native, *fbgemm, *emulated), torch.float16: tuple(fbgemm)}.get(dtype, ())


def choose_kernel(kernels: Sequence[Kernel]) -> Kernel | None:
    """The first that works here; None: `F.linear` has to do.

    The same on every call on one machine, so that a process in another's place computes the same bits.
    """
    for kernel in kernels:
        if (failure := trial(kernel)) is None:
            return kernel
        logger.info("matrices can't be multiplied by %s here: %s", kernel.name, failure)
    return None


def trial(kernel: Kernel) -> str | None:
    """Pack a small matrix, multiply by it and compare with `F.linear`; returns what is wrong."""
    return failure_of(lambda: _failure(kernel))


@torch.inference_mode()
def _failure(kernel: Kernel) -> str | None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(TRIED_ROWS, TRIED_COLUMNS, generator=generator).bfloat16()
    multiply = kernel.pack(rows.to(kernel.rows))
    for batch in TRIED_BATCHES:
        x = torch.randn(batch, TRIED_COLUMNS, generator=generator).to(kernel.activation)
        if not _agrees(multiply(x), F.linear(x.float(), rows.float()), kernel.activation):
            return f"its product of {batch} rows differs from F.linear's"
    if kernel.if_native and _emulates(kernel):
        return f"the CPU has no multiplication in {kernel.activation}"
    return None


def _agrees(product: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Within the rounding of a sum in float32 and of its result in `dtype`; expected: in float32."""
    if product.shape != expected.shape or product.dtype != dtype:
        return False
    in_sum = TRIED_COLUMNS * 8 * torch.finfo(torch.float32).eps  # of products of about one
    return torch.allclose(product.float(), expected, rtol=2 * torch.finfo(dtype).eps, atol=in_sum)


def _emulates(kernel: Kernel) -> bool:
    """Whether it multiplies in float32: instructions for bfloat16 take the smallest numbers for zero (VDPBF16PS and
    TDPBF16PS in Intel's manual). Through float32 oneDNN takes two to four times as long as FBGEMM."""
    smallest = torch.full((TRIED_ROWS, TRIED_COLUMNS), 2.0**-130, dtype=kernel.rows)
    product = kernel.pack(smallest)(torch.full((8, TRIED_COLUMNS), 2.0**30, dtype=kernel.activation))
    return bool(product.any())


def pack_onednn(rows: Tensor) -> Multiply:
    """oneDNN's blocked layout, in the rows' own type. (torch has no public way: `torch.utils.mkldnn` converts
    activations on every call, which costs more than the layout gives.)"""
    return _onednn(torch.ops.mkldnn._reorder_linear_weight(rows, ONEDNN_BATCH))


def pack_onednn_of_mkldnn(rows: Tensor) -> Multiply:
    """The same where torch wants a tensor in oneDNN's own form."""
    return _onednn(torch.ops.mkldnn._reorder_linear_weight(rows.to_mkldnn(), ONEDNN_BATCH))


def _onednn(packed: Tensor) -> Multiply:
    multiply = torch.ops.mkldnn._linear_pointwise.default
    return lambda x: multiply(x, packed, None, "none", [], "")


def within_float16(pack: Callable[[Tensor], Multiply], rows: Tensor) -> Multiply:
    """Rows that hold a larger value than float16 has, or a NaN, stay in float32.

    bfloat16 values between 6.1e-5 and 65504 are exact in float16; smaller ones are off by 3e-8 at most.
    """
    least, greatest = (float(bound) for bound in torch.aminmax(rows))
    if not -FLOAT16_MAX <= least <= greatest <= FLOAT16_MAX:
        return functools.partial(F.linear, weight=rows)
    return pack(rows)


def pack_fbgemm(rows: Tensor) -> Multiply:
    """float16 in FBGEMM's layout, from float32 rows; sums are float32."""
    packed, outputs = torch.ops.aten.fbgemm_pack_gemm_matrix_fp16(rows), rows.shape[0]
    multiply = torch.ops.aten.fbgemm_linear_fp16_weight_fp32_activation.out
    return lambda x: multiply(x, packed, None, x.new_empty(x.shape[0], outputs))


def pack_fbgemm_quantized(rows: Tensor) -> Multiply:
    """The same kernel, by the ops that stay."""
    packed = torch.ops.quantized.linear_prepack_fp16(rows, None)
    multiply = torch.ops.quantized.linear_dynamic_fp16.default
    return lambda x: multiply(x, packed)
