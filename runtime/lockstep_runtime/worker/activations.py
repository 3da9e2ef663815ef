"""What the largest step of a rank takes beside weights and cache, measured by small steps when the model is loaded.

The tensors that a forward makes are watched as they come and go, whatever the device: a rank's resident memory says too
little, since allocators keep what was freed, and a step of full size would take a CPU many seconds.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lockstep_runtime.config import EngineLimits
from lockstep_runtime.distributed.join import SingleCommunicator
from lockstep_runtime.layers.attention import Attention
from lockstep_runtime.layers.batch import build_batch
from lockstep_runtime.layers.cache import BLOCK_SIZE, CacheSize, KVCache
from lockstep_runtime.layers.placement import Placement
from lockstep_runtime.layers.prefill_attention import TILE
from lockstep_runtime.layers.vision import VisionTower
from lockstep_runtime.models.registry import Model
from lockstep_runtime.protocol.images import HELD_TOKENS
from lockstep_runtime.protocol.step import SequenceSlice, StateSlots

TRIED_TOKENS: Final = (4, 12)  # of one sequence: what a token more takes is what larger steps take by the token
TRIED_CHUNKS: Final = (64, 128)  # the same of models that compute states, which go by chunks of 64 tokens
TRIED_SIDE: Final = 4  # tokens of an image's side, beside an image of one
LOGITS_COPIES: Final = 3  # a rank's own, the whole vocabulary's, and what sampling makes of them
MARGIN: Final = 1.5  # for what kernels take inside, and what allocators can't use


class LiveBytes(TorchFunctionMode):
    """The most that tensors made here took at once: `peak`, in bytes. What an operation makes inside is not seen.

    A mode of functions and not of dispatch: that one brings torch's compiler, which takes seconds to import.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live = 0
        self._known: set[int] = set()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in given and storage.data_ptr() not in self._known:
                self._born(storage)
        return result

    def _born(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = storage.data_ptr(), storage.nbytes()
        self._known.add(key)
        self._live += nbytes
        self.peak = max(self.peak, self._live)
        weakref.finalize(storage, self._died, key, nbytes)

    def _died(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self._live -= nbytes


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor) and not leaf.is_mkldnn]


def step_bytes(model: Model, placement: Placement, attention: Attention, limits: EngineLimits, max_len: int) -> int:
    """Of the largest step that may come: `limits.max_batch_tokens` tokens, a context of `max_len`, the largest image;
    and of the images' tokens that are held."""
    few, more = TRIED_CHUNKS if model.cache_shape.slot_bytes else TRIED_TOKENS
    least = _forward_bytes(model, placement, attention, few)
    each = max(0, _forward_bytes(model, placement, attention, more) - least) / (more - few)
    forward = least + each * (limits.max_batch_tokens - few)
    mask = min(TILE, limits.max_batch_tokens) * max_len * placement.activation.itemsize
    logits = LOGITS_COPIES * limits.max_sequences * model.vocabulary * torch.float32.itemsize
    encoding, held = _image_bytes(model.vision, placement) if model.vision is not None else (0.0, 0)
    return int(MARGIN * max(forward + mask, encoding, 0) + logits + held)


def _image_bytes(tower: VisionTower, placement: Placement) -> tuple[float, int]:
    """What it takes to encode the largest image, before a step's own tokens are fed, and to hold what was encoded."""
    processor = tower.processor
    side = min(TRIED_SIDE, math.isqrt(processor.most_patches) // processor.merge)
    (least, width), (more, _) = (_encode(tower, one * processor.factor, placement) for one in (1, side))
    first, last = (one * one * processor.merge**2 for one in (1, side))
    each = max(0, more - least) / max(1, last - first)
    tokens = max(HELD_TOKENS, processor.most_patches // processor.merge**2)
    return least + each * (processor.most_patches - first), tokens * width * placement.activation.itemsize


def _encode(tower: VisionTower, side: int, placement: Placement) -> tuple[int, int]:
    """Of a square image of so many pixels a side: bytes, and the width of a token."""
    with torch.inference_mode(), LiveBytes() as live:
        tokens = tower.encode(torch.zeros(side, side, 3, dtype=torch.uint8), SingleCommunicator())
    return live.peak, tokens.shape[1]


def _forward_bytes(model: Model, placement: Placement, attention: Attention, tokens: int) -> int:
    blocks = -(-tokens // BLOCK_SIZE)
    cache = KVCache(model.cache_shape, CacheSize(blocks=blocks, state_slots=2), placement)
    prompt = SequenceSlice(
        sequence_id=0, position=0, tokens=[0] * tokens, blocks=list(range(blocks)), state=StateSlots(0, 1)
    )
    with torch.inference_mode(), LiveBytes() as live:
        batch = build_batch([prompt], placement.device, attention)
        model.forward(batch, cache, SingleCommunicator())
    peak: int = live.peak
    return peak
