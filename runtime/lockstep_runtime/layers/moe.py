"""Mixture of experts: a router chooses a few MLPs for every token (https://arxiv.org/abs/2101.03961), beside one that
all tokens share in some models.

Every rank has a slice of every expert's inner dimension, not some of the experts, so all ranks have the same work in
every step, whichever experts the tokens choose (docs/decisions/experts-by-slice.md). There is one
all-reduce a layer.

The oracle is transformers' `Qwen3MoeSparseMoeBlock`, and `Qwen3NextSparseMoeBlock` for the shared expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from lockstep_runtime.distributed.communicator import Communicator
from lockstep_runtime.layers.collective_name import collective_name
from lockstep_runtime.layers.grouped_product import grouped_product, is_aligned
from lockstep_runtime.layers.matrix import matrix
from lockstep_runtime.layers.mlp import GatedMLP
from lockstep_runtime.layers.placement import Placement
from lockstep_runtime.layers.weight import PlainWeight
from lockstep_runtime.weights.sharding import RankInfo, TensorSlice, replicated, split_slice
from lockstep_runtime.weights.weight import Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeShape:
    hidden: int
    inner: int  # of each expert
    experts: int
    chosen: int  # experts for each token
    normalized: bool  # the shares of a token's experts add up to one
    shared_inner: int = 0  # of the expert that all tokens share; 0: there is none


class SparseMoe:
    """In an MLP's place. `prefix` is that of the block, such as `model.layers.3.mlp`."""

    def __init__(self, prefix: str, shape: MoeShape, shard: RankInfo, placement: Placement) -> None:
        self._router = Router(prefix, shape, placement)
        self._experts = choose_experts(f"{prefix}.experts", shape, shard, placement)
        self._shared = SharedExpert(prefix, shape, shard, placement) if shape.shared_inner else None
        self._place = collective_name(f"{prefix}.experts.down_proj")

    def weights(self) -> list[Weight]:
        shared = self._shared.weights() if self._shared else []
        return [*self._router.weights(), *shared, *self._experts.weights()]

    def __call__(self, x: Tensor, group: Communicator) -> Tensor:
        """x: [tokens, hidden], the same bits on every rank; so is what is returned."""
        y = self._experts(x, *self._router(x))
        if self._shared:
            y.add_(self._shared.part(x))
        return group.all_reduce(y, self._place)


class Router:
    """Which experts, and how much of each: every rank computes it, and comes to the same."""

    def __init__(self, prefix: str, shape: MoeShape, placement: Placement) -> None:
        self._weight = PlainWeight(
            replicated(f"{prefix}.gate.weight", shape.experts, shape.hidden), placement=placement
        )
        self._chosen, self._normalized = shape.chosen, shape.normalized

    def weights(self) -> list[Weight]:
        return [self._weight]

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: [tokens, hidden] -> the chosen experts' numbers and their shares, [tokens, chosen] each."""
        odds = F.linear(x, self._weight.data).softmax(dim=-1, dtype=torch.float32)
        shares, experts = odds.topk(self._chosen, dim=-1)
        if self._normalized:
            shares /= shares.sum(dim=-1, keepdim=True)
        return experts, shares.to(x.dtype)


class SharedExpert:
    """An MLP for every token, times a gate of one number a token."""

    def __init__(self, prefix: str, shape: MoeShape, shard: RankInfo, placement: Placement) -> None:
        self._mlp = GatedMLP(f"{prefix}.shared_expert", shape.hidden, shape.shared_inner, shard, placement)
        gate = replicated(f"{prefix}.shared_expert_gate.weight", 1, shape.hidden)
        self._gate = PlainWeight(gate, placement=placement)

    def weights(self) -> list[Weight]:
        return [self._gate, *self._mlp.weights()]

    def part(self, x: Tensor) -> Tensor:
        """This rank's summand, [tokens, hidden]."""
        return self._mlp.part(x).mul_(F.linear(x, self._gate.data).sigmoid_())


class Experts(Protocol):
    """How a rank multiplies by its part of the experts."""

    def weights(self) -> list[Weight]: ...

    def __call__(self, x: Tensor, experts: Tensor, shares: Tensor) -> Tensor:
        """x: [tokens, hidden], experts and shares: [tokens, chosen] -> this rank's summand, [tokens, hidden]."""


def choose_experts(prefix: str, shape: MoeShape, shard: RankInfo, placement: Placement) -> Experts:
    """On CPUs only those experts that are chosen; on GPUs in shapes that depend on no choice, so that nobody waits for
    the device and a step can be captured in a graph."""
    if placement.device.type == "cpu":
        return SingleExperts(prefix, shape, shard, placement)
    return StackedExperts(prefix, shape, shard, placement)


