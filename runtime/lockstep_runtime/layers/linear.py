"""Linear layers split over ranks (https://arxiv.org/abs/1909.08053): by outputs, then by inputs and summed."""

from __future__ import annotations

from torch import Tensor

from lockstep_runtime.distributed.communicator import Communicator
from lockstep_runtime.layers.collective_name import collective_name
from lockstep_runtime.layers.matrix import matrix
from lockstep_runtime.layers.placement import Placement
from lockstep_runtime.layers.weight import PlainWeight
from lockstep_runtime.weights.sharding import TensorSlice
from lockstep_runtime.weights.weight import Weight


class ColumnLinear:
    """Each rank makes its own outputs from the whole input: nothing to exchange. Several slices are one product."""

    def __init__(self, *slices: TensorSlice, bias: tuple[TensorSlice, ...] = (), placement: Placement) -> None:
        self._matrix = matrix(*slices, placement=placement)
        self._bias = PlainWeight(*bias, placement=placement) if bias else None

    def weights(self) -> list[Weight]:
        return [self._matrix, *([self._bias] if self._bias else [])]

    def __call__(self, x: Tensor) -> Tensor:
        """x: [tokens, inputs] -> [tokens, this rank's outputs]."""
        y = self._matrix(x)
        return y if self._bias is None else y.add_(self._bias.data)


class RowLinear:
    """Each rank has its own inputs and makes a summand of every output; the bias is added once, to the sum."""

    def __init__(self, tensor_slice: TensorSlice, bias: TensorSlice | None = None, *, placement: Placement) -> None:
        self._matrix = matrix(tensor_slice, placement=placement)
        self._bias = PlainWeight(bias, placement=placement) if bias else None
        self._place = collective_name(tensor_slice.tensor)

    def weights(self) -> list[Weight]:
        return [self._matrix, *([self._bias] if self._bias else [])]

    def __call__(self, x: Tensor, group: Communicator) -> Tensor:
        """x: [tokens, this rank's inputs] -> [tokens, outputs], the same on every rank."""
        return self._biased(group.all_reduce(self.part(x), self._place))

    def part(self, x: Tensor) -> Tensor:
        """This rank's summand, for who sums it together with others."""
        return self._matrix(x)

    def alone(self, x: Tensor) -> Tensor:
        """The sum where this rank has all inputs, as every other has."""
        return self._biased(self._matrix(x))

    def _biased(self, y: Tensor) -> Tensor:
        return y if self._bias is None else y.add_(self._bias.data)
