"""Qwen3, dense (https://arxiv.org/abs/2505.09388); the oracle is transformers' `Qwen3ForCausalLM`.

Split over ranks as Megatron does: attention by heads, the MLP by columns then rows, the vocabulary by rows. Two
all-reduces per layer, one for the embedding, one gather for the logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Final

import msgspec
import torch
from torch import Tensor

from lockstep_runtime.distributed.communicator import Communicator
from lockstep_runtime.layers.batch import Batch
from lockstep_runtime.layers.cache import CacheShape, KVCache, LayerCache, PagedShape
from lockstep_runtime.layers.embedding import VocabularyEmbedding, VocabularyHead
from lockstep_runtime.layers.linear import ColumnLinear, RowLinear
from lockstep_runtime.layers.mlp import GatedMLP
from lockstep_runtime.layers.norm import RMSNorm, rms_normalize
from lockstep_runtime.layers.placement import Placement
from lockstep_runtime.layers.rotary import build_rotary, rotate_
from lockstep_runtime.layers.weight import PlainWeight
from lockstep_runtime.protocol.bus import LoadFailure
from lockstep_runtime.sources.errors import ModelError
from lockstep_runtime.sources.model_config import max_length, rope_parameters
from lockstep_runtime.weights.sharding import (
    RankInfo,
    head_range,
    head_slice,
    replicated,
    tensor_parallel_sizes,
)
from lockstep_runtime.weights.weight import StoredTable, Weight

Count = Annotated[int, msgspec.Meta(ge=1)]
_DERIVED: Final = {"rope", "max_length"}
MAX_POSITIONS: Final = 32768  # where config.json is silent


class Qwen3Config(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of config.json that matter here, with transformers' defaults."""

    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Count
    num_attention_heads: Count
    num_key_value_heads: Count | None = 32
    vocab_size: Count
    head_dim: Count = 128
    rms_norm_eps: float = 1e-6
    max_position_embeddings: Count = MAX_POSITIONS
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    hidden_act: str = "silu"
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    max_window_layers: int = 28
    layer_types: list[str] | None = None
    rope: dict[str, Any]  # as `rope_parameters` found it
    max_length: int  # with what the rope's scaling adds

    @property
    def kv_heads(self) -> int:
        return self.num_attention_heads if self.num_key_value_heads is None else self.num_key_value_heads

    @property
    def slides(self) -> bool:
        """Whether any layer sees a window only."""
        if self.layer_types is not None:
            return any(kind != "full_attention" for kind in self.layer_types)
        return (
            self.use_sliding_window
            and self.sliding_window is not None
            and (self.max_window_layers < self.num_hidden_layers)
        )


def read_settings(raw: Mapping[str, Any]) -> Qwen3Config:
    """
    Raises:
        ModelError: a setting is missing, malformed or not supported.
    """
    nullable = {"num_key_value_heads", "sliding_window", "layer_types"}
    known = {name: raw[name] for name in Qwen3Config.__struct_fields__ if name in raw and name not in _DERIVED}
    given = {name: value for name, value in known.items() if value is not None or name in nullable}
    placed = {**raw, "max_position_embeddings": given.get("max_position_embeddings", MAX_POSITIONS)}
    rope, length = rope_parameters(placed), max_length(placed, {})
    try:
        return msgspec.convert({**given, "rope": rope, "max_length": length}, Qwen3Config)
    except msgspec.ValidationError as error:
        raise ModelError(f"config.json: {error}", kind=LoadFailure.PERMANENT) from None


class Qwen3:
    """One rank's part of the model."""

    def __init__(self, config: Qwen3Config, shard: RankInfo, placement: Placement) -> None:
        _check(config, shard)
        self._config, self._placement = config, placement
        vocabulary = (config.vocab_size, config.hidden_size, shard, placement)
        tied = config.tie_word_embeddings
        self._share = tied and placement.kernel is None  # one tensor for both; a packed one can't be looked up
        self._embedding = VocabularyEmbedding("model.embed_tokens.weight", *vocabulary, stored=tied and not self._share)
        self._layers = [Layer(config, index, shard, placement) for index in range(config.num_hidden_layers)]
        self._norm = RMSNorm(replicated("model.norm.weight", config.hidden_size), config.rms_norm_eps, placement)
        self._head = VocabularyHead("model.embed_tokens.weight" if tied else "lm_head.weight", *vocabulary)
        rotary = build_rotary(config.head_dim, config.rope, config.max_position_embeddings)
        self._rotary = rotary.on(placement.device)
        self.vocabulary = config.vocab_size
        self.max_positions = config.max_length
        first, last = head_range(config.kv_heads, shard)
        sharing = config.num_attention_heads // shard.size // (last - first)
        paged = PagedShape(kv_heads=last - first, head_dim=config.head_dim, sharing=sharing)
        self.cache_shape = CacheShape(layers=(paged,) * config.num_hidden_layers)

    @classmethod
    def build(cls, raw: Mapping[str, Any], shard: RankInfo, placement: Placement) -> Qwen3:
        return cls(read_settings(raw), shard, placement)

    def weights(self) -> Iterator[Weight | StoredTable]:
        yield from self._embedding.weights()
        for layer in self._layers:
            yield from layer.weights()
        yield self._norm.weight
        if not self._share:
            yield from self._head.weights()

    def loaded(self) -> None:
        if self._share:
            self._head.tie(self._embedding)
        for layer in self._layers:
            layer.loaded()

    def forward(self, batch: Batch, cache: KVCache, group: Communicator) -> Tensor:
        cos, sin = self._rotary.table(batch.positions, self._placement.activation)
        hidden = self._embedding(batch.tokens, group)
        for layer, layer_cache in zip(self._layers, cache.paged, strict=True):
            hidden = layer(hidden, layer_cache, batch, cos, sin, group)
        return self._norm(hidden)

    def logits(self, hidden: Tensor, group: Communicator) -> Tensor | None:
        return self._head(hidden, group)

    def best(self, hidden: Tensor, group: Communicator) -> tuple[Tensor, Tensor] | None:
        return self._head.best(hidden, group)


