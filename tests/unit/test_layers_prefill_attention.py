"""Which way a chunk of a prompt attends, and that a way which doesn't work is left out."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from lockstep_runtime.layers import prefill_attention
from lockstep_runtime.layers.prefill_attention import ATTEND, Prefill, attend_masked, candidate, choose_prefill, trial

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "expected"),
    [
        (CUDA, torch.bfloat16, 128, Prefill.FLASH),
        (CUDA, torch.float16, 64, Prefill.FLASH),
        (CUDA, torch.bfloat16, 256, Prefill.FLASH),
        (CUDA, torch.float32, 128, Prefill.MASKED),
        (CUDA, torch.bfloat16, 100, Prefill.MASKED),
        (CUDA, torch.bfloat16, 288, Prefill.MASKED),
        (CPU, torch.bfloat16, 128, Prefill.MASKED),
    ],
)
def test_the_fastest_way_there_may_be(
    device: torch.device, dtype: torch.dtype, head_dim: int, expected: Prefill
) -> None:
    assert candidate(device, dtype, head_dim) is expected


def test_a_way_that_gives_the_same_passes_the_trial() -> None:
    assert trial(attend_masked, CPU, torch.float32, 16) is None
    assert trial(attend_masked, CPU, torch.bfloat16, 128) is None


def upper_left(queries: Tensor, keys: Tensor, values: Tensor, out: Tensor) -> None:
    """Causal as torch's `is_causal` is: the first query sees the first key alone."""
    tokens = queries.shape[0]
    attend_masked(queries, keys[:, :, :tokens], values[:, :, :tokens], out)


def test_one_that_masks_from_the_wrong_corner_does_not() -> None:
    assert trial(upper_left, CPU, torch.float32, 16) == "its result differs from the plain one's"


def test_one_that_raises_is_left_out_with_a_line_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(queries: Tensor, keys: Tensor, values: Tensor, out: Tensor) -> None:
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")

    monkeypatch.setattr(prefill_attention, "candidate", lambda *_: Prefill.FLASH)  # as on a GPU
    monkeypatch.setitem(ATTEND, Prefill.FLASH, refuse)
    with caplog.at_level(logging.WARNING):
        assert choose_prefill(CPU, torch.float32, 16) is Prefill.MASKED
    assert "FlashAttention only supports Ampere" in caplog.text
    monkeypatch.setitem(ATTEND, Prefill.FLASH, attend_masked)
    assert choose_prefill(CPU, torch.float32, 16) is Prefill.FLASH
