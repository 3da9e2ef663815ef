"""Run as a program: the paged kernels under Triton's interpreter, which has to be chosen before they are defined.

Prints one line of JSON: of each case, the largest difference from attention sequence by sequence.
"""

from __future__ import annotations

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

from itertools import count

import torch

from lockstep_runtime.layers.attention import SequenceAttention
from lockstep_runtime.layers.attention_choice import differs
from lockstep_runtime.layers.cache import BLOCK_SIZE, LayerCache, PagedShape
from lockstep_runtime.layers.paged_attention import PagedAttention
from lockstep_runtime.protocol.step import SequenceSlice

CPU = torch.device("cpu")
LIVES = {  # (tokens that are there, new tokens) of each sequence
    "decode": [(0, 1), (31, 1), (32, 1), (95, 1)],
    "one long": [(1500, 1)],
    "prefill": [(0, 40), (0, 3)],
    "chunks": [(64, 33), (5, 1), (700, 20), (33, 2)],
}
SHAPES = [(4, 4, 16), (14, 2, 64), (8, 1, 80), (6, 3, 128)]  # heads, kv heads, head_dim


def case(sequences: list[tuple[int, int]], heads: int, kv_heads: int, width: int, dtype: torch.dtype) -> float:
    """Blocks are dealt out so that no sequence's lie side by side; what nobody owns is NaN."""
    generator = torch.Generator().manual_seed(heads)
    needed = [-(-(position + tokens) // BLOCK_SIZE) for position, tokens in sequences]
    total, free = sum(needed) + 2, count()
    order = torch.randperm(total, generator=generator).tolist()
    slices = [
        SequenceSlice(
            sequence_id=index, position=position, tokens=[0] * tokens, blocks=[order[next(free)] for _ in range(n)]
        )
        for index, ((position, tokens), n) in enumerate(zip(sequences, needed, strict=True))
    ]
    keys, values = (torch.full((total * BLOCK_SIZE, kv_heads, width), float("nan"), dtype=dtype) for _ in range(2))
    for one in slices:
        for position in range(one.position + len(one.tokens)):
            slot = one.blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
            keys[slot], values[slot] = (torch.randn(2, kv_heads, width, generator=generator).to(dtype)).unbind()
    apart = torch.randn(sum(tokens for _, tokens in sequences), heads + 2 * kv_heads, width, generator=generator).to(
        dtype
    )
    queries = apart[:, :heads]  # as a model has them, beside its keys and values
    cache, plain = LayerCache(keys, values), LayerCache(keys.float(), values.float())
    found = PagedAttention().plan(slices, CPU)(queries, cache)
    expected = SequenceAttention().plan(slices, CPU)(queries.float(), plain)
    return float((found.float() - expected).abs().max())


if __name__ == "__main__":
    results = {
        f"{name} {shape} {dtype}": case(lives, *shape, dtype)
        for number, (name, lives) in enumerate(LIVES.items())
        for shape in (SHAPES[number], SHAPES[(number + 1) % len(SHAPES)])
        for dtype in (torch.float32, torch.float16)
    }
    trial = differs(PagedAttention(), CPU, torch.float32, PagedShape(kv_heads=2, head_dim=32, sharing=3))
    print(json.dumps({"cases": results, "trial": trial}))