class Layer:
    """Attention, then MLP, each normed before and added to what came in."""

    def __init__(self, config: Qwen3Config, index: int, shard: RankInfo, placement: Placement) -> None:
        prefix = f"model.layers.{index}"
        norm = (config.rms_norm_eps, placement)
        self._input_norm = RMSNorm(replicated(f"{prefix}.input_layernorm.weight", config.hidden_size), *norm)
        self._attention = Attention(config, f"{prefix}.self_attn", shard, placement)
        self._post_norm = RMSNorm(replicated(f"{prefix}.post_attention_layernorm.weight", config.hidden_size), *norm)
        self._mlp = GatedMLP(f"{prefix}.mlp", config.hidden_size, config.intermediate_size, shard, placement)

    def weights(self) -> list[Weight]:
        norms = [self._input_norm.weight, self._post_norm.weight]
        return [*norms, *self._attention.weights(), *self._mlp.weights()]

    def loaded(self) -> None:
        self._attention.loaded()

    def __call__(
        self, hidden: Tensor, cache: LayerCache, batch: Batch, cos: Tensor, sin: Tensor, group: Communicator
    ) -> Tensor:
        hidden.add_(self._attention(self._input_norm(hidden), cache, batch, cos, sin, group))
        return hidden.add_(self._mlp(self._post_norm(hidden), group))


class Attention:
    """Grouped-query attention; every head of q and k is normed before it is rotated."""

    def __init__(self, config: Qwen3Config, prefix: str, shard: RankInfo, placement: Placement) -> None:
        hidden, width = config.hidden_size, config.head_dim
        counts = {"q": config.num_attention_heads, "k": config.kv_heads, "v": config.kv_heads}
        bias = config.attention_bias
        self._qkv = ColumnLinear(
            *(
                head_slice(f"{prefix}.{n}_proj.weight", c * width, hidden, count=c, shard=shard)
                for n, c in counts.items()
            ),
            bias=tuple(
                head_slice(f"{prefix}.{n}_proj.bias", c * width, count=c, shard=shard) for n, c in counts.items()
            )
            if bias
            else (),
            placement=placement,
        )
        self._out = RowLinear(
            head_slice(f"{prefix}.o_proj.weight", hidden, counts["q"] * width, count=counts["q"], shard=shard, dim=1),
            replicated(f"{prefix}.o_proj.bias", hidden) if bias else None,
            placement=placement,
        )
        self._q_norm = PlainWeight(replicated(f"{prefix}.q_norm.weight", width), placement=placement)
        self._k_norm = PlainWeight(replicated(f"{prefix}.k_norm.weight", width), placement=placement)
        self._epsilon = config.rms_norm_eps
        first, last = head_range(counts["k"], shard)
        self._q_heads, self._kv_heads, self._width = counts["q"] // shard.size, last - first, width
        self._norms: Tensor  # [q heads + kv heads, head_dim]: both norms' weights, to apply them in one product

    def weights(self) -> list[Weight]:
        return [self._q_norm, self._k_norm, *self._qkv.weights(), *self._out.weights()]

    def loaded(self) -> None:
        q, k = self._q_norm.data, self._k_norm.data
        self._norms = torch.cat((q.expand(self._q_heads, -1), k.expand(self._kv_heads, -1)))

    def __call__(
        self, x: Tensor, cache: LayerCache, batch: Batch, cos: Tensor, sin: Tensor, group: Communicator
    ) -> Tensor:
        qkv = self._qkv(x).view(x.shape[0], -1, self._width)
        normed = self._q_heads + self._kv_heads
        turned = rotate_(rms_normalize(qkv[:, :normed], self._epsilon, self._norms), cos, sin)
        cache.write(batch.slots, turned[:, self._q_heads :], qkv[:, normed:])
        return self._out(batch.attend(turned[:, : self._q_heads], cache), group)


def _check(config: Qwen3Config, shard: RankInfo) -> None:
    if config.hidden_act != "silu":
        raise ModelError(f"config.json: hidden_act is {config.hidden_act}; Qwen3 is supported with silu")
    if config.slides:
        raise ModelError("config.json asks for sliding windows, and Lockstep has full attention only")
    if config.num_attention_heads % config.kv_heads:
        raise ModelError(
            f"config.json: {config.num_attention_heads} attention heads can't share {config.kv_heads} kv heads"
        )
    sizes = tensor_parallel_sizes(config.num_attention_heads, config.kv_heads)
    if shard.size not in sizes:
        raise ModelError(
            f"a model with {config.num_attention_heads} attention heads and {config.kv_heads} kv heads "
            f"can't be split over {shard.size} ranks; it can over {', '.join(map(str, sizes))}"
        )
