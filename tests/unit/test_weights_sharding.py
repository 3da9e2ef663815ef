from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lockstep_runtime.weights.sharding import (
    RankInfo,
    even_range,
    head_range,
    head_slice,
    padded_vocabulary,
    replicated,
    rows_of,
    split_slice,
    tensor_parallel_sizes,
    vocabulary_slice,
)

sizes = st.integers(1, 16)


@given(st.integers(0, 1000), sizes)
def test_spans_cover_everything_once_and_differ_by_one_at_most(total: int, size: int) -> None:
    spans = [even_range(total, RankInfo(rank, size)) for rank in range(size)]
    assert [n for start, stop in spans for n in range(start, stop)] == list(range(total))
    lengths = [stop - start for start, stop in spans]
    assert max(lengths) - min(lengths) <= 1


@given(st.integers(1, 1000), sizes)
def test_vocabulary_parts_are_padded_to_one_size(total: int, size: int) -> None:
    slices = [vocabulary_slice("t", total, 4, shard=RankInfo(rank, size)) for rank in range(size)]
    assert [n for tensor_slice in slices for n in range(tensor_slice.start, tensor_slice.stop)] == list(range(total))
    each = padded_vocabulary(total, RankInfo(0, size)) // size
    assert all(tensor_slice.rows <= each for tensor_slice in slices)
    assert each * size - total < size


@given(st.integers(1, 32), st.integers(1, 32), sizes)
def test_each_rank_holds_the_kv_heads_that_its_heads_read(kv_heads: int, group: int, size: int) -> None:
    attention_heads = kv_heads * group
    if size not in tensor_parallel_sizes(attention_heads, kv_heads):
        return
    for rank in range(size):
        first, last = head_range(attention_heads, RankInfo(rank, size))
        assert last - first == attention_heads // size
        held = range(*head_range(kv_heads, RankInfo(rank, size)))
        assert {head // group for head in range(first, last)} == set(held)


def test_the_sizes_that_a_shape_can_take() -> None:
    assert tensor_parallel_sizes(16, 8) == (1, 2, 4, 8, 16)
    assert tensor_parallel_sizes(6, 3) == (1, 3, 6)
    assert tensor_parallel_sizes(8, 1) == (1, 2, 4, 8)
    assert tensor_parallel_sizes(12, 4) == (1, 2, 4, 12)


def test_cuts_by_rows_columns_and_heads() -> None:
    second = RankInfo(1, 2)
    assert split_slice("gate", 10, 4, shard=second).local_shape == (5, 4)
    assert split_slice("down", 4, 10, shard=second, dim=1).local_shape == (4, 5)
    assert replicated("norm", 7).local_shape == (7,)
    shared = head_slice("k", 32, 4, count=2, shard=RankInfo(3, 4))
    assert (shared.start, shared.stop) == (16, 32)


def test_cuts_of_what_is_packed_and_stacked() -> None:
    second = RankInfo(1, 2)
    up = split_slice("gate_up", 4, 12, 8, shard=second, part=(6, 12), index=3)
    assert (up.start, up.stop, up.index, up.local_shape) == (9, 12, 3, (3, 8))
    assert split_slice("down", 4, 8, 6, shard=second, dim=1, index=0).local_shape == (8, 3)
    assert split_slice("experts", 4, 8, 6, shard=second).local_shape == (2, 8, 6)
    value = head_slice("qkv", 40, 5, count=2, shard=RankInfo(1, 4), part=(24, 40))
    assert (value.start, value.stop) == (24, 32)


def test_rows_of_a_stack() -> None:
    stack = (replicated("a", 3, 2), replicated("b", 4, 2), replicated("c", 2, 2))
    found = [(rows.tensor_slice.tensor, rows.start, rows.stop, rows.at) for rows in rows_of(stack, 2, 8)]
    assert found == [("a", 2, 3, 0), ("b", 0, 4, 1), ("c", 0, 1, 5)]
