"""Gated DeltaNet (https://arxiv.org/abs/2412.06464) as Qwen3-Next and Qwen3.5 have it: attention whose memory does not
grow with the text. Split over ranks by key heads, each with the value heads that share it.

What a sequence's past leaves behind is the last inputs of a convolution and one matrix per value head.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from lockstep_runtime.distributed.communicator import Communicator
from lockstep_runtime.layers.batch import Batch
from lockstep_runtime.layers.cache import StateCache, StatePart, StateShape
from lockstep_runtime.layers.causal_conv import ConvPlan, convolve, plan_conv
from lockstep_runtime.layers.delta_rule import Inputs
from lockstep_runtime.layers.delta_rule_kernels import DeltaRule, choose_rule
from lockstep_runtime.layers.linear import ColumnLinear, RowLinear
from lockstep_runtime.layers.native_delta_rule import native_step
from lockstep_runtime.layers.norm import rms_normalize
from lockstep_runtime.layers.placement import Placement
from lockstep_runtime.layers.rotary import Rotation
from lockstep_runtime.layers.weight import PlainWeight
from lockstep_runtime.weights.sharding import RankInfo, TensorSlice, head_slice, replicated
from lockstep_runtime.weights.weight import Weight

INPUTS: Final = "inputs"  # what a state is made of
MATRICES: Final = "matrices"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaNetShape:
    """Of the whole model, or of one rank."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int  # of the convolution

    @property
    def keys(self) -> int:
        """Columns of all keys, and of all queries."""
        return self.key_heads * self.key_dim

    @property
    def values(self) -> int:
        return self.value_heads * self.value_dim

    @property
    def channels(self) -> int:
        """What is convolved: queries, keys, values."""
        return 2 * self.keys + self.values

    def on(self, shard: RankInfo) -> DeltaNetShape:
        """A rank's part; `shard.size` divides the key heads."""
        return DeltaNetShape(
            key_heads=self.key_heads // shard.size,
            value_heads=self.value_heads // shard.size,
            key_dim=self.key_dim,
            value_dim=self.value_dim,
            kernel=self.kernel,
        )

    def state(self, activation: torch.dtype) -> StateShape:
        """Of one sequence, in one layer."""
        inputs = (self.kernel - 1, self.channels)
        matrices = (self.value_heads, self.value_dim, self.key_dim)
        return StateShape(
            parts=(
                StatePart(name=INPUTS, shape=inputs, dtype=str(activation).removeprefix("torch.")),
                StatePart(name=MATRICES, shape=matrices, dtype="float32"),
            )
        )


