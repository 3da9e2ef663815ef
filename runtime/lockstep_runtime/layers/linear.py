"""Linear layers split over ranks (https://arxiv.org/abs/1909.08053): by outputs, then by inputs and summed."""

from __future__ import annotations

from torch import Tensor

from lockstep_runtime.distributed.communicator import Group
from lockstep_runtime.layers.collective_name import place_of
from lockstep_runtime.layers.matrix import matrix
from lockstep_runtime.layers.placement import Placement
from lockstep_runtime.layers.weight import PlainWeight
from lockstep_runtime.weights.sharding import Cut
from lockstep_runtime.weights.weight import Weight


class ColumnLinear:
    """Each rank makes its own outputs from the whole input: nothing to exchange. Several cuts are one product."""

    def __init__(self, *cuts: Cut, bias: tuple[Cut, ...] = (), placement: Placement) -> None:
        self._matrix = matrix(*cuts, placement=placement)
        self._bias = PlainWeight(*bias, placement=placement) if bias else None

    def weights(self) -> list[Weight]:
        return [self._matrix, *([self._bias] if self._bias else [])]

    def __call__(self, x: Tensor) -> Tensor:
        """x: [tokens, inputs] -> [tokens, this rank's outputs]."""
        y = self._matrix(x)
        return y if self._bias is None else y.add_(self._bias.data)


class RowLinear:
    """Each rank has its own inputs and makes a summand of every output; the bias is added once, to the sum."""

    def __init__(self, cut: Cut, bias: Cut | None = None, *, placement: Placement) -> None:
        self._matrix = matrix(cut, placement=placement)
        self._bias = PlainWeight(bias, placement=placement) if bias else None
        self._place = place_of(cut)

    def weights(self) -> list[Weight]:
        return [self._matrix, *([self._bias] if self._bias else [])]

    def __call__(self, x: Tensor, group: Group) -> Tensor:
        """x: [tokens, this rank's inputs] -> [tokens, outputs], the same on every rank."""
        y = group.all_reduce(self._matrix(x), self._place)
        return y if self._bias is None else y.add_(self._bias.data)
