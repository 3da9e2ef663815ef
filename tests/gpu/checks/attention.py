"""D1, D2, D13: what is chosen for attention, what a context of a new length costs, and a whole batch in one launch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from tests.gpu.findings import Row, answer
from tests.support.ranks import piece
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from lockstep_runtime.layers.attention import Attention, SequenceAttention
from lockstep_runtime.layers.attention_choice import choose_attention
from lockstep_runtime.layers.cache import BLOCK_SIZE, LayerCache, PagedShape
from lockstep_runtime.layers.placement import Placement
from lockstep_runtime.layers.prefill_attention import Attend, Prefill, attend_flash, attend_masked, choose_prefill
from lockstep_runtime.worker.device import choose_attention_kernels

KV_HEADS, SHARING, WIDTH = 8, 4, 128  # Qwen3-8B's: 32 heads share 8
STEPS, FIRST = 40, 700
SLOW = 3.0  # times
TOKENS, CONTEXT = 2048, 8192


def decode(device: torch.device, steps: int = STEPS) -> list[float]:
    """Milliseconds of attention in each of so many steps of one sequence, as `layers.attention` asks for it."""
    held = torch.randn(FIRST + steps, KV_HEADS, WIDTH, device=device, dtype=torch.bfloat16)
    query = torch.randn(1, KV_HEADS, SHARING, WIDTH, device=device, dtype=torch.bfloat16)
    found = []
    for context in range(FIRST, FIRST + steps):
        keys = held.as_strided((1, KV_HEADS, context, WIDTH), (0, WIDTH, KV_HEADS * WIDTH, 1))
        found.append(timed(device, lambda keys=keys: F.scaled_dot_product_attention(query, keys, keys)))  # type: ignore[misc]
    return found


def timed(device: torch.device, work: Callable[[], object]) -> float:
    synchronize(device)
    begun = time.monotonic()
    work()
    synchronize(device)
    return (time.monotonic() - begun) * 1e3


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def prefill(device: torch.device, attend: Attend, tokens: int, context: int) -> tuple[float, float, str, Tensor]:
    """Milliseconds, the gigabytes that it took for a moment, its longest kernel, and what came out."""
    torch.manual_seed(0)
    queries = torch.randn(tokens, KV_HEADS * SHARING, WIDTH, device=device, dtype=torch.bfloat16)
    held = torch.randn(2, context, KV_HEADS, WIDTH, device=device, dtype=torch.bfloat16)
    keys, values = (one.transpose(0, 1)[None] for one in held)
    out = torch.empty_like(queries)
    attend(queries, keys, values, out)
    synchronize(device)
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    milliseconds = statistics.median(timed(device, lambda: attend(queries, keys, values, out)) for _ in range(3))
    peak = torch.cuda.max_memory_allocated() - before if device.type == "cuda" else 0
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA][: 2 if device.type == "cuda" else 1]) as seen:
        attend(queries, keys, values, out)
        synchronize(device)
    kernels = sorted(seen.key_averages(), key=lambda one: -float(getattr(one, "self_device_time_total", 0)))
    return milliseconds, peak / 1e9, str(kernels[0].key)[:60] if kernels else "", out


def whole_batch(device: torch.device, attention: Attention, sequences: int, context: int) -> tuple[float, Tensor]:
    """Milliseconds of one layer of a decode step, and what came out."""
    torch.manual_seed(0)
    blocks = -(-context // BLOCK_SIZE)
    held = torch.randn(2, sequences * blocks * BLOCK_SIZE, KV_HEADS, WIDTH, device=device, dtype=torch.bfloat16)
    queries = torch.randn(sequences, KV_HEADS * SHARING, WIDTH, device=device, dtype=torch.bfloat16)
    slices = [
        piece(index + 1, context - 1, [0], list(range(index * blocks, (index + 1) * blocks)))
        for index in range(sequences)
    ]
    attend, cache = attention.plan(slices, device), LayerCache(*held)
    result = attend(queries, cache)
    return statistics.median(timed(device, lambda: attend(queries, cache)) for _ in range(5)), result


def paged_row(device: torch.device, sequences: int = 64, context: int = 1000) -> Row:
    placement = Placement(device=device, dtype=torch.bfloat16, activation=torch.bfloat16)
    chosen = choose_attention(placement, PagedShape(kv_heads=KV_HEADS, head_dim=WIDTH, sharing=SHARING))
    paged, result = whole_batch(device, chosen, sequences, context)
    apart, plain = whole_batch(device, SequenceAttention(), sequences, context)
    differs = float((result.float() - plain.float()).abs().max())
    taken = not isinstance(chosen, SequenceAttention)
    return Row(
        "D2", "one launch for a whole batch is taken, right, and faster",
        "holds" if taken and differs < 0.05 and paged < apart / SLOW else "fails",
        f"{type(chosen).__name__}, {sequences} sequences of {context}: {paged:.3f} ms a layer, one by one {apart:.3f}; "
        f"differs by {differs:.4f} at most",
    )  # fmt: skip


def rows(device: torch.device, steps: int = STEPS, tokens: int = TOKENS, context: int = CONTEXT) -> list[Row]:
    order = [int(one) for one in torch._C._get_sdp_priority_order()]
    with torch.inference_mode():
        decode(device, 3)
        torch.backends.cuda.enable_cudnn_sdp(True)
        stock = decode(device, steps)
        choose_attention_kernels()
        decode(device, 3)
        ours = decode(device, steps)
        masked, taken, kernel, plain = prefill(device, attend_masked, tokens, context)
        way = choose_prefill(device, torch.bfloat16, WIDTH)
        chosen = attend_flash if way is Prefill.FLASH else attend_masked
        flash, less, other, result = prefill(device, chosen, tokens, context)
        batch = paged_row(device, context=min(context, 1000))
    middle, slowest = statistics.median(ours), max(ours)
    differs = float((result.float() - plain.float()).abs().max())
    plans = statistics.median(stock) / middle
    return [
        Row("D1", "cuDNN builds a plan for every length", "confirmed" if plans > SLOW else "refuted",
            f"torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}, order {order}: "  # type: ignore[no-untyped-call]
            f"{statistics.median(stock):.2f} ms a new length, without cuDNN {middle:.3f}"),
        Row("D1", "no length is slow without it", "holds" if slowest < max(SLOW * middle, middle + 1) else "fails",
            f"{steps} lengths: median {middle:.3f} ms, slowest {slowest:.3f}"),
        Row("D13", "with a mask, a slow kernel and scores in memory", "confirmed" if masked > 2 * flash else "refuted",
            f"{tokens} tokens of {context}: {masked:.2f} ms, {taken:.2f} GB ({kernel})"),
        Row("D13", "flash attention is taken, and right",
            "holds" if way is Prefill.FLASH and differs < 0.05 else "fails",
            f"{way.value}: {flash:.2f} ms, {less:.2f} GB ({other}); differs by {differs:.4f} at most"),
        batch,
    ]  # fmt: skip


if __name__ == "__main__":
    answer(rows(torch.device("cuda", 0)))
