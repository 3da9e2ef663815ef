"""How the tokens of a chunk of a prompt attend to their context, and which way this machine can use."""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable
from typing import Final

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from lockstep_runtime.layers.trial import DIFFERS, failure_of

logger = logging.getLogger(__name__)

TILE: Final = 512  # queries at once: bounds the mask, and skips most of what is masked
FLASH_WIDEST: Final = 256  # head_dim
TRIED_TOKENS, TRIED_CONTEXT, TRIED_HEADS, TRIED_KV_HEADS = 5, 37, 4, 2
Attend = Callable[[Tensor, Tensor, Tensor, Tensor], None]


class Prefill(enum.Enum):
    MASKED = "masked"  # scores with a mask, some hundred queries at once
    FLASH = "flash"  # torch's flash attention: no mask, no scores in memory


def attend_masked(queries: Tensor, keys: Tensor, values: Tensor, out: Tensor) -> None:
    """queries and out: [tokens, heads, head_dim], the context's last; keys and values: [1, kv_heads, context,
    head_dim]."""
    tokens, context = queries.shape[0], keys.shape[2]
    for start in range(0, tokens, TILE):
        stop = min(start + TILE, tokens)
        seen = context - tokens + stop
        mask = _causal_mask(stop - start, seen, queries)
        result = F.scaled_dot_product_attention(
            queries[None, start:stop].transpose(1, 2), keys[:, :, :seen], values[:, :, :seen],
            attn_mask=mask, enable_gqa=True,
        )  # fmt: skip
        out[start:stop].copy_(result[0].transpose(0, 1))


def attend_flash(queries: Tensor, keys: Tensor, values: Tensor, out: Tensor) -> None:
    """The same. Causal means from the lower right to this op (torch/nn/attention/bias.py), and it shares kv heads."""
    result = torch.ops.aten._scaled_dot_product_flash_attention(queries[None].transpose(1, 2), keys, values, 0.0, True)[
        0
    ]
    out.copy_(result[0].transpose(0, 1))


ATTEND: Final[dict[Prefill, Attend]] = {Prefill.MASKED: attend_masked, Prefill.FLASH: attend_flash}


def candidate(device: torch.device, dtype: torch.dtype, head_dim: int) -> Prefill:
    """The fastest way that there may be. On a GPU the masked one ends in torch's plain kernels, which keep all scores
    in float32: gigabytes for a long context. Pure."""
    half = dtype in (torch.bfloat16, torch.float16)
    fits = head_dim % 8 == 0 and head_dim <= FLASH_WIDEST
    return Prefill.FLASH if device.type == "cuda" and half and fits else Prefill.MASKED


def choose_prefill(device: torch.device, dtype: torch.dtype, head_dim: int) -> Prefill:
    """The candidate, if it works here."""
    chosen = candidate(device, dtype, head_dim)
    if chosen is not Prefill.MASKED and (failure := trial(ATTEND[chosen], device, dtype, head_dim)):
        logger.warning("long prompts are slower here: no flash attention: %s", failure)
        return Prefill.MASKED
    return chosen


def trial(attend: Attend, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Attend to a small context in both ways; returns what is wrong."""
    return failure_of(lambda: _failure(attend, device, dtype, head_dim))


def _failure(attend: Attend, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    queries = numbers(TRIED_TOKENS, TRIED_HEADS, head_dim)
    keys, values = (numbers(TRIED_CONTEXT, TRIED_KV_HEADS, head_dim).transpose(0, 1)[None] for _ in range(2))
    found, expected = torch.empty_like(queries), torch.empty_like(queries, dtype=torch.float32)
    attend(queries, keys, values, found)
    attend_masked(queries.float(), keys.float(), values.float(), expected)
    tolerance = 4 * torch.finfo(dtype).eps
    return None if torch.allclose(found.float(), expected, rtol=tolerance, atol=tolerance) else DIFFERS


def _causal_mask(queries: int, seen: int, like: Tensor) -> Tensor:
    """Added to the scores: the queries are the last of what is seen, and see nothing after themselves."""
    mask = torch.full((queries, seen), float("-inf"), dtype=like.dtype, device=like.device)
    return mask.triu_(seen - queries + 1)
