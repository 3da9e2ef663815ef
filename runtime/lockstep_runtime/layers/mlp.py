"""The gated MLP of Llama and its kin (SwiGLU, https://arxiv.org/abs/2002.05202)."""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from lockstep_runtime.distributed.communicator import Communicator
from lockstep_runtime.layers.linear import ColumnLinear, RowLinear
from lockstep_runtime.layers.placement import Placement
from lockstep_runtime.weights.sharding import RankInfo, replicated, split_slice
from lockstep_runtime.weights.weight import Weight


class GatedMLP:
    """down(silu(gate(x)) · up(x)); every rank has a share of the inner dimension, and their results are summed."""

    def __init__(
        self, prefix: str, hidden: int, inner: int, shard: RankInfo, placement: Placement, *, bias: bool = False
    ) -> None:
        names = [f"{prefix}.{name}_proj" for name in ("gate", "up")]
        self._gate_up = ColumnLinear(
            *(split_slice(f"{name}.weight", inner, hidden, shard=shard) for name in names),
            bias=tuple(split_slice(f"{name}.bias", inner, shard=shard) for name in names) if bias else (),
            placement=placement,
        )
        self._down = RowLinear(
            split_slice(f"{prefix}.down_proj.weight", hidden, inner, shard=shard, dim=1),
            replicated(f"{prefix}.down_proj.bias", hidden) if bias else None,
            placement=placement,
        )

    def weights(self) -> list[Weight]:
        return [*self._gate_up.weights(), *self._down.weights()]

    def part(self, x: Tensor) -> Tensor:
        """This rank's summand of the result, without the bias."""
        return self._down.part(self._inner(x))

    def __call__(self, x: Tensor, group: Communicator) -> Tensor:
        return self._down(self._inner(x), group)

    def _inner(self, x: Tensor) -> Tensor:
        gate, up = self._gate_up(x).chunk(2, dim=-1)
        return F.silu(gate).mul_(up)
