"""Attention over a paged KV cache as Triton kernels: one launch for all sequences of a batch.

Each program takes a tile of one sequence's queries, one kv head with all the heads that share it, and a part of the
keys, and goes over these once, keeping a running maximum and sum (https://arxiv.org/abs/2205.14135). Where the keys are
split over several programs, because a small batch would leave a GPU idle, a second kernel joins the parts
(https://pytorch.org/blog/flash-decoding/).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def attend_tile(  # type: ignore[no-untyped-def]
    out, parts, sums, queries, keys, values, tiles, tables, contexts, starts,
    scale, table_stride, query_stride, slot_stride, tokens, splits,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, SHARING: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile. Grid: [tiles, kv heads, splits].

    `queries` and `out`: [tokens, heads, HEAD_DIM]; `keys` and `values`: [slots, kv heads, HEAD_DIM]. `tiles`: [tiles,
    2], a sequence and the first of its tokens in this step; `tables`: [sequences, blocks]; `contexts`: [sequences],
    tokens that the last one sees; `starts`: [sequences + 1], where each sequence's tokens begin. `scale`: of scores,
    for powers of 2 instead of e. With SPLIT, `parts`: [splits, tokens, heads, HEAD_DIM] and `sums`: [splits, tokens,
    heads, 2] take the weighted sums, their weights and the largest score, in float32.
    """
    sequence = tl.load(tiles + 2 * tl.program_id(0))
    first = tl.load(tiles + 2 * tl.program_id(0) + 1)
    kv_head = tl.program_id(1)
    heads = tl.num_programs(1) * SHARING
    start = tl.load(starts + sequence)
    count = tl.load(starts + sequence + 1) - start
    context = tl.load(contexts + sequence)

    row = tl.arange(0, ROWS)
    token = first + row // SHARING
    head = kv_head * SHARING + row % SHARING
    exists = (row < ROWS // SHARING * SHARING) & (token < count)
    last_seen = context - count + token  # by each row
    column = tl.arange(0, WIDTH)
    inside = column < HEAD_DIM
    at = (start + token).to(tl.int64) * query_stride + head * HEAD_DIM
    query = tl.load(queries + at[:, None] + column[None, :], mask=exists[:, None] & inside[None, :], other=0.0)

    seen = tl.minimum(context, context - count + first + ROWS // SHARING)  # by any row
    each = tl.cdiv(tl.cdiv(seen, KEYS), splits) * KEYS
    begin = tl.program_id(2) * each
    end = tl.minimum(begin + each, seen)

    largest = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for base in range(begin, end, KEYS):
        key = base + tl.arange(0, KEYS)
        within = key < end
        block = tl.load(tables + sequence * table_stride + key // BLOCK_SIZE, mask=within, other=0)
        slot = (block.to(tl.int64) * BLOCK_SIZE + key % BLOCK_SIZE) * slot_stride + kv_head * HEAD_DIM
        mask = within[:, None] & inside[None, :]
        held = tl.load(keys + slot[:, None] + column[None, :], mask=mask, other=0.0)
        score = tl.dot(query, tl.trans(held), input_precision=PRECISION) * scale
        score = tl.where(within[None, :] & (key[None, :] <= last_seen[:, None]), score, float("-inf"))
        greatest = tl.maximum(largest, tl.max(score, 1))
        shift = tl.where(greatest == float("-inf"), 0.0, greatest)  # a row that sees nothing of this part
        share = tl.exp2(score - shift[:, None])
        fade = tl.exp2(largest - shift)
        weight = weight * fade + tl.sum(share, 1)
        value = tl.load(values + slot[:, None] + column[None, :], mask=mask, other=0.0)
        total = total * fade[:, None] + tl.dot(share.to(value.dtype), value, input_precision=PRECISION)
        largest = greatest

    store = exists[:, None] & inside[None, :]
    place = (start + token).to(tl.int64) * heads + head
    if SPLIT:
        place += tl.program_id(2).to(tl.int64) * tokens * heads
        tl.store(parts + place[:, None] * HEAD_DIM + column[None, :], total, mask=store)
        tl.store(sums + 2 * place, weight, mask=exists)
        tl.store(sums + 2 * place + 1, largest, mask=exists)
    else:
        result = total / weight[:, None]
        tl.store(out + place[:, None] * HEAD_DIM + column[None, :], result.to(out.dtype.element_ty), mask=store)


@triton.jit  # type: ignore[untyped-decorator]
def join_splits(  # type: ignore[no-untyped-def]
    out, parts, sums, rows, splits, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr
):  # fmt: skip
    """One row, of `rows` = tokens * heads, from its parts. Grid: [rows]. SPLITS: a power of two, `splits` or more."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    exists = split < splits
    column = tl.arange(0, WIDTH)
    place = split.to(tl.int64) * rows + row
    weight = tl.load(sums + 2 * place, mask=exists, other=0.0)
    largest = tl.load(sums + 2 * place + 1, mask=exists, other=float("-inf"))
    fade = tl.exp2(largest - tl.max(largest, 0))
    mask = exists[:, None] & (column[None, :] < HEAD_DIM)
    part = tl.load(parts + place[:, None] * HEAD_DIM + column[None, :], mask=mask, other=0.0)
    result = tl.sum(part * fade[:, None], 0) / tl.sum(weight * fade, 0)
    tl.store(out + row * HEAD_DIM + column, result.to(out.dtype.element_ty), mask=column < HEAD_DIM)
