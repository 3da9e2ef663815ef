"""One rank's compute: load the weights, lay out the cache, run steps. Knows nothing of the engine's connection."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from lockstep_runtime import wire
from lockstep_runtime.config import ServeConfig
from lockstep_runtime.layers.batch import build_batch
from lockstep_runtime.layers.cache import BLOCK_SIZE, KVCache
from lockstep_runtime.layers.placement import choose_placement
from lockstep_runtime.models.registry import Model, build_model
from lockstep_runtime.parallel.group import Group, choose_backend
from lockstep_runtime.weights.errors import ModelError
from lockstep_runtime.weights.load import load_weights
from lockstep_runtime.weights.plan import Shard
from lockstep_runtime.weights.source import find_model, read_config
from lockstep_runtime.worker.memory import cache_budget, give_back_freed_memory, keep_freed_memory, used_bytes
from lockstep_runtime.worker.sampler import draw_of, is_plain_greedy, sample, take_best

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    weight_bytes: int  # this rank's slices
    read_bytes: int  # read from storage to get them
    cache_blocks: int  # that this rank has room for
    block_size: int  # tokens
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutput:
    fingerprint: int  # of every sequence's last hidden state: 64 bits, unsigned, equal on every rank
    sampled: list[wire.SampledToken]  # rank 0 only


class Runner:
    """All methods belong to one thread."""

    def __init__(self, config: ServeConfig, rank: int) -> None:
        self._config, self._rank = config, rank
        self._device = _device(config, rank)
        self._model: Model
        self._cache: KVCache
        torch.set_num_threads(config.threads_per_rank or max(1, _cores() // config.ranks_per_pod))

    def load(self, progress: Callable[[int, int], None]) -> LoadReport:
        """Read this rank's slices of the weights; `progress(bytes done, bytes in all)` is called often.

        Raises:
            ModelError: with a sentence that names what is wrong.
        """
        config = self._config
        directory = find_model(config.model, config.model_revision, config.download_dir)
        settings = read_config(directory)
        dtype = _dtype(config.dtype, str(settings.get("dtype") or settings.get("torch_dtype") or "float32"))
        self._placement = choose_placement(self._device, dtype)
        shard = Shard(self._rank, config.tensor_parallel_size)
        give_back_freed_memory()
        with torch.inference_mode():
            self._model = build_model(settings, shard, self._placement)
            loaded = load_weights(directory, self._model.weights(), progress)
            self._model.loaded()
        keep_freed_memory()
        return LoadReport(
            weight_bytes=loaded.weight_bytes,
            read_bytes=loaded.read_bytes,
            cache_blocks=self._room(),
            block_size=BLOCK_SIZE,
            memory_bytes=used_bytes(self._device),
        )

    def allocate(self, blocks: int) -> int:
        """Lay out a KV cache of so many blocks, in place of any earlier one; returns its bytes."""
        if hasattr(self, "_cache"):
            del self._cache
        with torch.inference_mode():
            self._cache = KVCache(self._model.cache_shape, blocks, self._placement)
        return self._cache.nbytes

    def step(self, step: wire.Step, group: Group) -> StepOutput:
        """Run one step with all ranks of the group.

        Raises:
            GroupAborted: a collective was left.
            NonFiniteError: rank 0 found NaN or infinity in the logits.
            ValueError: a slice that can't be run; raised before any collective.
        """
        with torch.inference_mode():
            batch = build_batch(step.sequences, self._device)
            hidden = self._model.forward(batch, self._cache, group)
            sampled = self._draw(step.sequences, hidden, group)
            fingerprint = _fingerprint(hidden)
            group.check()
            return StepOutput(fingerprint=fingerprint, sampled=sampled)

    def _draw(self, sequences: list[wire.SequenceSlice], hidden: Tensor, group: Group) -> list[wire.SampledToken]:
        drawn = [row for row, sequence in enumerate(sequences) if sequence.sample is not None]
        if not drawn:
            return []
        rows = hidden if len(drawn) == len(sequences) else hidden[drawn]
        draws = [draw_of(sequences[row]) for row in drawn]
        if all(is_plain_greedy(draw.params) for draw in draws):
            best = self._model.best(rows, group)
            return [] if best is None else take_best(*best, draws)
        logits = self._model.logits(rows, group)
        return [] if logits is None else sample(logits, draws)

    def _room(self) -> int:
        """Blocks that fit; never more than all sequences at full length could use."""
        limits = self._config.limits
        length = min(limits.max_model_len or self._model.max_positions, self._model.max_positions)
        useful = limits.max_sequences * -(-length // BLOCK_SIZE)
        budget = cache_budget(self._device, self._config.ranks_per_pod, limits.kv_cache_bytes)
        blocks = min(useful, budget // self._model.cache_shape.block_bytes(self._placement.activation))
        if blocks < 1:
            raise ModelError(f"no room for a KV cache: {budget} bytes are left beside the weights")
        return blocks


def _fingerprint(hidden: Tensor) -> int:
    """64 bits of the raw bytes."""
    raw = hidden.contiguous().view(torch.uint8).cpu().numpy().data
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")


def _device(config: ServeConfig, rank: int) -> torch.device:
    if choose_backend(config) != "nccl":
        return torch.device("cpu")
    device = torch.device("cuda", rank % config.ranks_per_pod)
    torch.cuda.set_device(device)
    return device


def _dtype(wanted: str, native: str) -> torch.dtype:
    name = native.removeprefix("torch.") if wanted == "auto" else wanted
    if name not in DTYPES:
        raise ModelError(
            f"the model's type is {name}; Lockstep computes in {', '.join(DTYPES)}: choose one with --dtype"
        )
    return DTYPES[name]


def _cores() -> int:
    return len(os.sched_getaffinity(0))