class SingleExperts:
    """Each expert's matrices are laid out for the CPU's kernel by themselves; a step goes from expert to expert."""

    def __init__(self, prefix: str, shape: MoeShape, shard: RankInfo, placement: Placement) -> None:
        each = [slices_of(prefix, number, shape, shard) for number in range(shape.experts)]
        self._gate_up = [matrix(gate, up, placement=placement) for gate, up, _ in each]
        self._down = [matrix(down, placement=placement) for _, _, down in each]

    def weights(self) -> list[Weight]:
        return [weight for pair in zip(self._gate_up, self._down, strict=True) for weight in pair]

    def __call__(self, x: Tensor, experts: Tensor, shares: Tensor) -> Tensor:
        order = experts.view(-1).argsort(stable=True)
        tokens, flat = order // experts.shape[1], shares.view(-1)[order][:, None]
        out, start = torch.zeros_like(x), 0
        for number, count in enumerate(experts.view(-1).bincount(minlength=len(self._down)).tolist()):
            if count:
                mine = slice(start, start + count)
                gate, up = self._gate_up[number](x.index_select(0, tokens[mine])).chunk(2, dim=-1)
                out.index_add_(0, tokens[mine], self._down[number](F.silu(gate).mul_(up).mul_(flat[mine])))
                start += count
        return out


class StackedExperts:
    """All experts' matrices in one tensor, multiplied by one grouped product; by each in turn where there is none."""

    def __init__(self, prefix: str, shape: MoeShape, shard: RankInfo, placement: Placement) -> None:
        each = [slices_of(prefix, number, shape, shard) for number in range(shape.experts)]
        pairs = (half for gate, up, _ in each for half in (gate, up))
        self._gate_up = PlainWeight(*pairs, placement=placement)
        self._down = PlainWeight(*(down for _, _, down in each), placement=placement)
        self._experts, self._hidden, self._inner = shape.experts, shape.hidden, each[0][0].rows
        aligned = all(is_aligned(size, placement.activation) for size in (shape.hidden, self._inner))
        self._multiply = self._grouped if placement.grouped and aligned else self._in_turn

    def weights(self) -> list[Weight]:
        return [self._gate_up, self._down]

    def __call__(self, x: Tensor, experts: Tensor, shares: Tensor) -> Tensor:
        return self._multiply(x, experts, shares)

    def _stacks(self) -> tuple[Tensor, Tensor]:
        """[experts, 2 · inner, hidden] and [experts, hidden, inner]."""
        gate_up = self._gate_up.data.view(self._experts, 2 * self._inner, self._hidden)
        return gate_up, self._down.data.view(self._experts, self._hidden, self._inner)

    def _grouped(self, x: Tensor, experts: Tensor, shares: Tensor) -> Tensor:
        """Every token once for each of its experts, in the experts' order."""
        gate_up, down = self._stacks()
        flat = experts.view(-1)
        order = flat.argsort(stable=True)
        counts = flat.new_zeros(self._experts).scatter_add_(0, flat, torch.ones_like(flat))  # bincount waits
        ends = counts.cumsum(0, dtype=torch.int32)
        rows = x.index_select(0, order // experts.shape[1])
        gate, up = grouped_product(rows, gate_up, ends).chunk(2, dim=-1)
        found = grouped_product(F.silu(gate).mul_(up), down, ends)
        back = torch.empty_like(found).index_copy_(0, order, found)
        return back.view(*experts.shape, -1).mul_(shares[..., None]).sum(1)

    def _in_turn(self, x: Tensor, experts: Tensor, shares: Tensor) -> Tensor:
        """Every token by every expert, most of them with a share of nothing."""
        all_shares = x.new_zeros(len(x), self._experts).scatter_(1, experts, shares)
        out = torch.zeros_like(x)
        for gate_up, down, share in zip(*self._stacks(), all_shares.unbind(1), strict=True):
            gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
            out.add_(F.linear(F.silu(gate).mul_(up).mul_(share[:, None]), down))
        return out


def slices_of(
    prefix: str, number: int, shape: MoeShape, shard: RankInfo
) -> tuple[TensorSlice, TensorSlice, TensorSlice]:
    """A rank's parts of one expert's gate, up and down matrices, from a checkpoint that has the experts one by one, or
    stacked: `gate_up_proj` [experts, 2 · inner, hidden] and `down_proj` [experts, hidden, inner]."""
    hidden, inner = shape.hidden, shape.inner

    def half(name: str, part: tuple[int, int]) -> TensorSlice:
        packed = (shape.experts, 2 * inner, hidden)
        stacked = split_slice(f"{prefix}.gate_up_proj", *packed, shard=shard, part=part, index=number)
        return split_slice(f"{prefix}.{number}.{name}.weight", inner, hidden, shard=shard, otherwise=stacked)

    stacked = split_slice(f"{prefix}.down_proj", shape.experts, hidden, inner, shard=shard, dim=1, index=number)
    down = split_slice(f"{prefix}.{number}.down_proj.weight", hidden, inner, shard=shard, dim=1, otherwise=stacked)
    return half("gate_proj", (0, inner)), half("up_proj", (inner, 2 * inner)), down
