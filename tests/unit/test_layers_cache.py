"""A cache of both kinds: keys and values in blocks, recurrent states in slots."""

from __future__ import annotations

import math
import os

import pytest
import torch
from tests.support.ranks import piece

from lockstep_runtime.config import EngineLimits, ServeConfig
from lockstep_runtime.layers.cache import (
    BLOCK_SIZE,
    CacheMemory,
    CacheShape,
    CacheSize,
    KVCache,
    PagedShape,
    StatePart,
    StateShape,
)
from lockstep_runtime.layers.finite import is_finite
from lockstep_runtime.layers.placement import place
from lockstep_runtime.protocol.step import PROBE_STATE_SLOTS, SequenceSlice, StateSlots
from lockstep_runtime.sources.errors import ModelError
from lockstep_runtime.worker.cache_room import CacheRoom

CPU = torch.device("cpu")
PAGED = PagedShape(kv_heads=3, head_dim=10, sharing=2)
STATE = StateShape(
    parts=(StatePart(name="inputs", shape=(5, 3), dtype="bfloat16"), StatePart(name="sum", shape=(2, 3, 7)))
)
HYBRID = CacheShape(layers=(STATE, PAGED, STATE, PAGED))
SIZE = CacheSize(blocks=4, state_slots=7)
FLOAT = place(CPU, torch.float32, None)


def state_slice(read: int, write: int) -> SequenceSlice:
    return SequenceSlice(sequence_id=1, position=40, tokens=[7], blocks=[2, 0], state=StateSlots(read, write))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_has_a_place_of_its_own(dtype: torch.dtype) -> None:
    cache = KVCache(HYBRID, SIZE, place(CPU, dtype, None))
    tensors = [
        *(tensor for layer in cache.paged for tensor in (layer.keys, layer.values)),
        *(part for layer in cache.states for part in layer.parts.values()),
    ]
    assert cache.layers == [cache.states[0], cache.paged[0], cache.states[1], cache.paged[1]]
    for number, tensor in enumerate(tensors):
        assert tensor.data_ptr() % 64 == 0
        tensor.fill_(number + 1)
    for number, tensor in enumerate(tensors):
        assert bool((tensor == number + 1).all())
    assert {tuple(part.shape) for part in cache.states[1].parts.values()} == {(7, 5, 3), (7, 2, 3, 7)}
    assert sum(tensor.nbytes for tensor in tensors) <= cache.nbytes == HYBRID.nbytes(dtype, SIZE)


def test_slot_zero_is_zeros_and_the_probe_reads_the_same_numbers_every_time() -> None:
    cache = KVCache(HYBRID, SIZE, FLOAT)
    cache.fill_for_probe()
    sums = cache.states[1].parts["sum"]
    assert not sums[0].any()
    seen = sums[-PROBE_STATE_SLOTS].clone()
    assert seen.abs().max() <= 1
    assert torch.unique(seen).numel() == math.prod(seen.shape)
    cache.states[1].write("sum", torch.tensor([SIZE.state_slots - 2, SIZE.state_slots - 1]), torch.ones(2, 2, 3, 7))
    cache.fill_for_probe()
    assert torch.equal(sums[-PROBE_STATE_SLOTS], seen)


def test_states_outlive_the_process_that_wrote_them_and_are_read_as_copies() -> None:
    descriptor = os.memfd_create("test")
    first = KVCache(HYBRID, SIZE, FLOAT, CacheMemory(descriptor))
    first.states[0].write("inputs", torch.tensor([3]), torch.full((1, 5, 3), 2.0, dtype=torch.bfloat16))
    second = KVCache(HYBRID, SIZE, FLOAT, CacheMemory(descriptor))
    assert second.name == first.name
    found = second.states[0].read("inputs", torch.tensor([3, 0]))
    assert found[0].eq(2).all()
    assert not found[1].any()
    found.zero_()
    assert second.states[0].parts["inputs"][3].eq(2).all()
    other = KVCache(HYBRID, CacheSize(blocks=4, state_slots=9), FLOAT, CacheMemory(descriptor))
    assert other.name != first.name


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["inputs", "sum"])
def test_what_is_no_number_is_seen_in_the_state_that_is_read_next(name: str, bad: float) -> None:
    cache = KVCache(HYBRID, SIZE, FLOAT)
    cache.states[1].parts[name][2].view(-1)[4] = bad
    assert is_finite(cache, [state_slice(1, 2)], CPU), "what a failed step wrote is written again"
    assert not is_finite(cache, [state_slice(1, 3), state_slice(2, 1)], CPU)
    assert cache.holds(state_slice(6, 5))
    assert not cache.holds(state_slice(7, 6)), "it was of a larger cache"
    cache.renew()
    assert is_finite(cache, [state_slice(2, 1), piece(1, 0, [1], [0])], CPU)


def room(limits: EngineLimits, shape: CacheShape = HYBRID) -> CacheSize:
    config = ServeConfig(model="m", served_name="m", backend="cpu", limits=limits)
    offered = CacheRoom(config=config, device=CPU, shape=shape, dtype=torch.float32, max_positions=100)
    return offered.offer(CacheMemory(), has_cache=False)


def test_states_have_room_for_every_sequence_or_half_of_the_cache() -> None:
    slot, block = HYBRID.slot_bytes, HYBRID.block_bytes(torch.float32)
    assert block == 2 * 2 * 3 * 10 * 4 * BLOCK_SIZE
    alone = EngineLimits(max_sequences=4, kv_cache_bytes=1 << 30, prefix_caching=False)
    assert room(alone) == CacheSize(blocks=17, state_slots=11)
    tight = 5 * block
    assert room(EngineLimits(max_sequences=400, kv_cache_bytes=tight, prefix_caching=False)) == CacheSize(
        blocks=(tight - tight // 2 // slot * slot) // block, state_slots=tight // 2 // slot
    )
    assert room(EngineLimits(kv_cache_bytes=tight), CacheShape(layers=(PAGED,))).state_slots == 0
    with pytest.raises(ModelError, match="no room for a KV cache"):
        room(EngineLimits(kv_cache_bytes=4 * slot + block))


def test_states_of_beginnings_have_two_slots_for_each_sequence_or_an_eighth_of_what_is_left() -> None:
    slot, block = HYBRID.slot_bytes, HYBRID.block_bytes(torch.float32)
    assert room(EngineLimits(max_sequences=4, kv_cache_bytes=1 << 30)) == CacheSize(blocks=17, state_slots=11 + 8)
    tight = 5 * block
    running = tight // 2 // slot
    kept = (tight - running * slot) // 8 // slot
    assert kept > 0
    assert room(EngineLimits(max_sequences=400, kv_cache_bytes=tight)) == CacheSize(
        blocks=(tight - (running + kept) * slot) // block, state_slots=running + kept
    )