def convolved_slices(tensor: str, shape: DeltaNetShape, *rest: int, shard: RankInfo) -> tuple[TensorSlice, ...]:
    """A rank's rows of a tensor whose rows are all queries, then all keys, then all values: cut part by part, since one
    cut through the whole would give a rank the queries and another the values. `rest`: the other dimensions."""
    keys, values = shape.key_heads, shape.value_heads
    ends = (0, shape.keys, 2 * shape.keys, shape.channels)
    return tuple(
        head_slice(tensor, shape.channels, *rest, count=count, shard=shard, part=part)
        for count, part in zip((keys, keys, values), itertools.pairwise(ends), strict=True)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaNetPlan:
    """Of one step, the same for every layer of a model."""

    reads: Tensor  # [sequences], slots
    writes: Tensor
    conv: ConvPlan | None
    rule: Any  # as the rule planned it


class DeltaNetPlanner:
    """Chooses how the rule is computed, and plans each step once for all layers."""

    def __init__(self, shape: DeltaNetShape, placement: Placement) -> None:
        self._kernel, self._device = shape.kernel, placement.device
        self.rule: DeltaRule = choose_rule(placement.device, placement.activation, shape.key_dim, shape.value_dim)
        self._step = native_step() if placement.device.type == "cpu" else None
        self._planned: tuple[Batch, DeltaNetPlan] | None = None

    def plan(self, batch: Batch) -> DeltaNetPlan:
        if self._planned is None or self._planned[0] is not batch:
            self._planned = batch, self._plan(batch)
        return self._planned[1]

    def advance(self, inputs: Inputs, cache: StateCache, plan: DeltaNetPlan) -> Tensor:
        """Every state to the slot that the plan says; returns the answers, [tokens, value_heads, value_dim]."""
        if plan.conv is None and self._step is not None:  # one token of each
            return self._step(inputs, cache.parts[MATRICES], plan.reads, plan.writes)
        states = cache.read(MATRICES, plan.reads)
        answers = self.rule.advance_(inputs, states, plan.rule)
        cache.write(MATRICES, plan.writes, states)
        return answers

    def _plan(self, batch: Batch) -> DeltaNetPlan:
        lengths: Sequence[int] = [segment.stop - segment.start for segment in batch.segments]
        return DeltaNetPlan(
            reads=batch.state_reads,
            writes=batch.state_writes,
            conv=plan_conv(lengths, self._kernel, self._device),
            rule=self.rule.plan(lengths, self._device),
        )


class DeltaNet:
    """One layer's attention: `inputs` are the slices of its first matrix, whose rows are a rank's queries, keys and
    values, then its output gates (as wide as values), then beta and decay of each of its value heads."""

    def __init__(
        self, prefix: str, hidden: int, epsilon: float, inputs: tuple[TensorSlice, ...], *, shape: DeltaNetShape,
        shard: RankInfo, placement: Placement, planner: DeltaNetPlanner,
    ) -> None:  # fmt: skip
        self._shape, self._epsilon, self._planner = shape.on(shard), epsilon, planner
        self.memory = self._shape.state(placement.activation)
        self._activation = placement.activation
        heads = shape.value_heads
        self._in = ColumnLinear(*inputs, placement=placement)
        self._conv = PlainWeight(
            *convolved_slices(f"{prefix}.conv1d.weight", shape, 1, shape.kernel, shard=shard),
            placement=placement,
            dtype=torch.float32,
        )
        self._rate, self._bias, self._norm = (
            PlainWeight(tensor_slice, placement=placement, dtype=torch.float32)
            for tensor_slice in (
                head_slice(f"{prefix}.A_log", heads, count=heads, shard=shard),
                head_slice(f"{prefix}.dt_bias", heads, count=heads, shard=shard),
                replicated(f"{prefix}.norm.weight", shape.value_dim),
            )
        )
        self._out = RowLinear(
            head_slice(f"{prefix}.out_proj.weight", hidden, shape.values, count=heads, shard=shard, dim=1),
            placement=placement,
        )
        self._taps: Tensor  # [kernel, channels]: the convolution's weight, turned
        self._slope: Tensor  # [value_heads]: how fast each decays

    def weights(self) -> list[Weight]:
        return [self._rate, self._bias, self._norm, self._conv, *self._in.weights(), *self._out.weights()]

    def loaded(self) -> None:
        self._taps = self._conv.data[:, 0].t().contiguous()
        self._slope = -self._rate.data.exp()

    def __call__(self, x: Tensor, cache: StateCache, batch: Batch, rotation: Rotation, group: Communicator) -> Tensor:
        """x: [tokens, hidden] -> the same. Nothing is rotated."""
        shape, tokens, plan = self._shape, x.shape[0], self._planner.plan(batch)
        sizes = [shape.channels, shape.values, shape.value_heads, shape.value_heads]
        convolved, gate, beta, decay = torch.split(self._in(x), sizes, 1)
        mixed, remembered = convolve(convolved, cache.read(INPUTS, plan.reads), self._taps, plan.conv)
        cache.write(INPUTS, plan.writes, remembered)
        queries, keys, values = torch.split(F.silu(mixed), [shape.keys, shape.keys, shape.values], 1)
        inputs = Inputs(
            queries=queries.view(tokens, shape.key_heads, -1),
            keys=keys.view(tokens, shape.key_heads, -1),
            values=values.view(tokens, shape.value_heads, -1),
            decay=F.softplus(decay.float() + self._bias.data).mul_(self._slope),
            beta=beta.float().sigmoid_(),
        )
        answers = self._planner.advance(inputs, cache, plan)
        gated = rms_normalize(answers, self._epsilon, self._norm.data).mul_(F.silu(gate.float()).view_as(answers))
        return self._out(gated.view(tokens, -1).to(self._activation), group)
