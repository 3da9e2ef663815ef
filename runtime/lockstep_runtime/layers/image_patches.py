"""From an image's pixels to the vision tower's input, and where each patch stands.

Patches are in merge-block order: those that become one token follow one another.

Sources: transformers' `Qwen2VLImageProcessorPil.patchify` and `vision_utils`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lockstep_runtime.sources.image_processor import ImageProcessor


@dataclass(frozen=True, slots=True)
class Grid:
    """An image in patches."""

    rows: int
    columns: int
    merge: int

    def in_blocks(self, raster: Tensor) -> Tensor:
        """raster: [rows, columns, ...] -> [rows * columns, ...]."""
        rows, columns, merge = self.rows // self.merge, self.columns // self.merge, self.merge
        blocks = raster.view(rows, merge, columns, merge, *raster.shape[2:]).transpose(1, 2)
        return blocks.reshape(self.rows * self.columns, *raster.shape[2:])

    def positions(self, device: torch.device) -> Tensor:
        """[2, patches]: each one's row and column."""
        rows = torch.arange(self.rows, device=device)[:, None].expand(-1, self.columns)
        columns = torch.arange(self.columns, device=device).expand(self.rows, -1)
        return torch.stack([self.in_blocks(one.contiguous()) for one in (rows, columns)])

    @property
    def tokens(self) -> int:
        return self.rows * self.columns // self.merge**2


def grid_of(height: int, width: int, processor: ImageProcessor) -> Grid:
    """
    Raises:
        ValueError: so many pixels are no whole tokens, or more than there are positions for.
    """
    rows, columns = height // processor.patch, width // processor.patch
    if height % processor.factor or width % processor.factor:
        raise ValueError(f"an image of {width} x {height} pixels is no whole number of {processor.factor}-pixel tokens")
    if not 0 < rows * columns <= processor.most_patches:
        raise ValueError(f"an image of {rows * columns} patches; the tower has positions for {processor.most_patches}")
    return Grid(rows, columns, processor.merge)


def normalised(processor: ImageProcessor) -> Tensor:
    """[256, 3]: what each value of a pixel becomes, rounded where transformers rounds."""
    scaled = (torch.arange(256, dtype=torch.float64) * processor.rescale).float()[:, None]
    return (scaled - torch.tensor(processor.mean)) / torch.tensor(processor.deviation)


def patchify(pixels: Tensor, grid: Grid, table: Tensor, processor: ImageProcessor) -> Tensor:
    """pixels: [height, width, 3], uint8; table: of `normalised` -> [patches, 3 * frames * patch * patch], float32."""
    side = processor.patch
    colours = torch.stack([table[:, colour][pixels[:, :, colour].long()] for colour in range(3)])
    raster = colours.view(3, grid.rows, side, grid.columns, side).permute(1, 3, 0, 2, 4)
    patches = grid.in_blocks(raster.contiguous())[:, :, None]  # [patches, 3, 1, patch, patch]
    return patches.expand(-1, -1, processor.frames, -1, -1).reshape(len(patches), -1)


def interpolation(grid: Grid, side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """How the square table of side * side position embeddings is stretched over the grid, bilinearly, corner on corner:
    indices and float32 weights, [patches, 4] each."""
    taps, weights = [], []
    for positions, size in zip(grid.positions(device), (grid.rows, grid.columns), strict=True):
        exact = positions.float() * (side - 1) / max(size - 1, 1)
        below = exact.floor()
        above = exact - below
        taps.append(torch.stack([below.long(), (below.long() + 1).clamp(max=side - 1)], dim=1))
        weights.append(torch.stack([1 - above, above], dim=1))
    indices = (taps[0][:, :, None] * side + taps[1][:, None, :]).flatten(1)
    return indices, (weights[0][:, :, None] * weights[1][:, None, :]).flatten(1)
