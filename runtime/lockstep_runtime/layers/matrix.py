"""Matrices that multiply activations from the right: y = x Wᵀ.

On a GPU and in float32 a matrix stays as it is in the checkpoint. On a CPU, half-precision matrices are packed once at
load, window by window, for the sake of faster kernels, and the packed form replaces the plain one.
"""

from __future__ import annotations

import functools
import hashlib
import threading
import warnings
from collections.abc import Callable, Generator, Iterator
from typing import Final, Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from lockstep_runtime.layers.placement import Packing, Placement
from lockstep_runtime.layers.weight import PlainWeight, Weight, stacked_rows, windows
from lockstep_runtime.weights.plan import Cut

FLOAT16_MAX = 65504.0
PACKED_WINDOW_BYTES = 16 * 1024 * 1024  # in float32; a larger matrix is several packed ones
Multiply = Callable[[Tensor], Tensor]
_hearing = threading.Lock()


class Matrix(Weight, Protocol):
    """As many outputs as the cuts have rows, as many inputs as they have columns."""

    def __call__(self, x: Tensor) -> Tensor:
        """x: [tokens, inputs] -> [tokens, outputs]."""


def matrix(*cuts: Cut, placement: Placement) -> Matrix:
    """The kind of matrix that suits the placement."""
    kind = PlainMatrix if placement.packing is Packing.NONE else PackedMatrix
    return kind(*cuts, placement=placement)


class PlainMatrix(PlainWeight):
    """Row-major, multiplied by `F.linear`."""

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.data)


class PackedMatrix:
    """Laid out for the CPU's fastest kernel, in one or several windows of rows."""

    cached_dtype: Final = None  # packed again from the checkpoint's own values, so that the result is the same

    def __init__(self, *cuts: Cut, placement: Placement) -> None:
        self.cuts = cuts
        self._pack = pack_fbgemm if placement.packing is Packing.FBGEMM else pack_onednn
        self._activation = placement.activation
        self._staged = torch.float32 if placement.packing is Packing.FBGEMM else placement.dtype
        self._windows: list[Multiply] = []

    def receive(self) -> Iterator[tuple[int, int, Tensor]]:
        self._windows = []
        filled, columns = stacked_rows(self.cuts), self.cuts[0].local_shape[1]
        for start, stop in windows(filled, columns * 4, PACKED_WINDOW_BYTES, multiple=16):
            staging = torch.empty((stop - start, columns), dtype=self._staged)
            yield start, stop, staging
            self._windows.append(self._pack(staging))

    def adopt(self, stored: Tensor) -> None:
        for start, stop, staging in self.receive():
            staging.copy_(stored[start:stop])

    def checksum_in_parts(self) -> Generator[None, None, str]:
        """Of products, since the packed form is opaque: a kernel gives the same bits for the same weights.

        A change that is lost in a product's rounding shows in no other product either.
        """
        hashed = hashlib.blake2b(digest_size=8)
        ramp = torch.linspace(-1.0, 1.0, self.cuts[0].local_shape[1], dtype=torch.float32)[None]
        for window in self._windows:
            product = window(ramp.to(self._activation))
            hashed.update(product.contiguous().view(torch.uint8).numpy().data)
            yield
        return hashed.hexdigest()

    def __call__(self, x: Tensor) -> Tensor:
        if len(self._windows) == 1:
            return self._windows[0](x)
        return torch.cat([x.new_empty(x.shape[0], 0), *(window(x) for window in self._windows)], dim=1)


def pack_onednn(rows: Tensor) -> Multiply:
    """oneDNN's blocked layout, in the rows' own type."""
    packed = torch.ops.mkldnn._reorder_linear_weight(rows.to_mkldnn(), 1)
    multiply = torch.ops.mkldnn._linear_pointwise.default
    return lambda x: multiply(x, packed, None, "none", [], "")


def pack_fbgemm(rows: Tensor) -> Multiply:
    """float16 in FBGEMM's layout, from float32 rows; sums are float32.

    bfloat16 values between 6.1e-5 and 65504 are exact in float16; smaller ones are off by 3e-8 at most. A window with a
    larger value (or a NaN) is kept in float32 instead.
    """
    least, greatest = (float(bound) for bound in torch.aminmax(rows))
    if not -FLOAT16_MAX <= least <= greatest <= FLOAT16_MAX:
        return functools.partial(F.linear, weight=rows)
    _hear_fbgemm_out()
    return _fbgemm_multiply(rows)


@functools.cache
def _hear_fbgemm_out() -> None:
    """Its functions say once that they are deprecated (see `_fbgemm_multiply`); that is heard here, and ignored.

    One thread at a time: filters of warnings belong to the whole process.
    """
    with _hearing, warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore", UserWarning)
        _fbgemm_multiply(torch.ones(16, 16))(torch.ones(1, 16))


def _fbgemm_multiply(rows: Tensor) -> Multiply:
    """torch has two ways to the same kernel: the older costs less a call, but is to be removed one day."""
    pack = getattr(torch.ops.aten, "fbgemm_pack_gemm_matrix_fp16", None)
    multiply = getattr(torch.ops.aten, "fbgemm_linear_fp16_weight_fp32_activation", None)
    if pack is not None and multiply is not None:
        packed, outputs, call = pack(rows), rows.shape[0], multiply.out

        def product(x: Tensor) -> Tensor:
            return call(x, packed, None, x.new_empty(x.shape[0], outputs))  # type: ignore[no-any-return]

        return product
    held = torch.ops.quantized.linear_prepack_fp16(rows, None)
    dynamic = torch.ops.quantized.linear_dynamic_fp16.default
    return lambda x: dynamic(x, held)
