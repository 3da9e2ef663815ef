"""The vision tower of Qwen3-VL and Qwen3.5; the oracle is transformers' `Qwen3_5VisionModel`.

Attention is split over ranks by heads, MLP and merger by columns then rows, as in the language model: the tower of a
model that needs several ranks takes about a gigabyte, and the image a user waits for is computed by all of them. Where
the heads can't be shared out evenly, every rank computes all of them. Patch and position embeddings are too small to be
worth an exchange.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Final

import msgspec
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from lockstep_runtime.distributed.communicator import Communicator
from lockstep_runtime.layers.image_patches import grid_of, interpolation, normalised, patchify
from lockstep_runtime.layers.linear import ColumnLinear, RowLinear
from lockstep_runtime.layers.placement import Placement
from lockstep_runtime.layers.rotary import rotate_
from lockstep_runtime.layers.weight import PlainWeight
from lockstep_runtime.protocol.bus import LoadFailure
from lockstep_runtime.sources.errors import ModelError
from lockstep_runtime.sources.image_processor import ImageProcessor
from lockstep_runtime.weights.sharding import RankInfo, TensorSlice, even_range, replicated, split_slice
from lockstep_runtime.weights.weight import Weight

Count = Annotated[int, msgspec.Meta(ge=1)]
EPSILON: Final = 1e-6  # of its layer norms
THETA: Final = 10_000.0  # of its rotary positions, where config.json names no other
_ACTIVATIONS: Final = {"gelu_pytorch_tanh": "tanh", "gelu": "none"}


class VisionConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of config.json's vision_config that matter here, with transformers' defaults."""

    depth: Count = 27
    hidden_size: Count = 1152
    hidden_act: str = "gelu_pytorch_tanh"
    intermediate_size: Count = 4304
    num_heads: Count = 16
    in_channels: int = 3
    out_hidden_size: Count = 3584
    num_position_embeddings: Count = 2304
    deepstack_visual_indexes: list[int] = []
    rope_parameters: dict[str, Any] | None = None

    @property
    def side(self) -> int:
        """Of the square of position embeddings."""
        return math.isqrt(self.num_position_embeddings)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


def read_vision_config(raw: Mapping[str, Any]) -> VisionConfig:
    """
    Raises:
        ModelError: a setting is malformed or not supported.
    """
    known = {name: raw[name] for name in VisionConfig.__struct_fields__ if raw.get(name) is not None}
    try:
        config = msgspec.convert(known, VisionConfig)
    except msgspec.ValidationError as error:
        raise _wrong(str(error)) from None
    if config.hidden_act not in _ACTIVATIONS:
        raise _wrong(f"hidden_act is {config.hidden_act}; supported are {', '.join(_ACTIVATIONS)}")
    if config.deepstack_visual_indexes or config.in_channels != 3:
        raise _wrong("it feeds several layers of the language model, or takes other images than RGB: not supported")
    if config.hidden_size % config.num_heads or config.head_dim % 4:
        raise _wrong(f"hidden_size {config.hidden_size} can't be {config.num_heads} heads of a multiple of 4 each")
    return config


