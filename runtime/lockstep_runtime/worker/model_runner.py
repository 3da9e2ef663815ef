"""One rank's compute: load the weights, lay out the cache, run steps. Knows nothing of the engine's connection."""

from __future__ import annotations

import logging
import mmap
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from lockstep_runtime.config import ServeConfig
from lockstep_runtime.distributed.communicator import Communicator
from lockstep_runtime.distributed.join import choose_backend, exchange_reserve
from lockstep_runtime.host.cgroup import cpus
from lockstep_runtime.host.shm_files import cache_file
from lockstep_runtime.layers.attention import Attention
from lockstep_runtime.layers.attention_choice import choose_attention
from lockstep_runtime.layers.batch import BY_SEQUENCE, Batch, build_batch
from lockstep_runtime.layers.cache import BLOCK_SIZE, CacheMemory, CacheSize, Footprint, KVCache, PagedShape
from lockstep_runtime.layers.finite import is_finite
from lockstep_runtime.layers.placement import choose_placement
from lockstep_runtime.layers.weight import PlainWeight
from lockstep_runtime.models.registry import Model, build_model
from lockstep_runtime.protocol import bus
from lockstep_runtime.protocol.step import SampledToken, SequenceSlice
from lockstep_runtime.sources.errors import ModelError
from lockstep_runtime.sources.image_processor import with_image_processor
from lockstep_runtime.sources.model_config import dtype_name
from lockstep_runtime.sources.model_folder import find_model, read_config
from lockstep_runtime.weights.cache import CacheError, Identity, WeightCache, open_cache
from lockstep_runtime.weights.checkpoint import with_dtype
from lockstep_runtime.weights.load import LoadResult, attach_weights, fill_cache, load_weights
from lockstep_runtime.weights.parallel_map import in_own_thread
from lockstep_runtime.weights.sharding import RankInfo
from lockstep_runtime.weights.weight import StoredTable, Weight
from lockstep_runtime.worker.activations import step_bytes
from lockstep_runtime.worker.cache_room import CacheRoom
from lockstep_runtime.worker.device import choose_device, prepare, sharers, wait_for_memory
from lockstep_runtime.worker.fingerprint import fingerprint_of
from lockstep_runtime.worker.grammars import load_grammars
from lockstep_runtime.worker.images import RankImages
from lockstep_runtime.worker.likeliest import check_finite
from lockstep_runtime.worker.memory import (
    give_back_freed_memory,
    keep_freed_memory,
    needed_bytes,
    used_bytes,
)
from lockstep_runtime.worker.rulebook import Rulebook
from lockstep_runtime.worker.ruled_draws import Drawn, draw_by_rules
from lockstep_runtime.worker.sampler import draw_of, is_plain_greedy, take_best
from lockstep_runtime.worker.scores import check_scoring, score
from lockstep_runtime.worker.scrub import INTERVAL_SECONDS, INTERVAL_VARIABLE, Scrub, Watched, name_of, watch

logger = logging.getLogger(__name__)

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    weight_bytes: int  # this rank's slices
    read_bytes: int  # read from storage to get them
    cache: CacheSize  # that this rank has room for
    block_size: int  # tokens
    memory_bytes: int
    step_bytes: int = 0  # what the largest step takes beside them
    scrub: Scrub | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutput:
    fingerprint: int  # of every token's last hidden state: 61 bits, equal on every rank
    drawn: Drawn  # rank 0 only
    scored: list[SampledToken]  # rank 0 only

    @property
    def sampled(self) -> list[SampledToken]:
        return self.drawn.sampled


