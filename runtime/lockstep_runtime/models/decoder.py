"""A decoder-only model: embedding, layers, norm, head. An architecture says what its layers are made of.

Split over ranks as Megatron does (https://arxiv.org/abs/1909.08053): attention by heads, the MLP by columns then rows,
the vocabulary by rows. Two all-reduces per layer, one for the embedding, one gather for the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Generic, Protocol, TypeVar

from torch import Tensor

from lockstep_runtime.distributed.communicator import Communicator
from lockstep_runtime.layers.batch import Batch
from lockstep_runtime.layers.cache import CacheShape, KVCache, LayerCache, LayerMemory, StateCache
from lockstep_runtime.layers.embedding import VocabularyEmbedding, VocabularyHead
from lockstep_runtime.layers.grouped_query import AttentionShape, GroupedQueryAttention
from lockstep_runtime.layers.mlp import GatedMLP
from lockstep_runtime.layers.norm import RMSNorm
from lockstep_runtime.layers.placement import Placement
from lockstep_runtime.layers.rotary import Rotation, build_rotary
from lockstep_runtime.layers.vision import VisionTower
from lockstep_runtime.models.settings import Settings
from lockstep_runtime.weights.sharding import RankInfo, replicated
from lockstep_runtime.weights.weight import StoredTable, Weight

SECTIONS: Final = (11, 11, 10)  # of a rotation for images, where config.json is silent
Cache = TypeVar("Cache", bound=LayerCache | StateCache, contravariant=True)


class Mixer(Protocol[Cache]):
    """Lets tokens see those before them: attention, or a recurrence."""

    @property
    def memory(self) -> LayerMemory:
        """What it remembers of them; `cache` is laid out so."""

    def weights(self) -> list[Weight]: ...

    def loaded(self) -> None:
        """All weights have been filled."""

    def __call__(self, x: Tensor, cache: Cache, batch: Batch, rotation: Rotation, group: Communicator) -> Tensor: ...


class FeedForward(Protocol):
    """Works on every token by itself."""

    def weights(self) -> list[Weight]: ...

    def __call__(self, x: Tensor, group: Communicator) -> Tensor: ...


class Norm(Protocol):
    @property
    def weight(self) -> Weight: ...

    def __call__(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """Mixer, then MLP, each normed before and added to what came in."""

    input_norm: Norm
    mixer: Mixer[Any]
    post_norm: Norm
    mlp: FeedForward

    def weights(self) -> list[Weight]:
        norms = [self.input_norm.weight, self.post_norm.weight]
        return [*norms, *self.mixer.weights(), *self.mlp.weights()]

    def __call__(
        self, hidden: Tensor, cache: LayerCache | StateCache, batch: Batch, rotation: Rotation, group: Communicator
    ) -> Tensor:
        hidden.add_(self.mixer(self.input_norm(hidden), cache, batch, rotation, group))
        return hidden.add_(self.mlp(self.post_norm(hidden), group))


@dataclass(frozen=True, slots=True)
class Parts(Generic[Settings]):
    """Makes what most architectures' layers are made of, by the names that most checkpoints have."""

    settings: Settings
    shard: RankInfo
    placement: Placement

    def norm(self, name: str) -> RMSNorm:
        tensor = replicated(f"{name}.weight", self.settings.hidden_size)
        return RMSNorm(tensor, self.settings.rms_norm_eps, self.placement)

    def attention(
        self, prefix: str, *, bias: bool = False, out_bias: bool = False, head_norms: bool = False
    ) -> GroupedQueryAttention:
        settings = self.settings
        shape = AttentionShape(
            hidden=settings.hidden_size, heads=settings.num_attention_heads, kv_heads=settings.kv_heads,
            head_dim=settings.width, bias=bias, out_bias=out_bias,
            norm_epsilon=settings.rms_norm_eps if head_norms else None,
        )  # fmt: skip
        return GroupedQueryAttention(f"{prefix}.self_attn", shape, self.shard, self.placement)

    def mlp(self, prefix: str, *, bias: bool = False) -> GatedMLP:
        settings = self.settings
        sizes = (settings.hidden_size, settings.intermediate_size)
        return GatedMLP(f"{prefix}.mlp", *sizes, self.shard, self.placement, bias=bias)

    def layer(self, prefix: str, mixer: Mixer[Any], mlp: FeedForward) -> DecoderLayer:
        return DecoderLayer(
            self.norm(f"{prefix}.input_layernorm"), mixer, self.norm(f"{prefix}.post_attention_layernorm"), mlp
        )


class Decoder:
    """One rank's part of a model."""

    def __init__(
        self, parts: Parts[Settings], layer: Callable[[int, str], DecoderLayer], norm: Norm | None = None,
        prefix: str = "model", vision: VisionTower | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            layer: makes the layer of a number, whose tensors' names begin with the prefix that is given.
            norm: the last one, if it is no plain RMSNorm.
            prefix: of the decoder's tensors, but the head's.
            vision: makes tokens of images, whose positions are of three kinds.
        """
        settings, placement = parts.settings, parts.placement
        vocabulary = (settings.vocab_size, settings.hidden_size, parts.shard, placement)
        tied, table = settings.tie_word_embeddings, f"{prefix}.embed_tokens.weight"
        self._share = tied and placement.kernel is None  # one tensor for both; a packed one can't be looked up
        self._embedding = VocabularyEmbedding(table, *vocabulary, stored=tied and not self._share)
        self._layers = [layer(number, f"{prefix}.layers.{number}") for number in range(settings.num_hidden_layers)]
        self._norm = norm or parts.norm(f"{prefix}.norm")
        self._head = VocabularyHead(table if tied else "lm_head.weight", *vocabulary)
        rotary = build_rotary(settings.rotated, settings.rope, settings.max_position_embeddings)
        if vision is not None:
            rotary = rotary.interleaved(settings.rope.get("mrope_section") or SECTIONS)
        self.vision = vision
        self._rotary, self._activation = rotary.on(placement.device), placement.activation
        self.vocabulary = settings.vocab_size
        self.max_positions = settings.max_length
        self.cache_shape = CacheShape(layers=tuple(layer.mixer.memory for layer in self._layers))

    def weights(self) -> Iterator[Weight | StoredTable]:
        if self.vision is not None:
            yield from self.vision.weights()
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
            layer.mixer.loaded()

    def forward(self, batch: Batch, cache: KVCache, group: Communicator) -> Tensor:
        rotation = self._rotary.table(batch.turns, self._activation)
        hidden = batch.place_images(self._embedding(batch.tokens, group))
        for layer, layer_cache in zip(self._layers, cache.layers, strict=True):
            hidden = layer(hidden, layer_cache, batch, rotation, group)
        return self._norm(hidden)

    def logits(self, hidden: Tensor, group: Communicator) -> Tensor | None:
        return self._head(hidden, group)

    def best(self, hidden: Tensor, group: Communicator) -> tuple[Tensor, Tensor] | None:
        return self._head.best(hidden, group)