class VisionTower:
    """One rank's part."""

    def __init__(
        self, config: VisionConfig, prefix: str, processor: ImageProcessor, shard: RankInfo, placement: Placement
    ) -> None:
        self.processor, self._config, self._placement = processor, config, placement
        hidden = config.hidden_size
        kernel = (3, processor.frames, processor.patch, processor.patch)
        embed = f"{prefix}.patch_embed.proj"
        self._embed = PlainWeight(replicated(f"{embed}.weight", hidden, *kernel), placement=placement)
        self._embed_bias = PlainWeight(replicated(f"{embed}.bias", hidden), placement=placement)
        positions = replicated(f"{prefix}.pos_embed.weight", config.num_position_embeddings, hidden)
        self._positions = PlainWeight(positions, placement=placement)
        self._blocks = [Block(config, f"{prefix}.blocks.{index}", shard, placement) for index in range(config.depth)]
        self._merger = Merger(config, f"{prefix}.merger", processor.merge**2, shard, placement)
        self._table = normalised(processor).to(placement.device)
        self._frequencies = _frequencies(config).to(placement.device)

    def weights(self) -> Iterator[Weight]:
        yield from (self._embed, self._embed_bias, self._positions)
        for block in self._blocks:
            yield from block.weights()
        yield from self._merger.weights()

    def tokens_of(self, height: int, width: int) -> int:
        """How many an image of this size becomes.

        Raises:
            ValueError: it can't be encoded.
        """
        return grid_of(height, width, self.processor).tokens

    def encode(self, pixels: Tensor, group: Communicator) -> Tensor:
        """pixels: [height, width, 3], uint8 -> [tokens, the language model's hidden size], the same on every rank."""
        grid, placed = grid_of(pixels.shape[0], pixels.shape[1], self.processor), pixels.to(self._placement.device)
        patches = patchify(placed, grid, self._table, self.processor).to(self._placement.activation)
        hidden = F.linear(patches, self._embed.data.view(len(self._embed.data), -1), self._embed_bias.data)
        indices, weights = interpolation(grid, self._config.side, placed.device)
        corners = self._positions.data[indices] * weights[:, :, None]
        hidden += corners.sum(1).to(hidden.dtype)
        turns = self._turns(grid.positions(placed.device))
        for block in self._blocks:
            hidden = block(hidden, turns, group)
        return self._merger(hidden, group)

    def _turns(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions: [2, patches] -> cos and signed sin as `rotate_` wants them, in float32: the first half of a half
        head turns with the row, the second with the column."""
        angles = (positions.float()[:, :, None] * self._frequencies).transpose(0, 1).flatten(1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]


def _frequencies(config: VisionConfig) -> Tensor:
    """[head_dim / 4]"""
    width = config.head_dim // 2
    theta = float((config.rope_parameters or {}).get("rope_theta", THETA))
    return 1.0 / theta ** (torch.arange(0, width, 2).float() / width)


class Norm:
    """A layer norm with a bias."""

    def __init__(self, prefix: str, width: int, placement: Placement) -> None:
        self._weight = PlainWeight(replicated(f"{prefix}.weight", width), placement=placement)
        self._bias = PlainWeight(replicated(f"{prefix}.bias", width), placement=placement)

    def weights(self) -> list[Weight]:
        return [self._weight, self._bias]

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self._weight.data, self._bias.data, EPSILON)


class Block:
    """Attention within the image, then MLP, each normed before and added to what came in."""

    def __init__(self, config: VisionConfig, prefix: str, shard: RankInfo, placement: Placement) -> None:
        hidden = config.hidden_size
        self._attention_norm = Norm(f"{prefix}.norm1", hidden, placement)
        self._attention = Attention(config, f"{prefix}.attn", shard, placement)
        self._mlp_norm = Norm(f"{prefix}.norm2", hidden, placement)
        self._mlp = TwoLayers(
            f"{prefix}.mlp",
            (hidden, config.intermediate_size, hidden),
            _ACTIVATIONS[config.hidden_act],
            shard,
            placement,
        )

    def weights(self) -> list[Weight]:
        parts = (self._attention_norm, self._attention, self._mlp_norm, self._mlp)
        return [weight for part in parts for weight in part.weights()]

    def __call__(self, hidden: Tensor, turns: tuple[Tensor, Tensor], group: Communicator) -> Tensor:
        hidden = hidden + self._attention(self._attention_norm(hidden), turns, group)
        return hidden + self._mlp(self._mlp_norm(hidden), group)


class Attention:
    """Every patch sees every other of its image."""

    def __init__(self, config: VisionConfig, prefix: str, shard: RankInfo, placement: Placement) -> None:
        hidden, self._width = config.hidden_size, config.head_dim
        self._is_split = config.num_heads % shard.size == 0
        mine = shard if self._is_split else RankInfo(0, 1)
        first, last = (head * self._width for head in even_range(config.num_heads, mine))
        parts = [(hidden * part + first, hidden * part + last) for part in range(3)]  # queries | keys | values
        weight, bias = f"{prefix}.qkv.weight", f"{prefix}.qkv.bias"
        self._qkv = ColumnLinear(
            *(TensorSlice(tensor=weight, shape=(3 * hidden, hidden), start=start, stop=stop) for start, stop in parts),
            bias=tuple(TensorSlice(tensor=bias, shape=(3 * hidden,), start=start, stop=stop) for start, stop in parts),
            placement=placement,
        )
        self._out = RowLinear(
            TensorSlice(tensor=f"{prefix}.proj.weight", shape=(hidden, hidden), dim=1, start=first, stop=last),
            replicated(f"{prefix}.proj.bias", hidden),
            placement=placement,
        )

    def weights(self) -> list[Weight]:
        return [*self._qkv.weights(), *self._out.weights()]

    def __call__(self, x: Tensor, turns: tuple[Tensor, Tensor], group: Communicator) -> Tensor:
        queries, keys, values = self._qkv(x).view(len(x), 3, -1, self._width).unbind(1)
        queries, keys = (rotate_(one.float(), *turns).to(x.dtype) for one in (queries, keys))
        queries, keys, values = (one.transpose(0, 1)[None] for one in (queries, keys, values))
        seen = F.scaled_dot_product_attention(queries, keys, values)[0].transpose(0, 1).reshape(len(x), -1)
        return self._out(seen, group) if self._is_split else self._out.alone(seen)


class TwoLayers:
    """Wide, activation, narrow; both with a bias."""

    def __init__(
        self, prefix: str, widths: tuple[int, int, int], gelu: str, shard: RankInfo, placement: Placement
    ) -> None:
        first, middle, last = widths
        self._gelu = gelu
        self._wide = ColumnLinear(
            split_slice(f"{prefix}.linear_fc1.weight", middle, first, shard=shard),
            bias=(split_slice(f"{prefix}.linear_fc1.bias", middle, shard=shard),),
            placement=placement,
        )
        self._narrow = RowLinear(
            split_slice(f"{prefix}.linear_fc2.weight", last, middle, shard=shard, dim=1),
            replicated(f"{prefix}.linear_fc2.bias", last),
            placement=placement,
        )

    def weights(self) -> list[Weight]:
        return [*self._wide.weights(), *self._narrow.weights()]

    def __call__(self, x: Tensor, group: Communicator) -> Tensor:
        return self._narrow(F.gelu(self._wide(x), approximate=self._gelu), group)


class Merger:
    """A block of patches becomes one token of the language model."""

    def __init__(self, config: VisionConfig, prefix: str, block: int, shard: RankInfo, placement: Placement) -> None:
        width = self._width = config.hidden_size * block
        self._norm = Norm(f"{prefix}.norm", config.hidden_size, placement)
        self._layers = TwoLayers(prefix, (width, width, config.out_hidden_size), "none", shard, placement)

    def weights(self) -> list[Weight]:
        return [*self._norm.weights(), *self._layers.weights()]

    def __call__(self, hidden: Tensor, group: Communicator) -> Tensor:
        return self._layers(self._norm(hidden).view(-1, self._width), group)


def _wrong(message: str) -> ModelError:
    return ModelError(f"config.json: vision_config: {message}", kind=LoadFailure.PERMANENT)
