"""One product of rows by several matrices, each row by its group's (torch's `grouped_mm`); whether it works here."""

from __future__ import annotations

import logging
from typing import Final

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from lockstep_runtime.layers.trial import DIFFERS, failure_of

logger = logging.getLogger(__name__)

ALIGNMENT: Final = 16  # bytes of a row, of both factors
TRIED_ROWS, TRIED_GROUPS, TRIED_SIZE = 7, 3, 32


def grouped_product(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """rows: [n, inputs], sorted by group; matrices: [groups, outputs, inputs]; ends: [groups], int32, of the groups'
    rows -> [n, outputs]."""
    return F.grouped_mm(rows, matrices.transpose(1, 2), offs=ends)


def is_aligned(size: int, dtype: torch.dtype) -> bool:
    """Whether rows of so many numbers suit it."""
    return size * dtype.itemsize % ALIGNMENT == 0


def works(device: torch.device, dtype: torch.dtype) -> bool:
    """Tried on something small."""
    failure = failure_of(lambda: None if _agrees(device, dtype) else DIFFERS)
    if failure:
        logger.info("experts are multiplied by in turn here, not by one grouped product: %s", failure)
    return not failure


def _agrees(device: torch.device, dtype: torch.dtype) -> bool:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(TRIED_ROWS, TRIED_SIZE, generator=generator).to(device, dtype)
    matrices = torch.randn(TRIED_GROUPS, TRIED_SIZE, TRIED_SIZE, generator=generator).to(device, dtype)
    counts = [4, 0, 3]
    ends = torch.tensor(counts, device=device).cumsum(0, dtype=torch.int32)
    found = grouped_product(rows, matrices, ends)
    parts = zip(torch.split(rows.float(), counts), matrices.float(), strict=True)
    expected = torch.cat([F.linear(part, matrix) for part, matrix in parts])
    tolerance = 8 * TRIED_SIZE**0.5 * torch.finfo(dtype).eps
    return torch.allclose(found.float(), expected, rtol=2 * torch.finfo(dtype).eps, atol=tolerance)