class ModelRunner:
    """All methods belong to one thread. `memory` is for the KV cache of a rank that computes on the CPU.

    One that has loaded may be forked before its first step; then its copy needs a memory of its own.
    """

    def __init__(self, config: ServeConfig, rank: int, memory: CacheMemory | None = None) -> None:
        self._config, self._rank = config, rank
        self._device = _device(config, rank)
        self.memory = memory or CacheMemory()
        self.on_cpu = self._device.type == "cpu"
        self._loaded: LoadResult | None = None
        self._watched: list[Watched] = []
        self._model: Model
        self._room: CacheRoom
        self._rulebook = Rulebook(2 * config.limits.max_sequences)
        self._cache: KVCache | None = None
        self.images = RankImages(None)
        self._attention: Attention = BY_SEQUENCE
        torch.set_num_threads(config.threads_per_rank or max(1, int(cpus() / config.ranks_per_pod)))

    def load(self, progress: Callable[[int, int], None]) -> LoadReport:
        """Read this rank's slices of the weights, unless they are here; `progress(bytes done, bytes in all)` is called
        often. On a CPU the calling thread computes nothing itself, so that it may be forked.

        Raises:
            ModelError: with a sentence that names what is wrong.
        """
        if self._loaded is not None:
            self._loaded = replace(self._loaded, read_bytes=0)
            progress(self._loaded.weight_bytes, self._loaded.weight_bytes)
        elif self.on_cpu:
            self._loaded = in_own_thread(lambda: self._load(progress))
        else:
            self._loaded = self._load(progress)
        return LoadReport(
            weight_bytes=self._loaded.weight_bytes,
            read_bytes=self._loaded.read_bytes,
            cache=self.room(),
            block_size=BLOCK_SIZE,
            memory_bytes=used_bytes(self._device),
            step_bytes=self._room.step_bytes,
            scrub=Scrub(self._watched, _interval(), time.monotonic()) if self._watched else None,
        )

    def _leave_footprint(self, size: CacheSize) -> None:
        if not self.on_cpu:
            each = self._model.cache_shape.block_bytes(self._placement.activation)
            footprint = Footprint(device_bytes=used_bytes(self._device), size=size, block_bytes=each)
            self.memory.leave_footprint(footprint)

    def _wait_for_device(self) -> None:
        """Until what the process before this one had of the device is free again."""
        total = int(torch.cuda.mem_get_info(self._device)[1])
        needed = needed_bytes(self.memory.footprint(), total, sharers(self._config, torch.cuda.device_count()))
        wait_for_memory(lambda: int(torch.cuda.mem_get_info(self._device)[0]), needed)

    def _load(self, progress: Callable[[int, int], None]) -> LoadResult:
        if not self.on_cpu:
            self._wait_for_device()
        give_back_freed_memory()
        path = cache_file(os.environ, self._rank) if self._config.weight_cache == "Memory" else None
        loaded, cache = self._load_cached(path, progress) if path is not None else (self._load_plainly(progress), None)
        if self._rank == 0:
            self._rulebook.grammars = load_grammars(self._config, self._model.vocabulary)
        keep_freed_memory()
        self._room = self._measure_room()
        self._watched = self._watch(cache) if _interval() > 0 else []
        return loaded

    def _measure_room(self) -> CacheRoom:
        room = CacheRoom(
            config=self._config,
            device=self._device,
            shape=self._model.cache_shape,
            dtype=self._placement.activation,
            max_positions=self._model.max_positions,
        )
        step = step_bytes(self._model, self._placement, self._attention, self._config.limits, room.longest)
        logger.info("the largest step takes %.1f MB beside weights and cache", step / 1e6)
        return replace(room, step_bytes=step)

    def _load_cached(self, path: Path, progress: Callable[[int, int], None]) -> tuple[LoadResult, WeightCache | None]:
        """Through the weight cache, which is filled first if need be; without it where there is no room."""
        identity = self._identity()
        if cache := open_cache(path, identity):
            try:
                self._build(cache.contents.settings)
                return self._adopt(cache, progress), cache
            except CacheError as error:
                logger.warning("the weight cache is discarded: %s", error)
        directory, settings = self._find()
        self._build(settings)
        weights = list(self._model.weights())
        try:
            cache, loaded = fill_cache(
                path, identity, settings, directory, weights, progress, exchange_reserve(self._config)
            )
        except OSError as error:
            logger.warning("no weight cache, so a lost rank reads the checkpoint again: %s: %s", path, error.strerror)
            return self._load_plainly(progress), None
        logger.info("the weight cache takes %.1f MB of shared memory: %s", cache.nbytes / 1e6, path)
        self._adopt(cache, lambda done, total: None)
        return loaded, cache

    def _adopt(self, cache: WeightCache, progress: Callable[[int, int], None]) -> LoadResult:
        with torch.inference_mode():
            loaded = attach_weights(cache, list(self._model.weights()), progress)
            self._model.loaded()
        return loaded

    def _load_plainly(self, progress: Callable[[int, int], None]) -> LoadResult:
        directory, settings = self._find()
        self._build(settings)
        with torch.inference_mode():
            loaded = load_weights(directory, self._model.weights(), progress)
            self._model.loaded()
        return loaded

    def _find(self) -> tuple[Path, Mapping[str, Any]]:
        config = self._config
        directory = find_model(config.model, config.model_revision, config.download_dir)
        return directory, with_image_processor(directory, with_dtype(directory, read_config(directory)))

    def _build(self, settings: Mapping[str, Any]) -> None:
        dtype = _dtype(self._config.dtype, dtype_name(settings) or "float32")
        self._placement = choose_placement(self._device, dtype)
        shard = RankInfo(self._rank, self._config.tensor_parallel_size)
        with torch.inference_mode():
            self._model = build_model(settings, shard, self._placement)
            self.images = RankImages(self._model.vision)
            paged = [layer for layer in self._model.cache_shape.layers if isinstance(layer, PagedShape)]
            if paged:
                self._attention = choose_attention(self._placement, paged[0])

    def _identity(self) -> Identity:
        config = self._config
        return Identity(
            model=config.model,
            revision=config.model_revision,
            dtype=config.dtype,
            size=config.tensor_parallel_size,
            rank=self._rank,
        )

    def _watch(self, cache: WeightCache | None) -> list[Watched]:
        def known(weight: Weight | StoredTable) -> str | None:
            kept_as_it_is = cache is not None and isinstance(weight, PlainWeight | StoredTable)
            return cache.checksum(weight.slices) if cache is not None and kept_as_it_is else None

        with torch.inference_mode():
            return watch(self._model.weights(), known)

    @property
    def model(self) -> Model:
        """The rank's part of it, once it is loaded."""
        return self._model

    @property
    def cache(self) -> KVCache | None:
        """None before `allocate`."""
        return self._cache

    def allocate(self, size: CacheSize, *, anew: bool = False) -> KVCache:
        """The KV cache, if it is of this size and not wanted anew; else another in its place. The last block and the
        last state slots are the probe's."""
        with torch.inference_mode():
            if self._cache is None or self._cache.size != size:
                self._cache = None  # its memory is needed
                if anew:
                    self.memory.forget()
                self._cache = KVCache(self._model.cache_shape, size, self._placement, self.memory)
                self._leave_footprint(size)
            elif anew:
                self._cache.renew()
            self._cache.fill_for_probe()
        return self._cache

    def is_spoiled(self, unverified: Sequence[SequenceSlice]) -> bool:
        """Whether the cache holds a NaN or an infinity in the context of any of these. One that has fewer blocks is
        not theirs any more."""
        cache = self._cache
        if cache is None:
            raise RuntimeError("there is no cache to look at yet")
        held = [one for one in unverified if cache.holds(one)]
        with torch.inference_mode():
            return not is_finite(cache, held, self._device)

    def step(self, step: bus.Step, group: Communicator) -> StepOutput:
        """Run one step with all ranks of the group.

        Raises:
            CommunicatorAborted: a collective was left.
            NonFiniteError: rank 0 found NaN or infinity in the logits, or where nothing is drawn in the last states.
            ValueError: a slice that can't be run; raised before any collective.
        """
        if self._cache is None:
            raise RuntimeError("a step came before there was a cache")
        with torch.inference_mode():
            batch = build_batch(step.sequences, self._device, self._attention)
            _check_tokens(batch, self._model.vocabulary)
            check_scoring(step.sequences, self._model.vocabulary)
            if group.rank == 0:
                self._rulebook.prepare(step.sequences)
            batch = self.images.place(step, batch, group)
            states = self._model.forward(batch, self._cache, group)
            hidden = states if len(states) == len(batch.segments) else states[batch.last]
            drawn = self._draw(step.sequences, hidden, group)
            scored = score(step.sequences, batch, states, lambda rows: self._model.logits(rows, group))
            fingerprint = fingerprint_of(batch, states, hidden)
            group.check()
            return StepOutput(fingerprint=fingerprint, drawn=drawn, scored=scored)

    def give_back_unused(self) -> None:
        """After a step that found no memory: what the allocator keeps may be in pieces of the wrong size."""
        if not self.on_cpu:
            torch.cuda.empty_cache()

    def weights(self) -> list[Weight | StoredTable]:
        return list(self._model.weights())

    def touch_weights(self) -> None:
        """Read a byte of every page of the weights: a process whose page table lacks them takes twice as long for its
        first step. What is packed came with the fork."""
        with torch.inference_mode():
            for weight in self.weights():
                if isinstance(weight, PlainWeight):
                    weight.data.view(-1).view(torch.uint8)[:: mmap.PAGESIZE].sum()

    def flip_bit(self, number: int) -> str:
        """Damage this process's copy of its weights, as bad memory would; returns the tensor's name.

        `number` chooses the bit. Packed matrices are left out: their memory can't be reached.
        """
        plain = [weight for weight in self.weights() if isinstance(weight, PlainWeight) and weight.data.numel()]
        weight = plain[number % len(plain)]
        with torch.inference_mode():
            raw = weight.data.view(-1).view(torch.uint8)
            bit = number % (raw.numel() * 8)
            raw[bit // 8] ^= 1 << bit % 8
        return name_of(weight)

    def _draw(self, sequences: list[SequenceSlice], hidden: Tensor, group: Communicator) -> Drawn:
        drawn = [row for row, sequence in enumerate(sequences) if sequence.sample is not None]
        if not drawn:
            if group.rank == 0:
                check_finite(hidden, "hidden states")
            return Drawn()
        asked = [sequences[row] for row in drawn]
        rows = hidden if len(drawn) == len(sequences) else hidden[drawn]
        draws = [draw_of(sequence) for sequence in asked]
        if all(is_plain_greedy(draw.params) for draw in draws) and all(one.ruled is None for one in asked):
            best = self._model.best(rows, group)
            return Drawn() if best is None else Drawn(take_best(*best, draws))
        logits = self._model.logits(rows, group)
        return Drawn() if logits is None else draw_by_rules(logits, asked, self._rulebook)

    def room(self) -> CacheSize:
        """See `CacheRoom.offer`."""
        return self._room.offer(self.memory, has_cache=self._cache is not None)


def _check_tokens(batch: Batch, rows: int) -> None:
    """A token without a row would be a fault of the device, or where the vocabulary is split a zero without a word.

    Raises:
        ValueError: there is one.
    """
    least, greatest = (int(one) for one in batch.given[0].aminmax())
    if least < 0 or greatest >= rows:
        raise ValueError(f"token {greatest if greatest >= rows else least} has no row in an embedding of {rows}")


def _device(config: ServeConfig, rank: int) -> torch.device:
    backend = choose_backend(config)
    asked = backend == "nccl" or config.device == "cuda"
    device = choose_device(config, backend, rank, torch.cuda.device_count() if asked else 0)
    prepare(device)
    return device


def _dtype(wanted: str, native: str) -> torch.dtype:
    name = native if wanted == "auto" else wanted
    if name not in DTYPES:
        raise ModelError(
            f"the model's type is {name}; Lockstep computes in {', '.join(DTYPES)}: choose one with --dtype"
        )
    return DTYPES[name]


def _interval() -> float:
    """Seconds; 0: nothing is scrubbed."""
    return float(os.environ.get(INTERVAL_VARIABLE) or INTERVAL_SECONDS)
