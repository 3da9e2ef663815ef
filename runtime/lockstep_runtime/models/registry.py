"""Which architectures there are, and the model that config.json asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor

from lockstep_runtime.distributed.communicator import Communicator
from lockstep_runtime.layers.batch import Batch
from lockstep_runtime.layers.cache import CacheShape, KVCache
from lockstep_runtime.layers.placement import Placement
from lockstep_runtime.layers.vision import VisionTower
from lockstep_runtime.models.llama import build_llama
from lockstep_runtime.models.mistral import build_mistral
from lockstep_runtime.models.qwen2 import build_qwen2
from lockstep_runtime.models.qwen3 import build_qwen3
from lockstep_runtime.models.qwen3_5 import (
    build_qwen3_5,
    build_qwen3_5_moe,
    build_qwen3_5_moe_vision,
    build_qwen3_5_vision,
)
from lockstep_runtime.models.qwen3_moe import build_qwen3_moe
from lockstep_runtime.models.qwen3_next import build_qwen3_next
from lockstep_runtime.sources.model_config import Architecture, check_supported
from lockstep_runtime.weights.sharding import RankInfo
from lockstep_runtime.weights.weight import StoredTable, Weight


class Model(Protocol):
    """One rank's part of a model. Building it takes no memory; `weights` are filled by the loader."""

    @property
    def vocabulary(self) -> int: ...

    @property
    def max_positions(self) -> int: ...

    @property
    def cache_shape(self) -> CacheShape: ...

    @property
    def vision(self) -> VisionTower | None:
        """What makes tokens of images; None: the model takes text only."""

    def weights(self) -> Iterable[Weight | StoredTable]:
        """In the order in which they are read."""

    def loaded(self) -> None:
        """All weights have been filled."""

    def forward(self, batch: Batch, cache: KVCache, group: Communicator) -> Tensor:
        """Run the batch's tokens, write their keys and values, and return every token's last hidden state, normed.

        [tokens, hidden], the same bits on every rank.
        """

    def logits(self, hidden: Tensor, group: Communicator) -> Tensor | None:
        """[n, hidden] -> [n, vocabulary] in float32 on rank 0; None on the others."""

    def best(self, hidden: Tensor, group: Communicator) -> tuple[Tensor, Tensor] | None:
        """The likeliest token of each row and its logit, [n] both, on rank 0: cheaper than all the logits."""


Builder = Callable[[Mapping[str, Any], RankInfo, Placement], Model]


def builder_of(architecture: Architecture) -> Builder:
    match architecture:
        case Architecture.LLAMA:
            return build_llama
        case Architecture.MISTRAL:
            return build_mistral
        case Architecture.QWEN2:
            return build_qwen2
        case Architecture.QWEN3:
            return build_qwen3
        case Architecture.QWEN3_MOE:
            return build_qwen3_moe
        case Architecture.QWEN3_NEXT:
            return build_qwen3_next
        case Architecture.QWEN3_5:
            return build_qwen3_5
        case Architecture.QWEN3_5_MOE:
            return build_qwen3_5_moe
        case Architecture.QWEN3_5_VISION:
            return build_qwen3_5_vision
        case Architecture.QWEN3_5_MOE_VISION:
            return build_qwen3_5_moe_vision


def build_model(config: Mapping[str, Any], shard: RankInfo, placement: Placement) -> Model:
    """
    Raises:
        ModelError: an unknown architecture, a setting that is missing or not supported, or a model that can't be split
            over so many ranks; the message has the sizes that work.
    """
    return builder_of(check_supported(config))(config, shard, placement)
