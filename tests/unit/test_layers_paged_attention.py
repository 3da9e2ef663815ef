"""The paged kernels of GPUs, on a machine without one.

Interpreted, against attention sequence by sequence; compiled ahead for the GPUs that there are; and left out where they
don't work. Triton's interpreter computes no bfloat16.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lockstep_runtime.layers import attention_choice
from lockstep_runtime.layers.attention import AttendLayer, SequenceAttention
from lockstep_runtime.layers.attention_choice import choose_attention, differs
from lockstep_runtime.layers.cache import BLOCK_SIZE, LayerCache, PagedShape
from lockstep_runtime.layers.paged_attention import DECODE_ROWS, EXACT_KEYS, EXACT_ROWS, KEYS, PREFILL_ROWS, splits_for
from lockstep_runtime.layers.paged_kernels import attend_tile, join_splits
from lockstep_runtime.layers.placement import Placement
from lockstep_runtime.protocol.step import SequenceSlice

CPU = torch.device("cpu")
SHAPE = PagedShape(kv_heads=2, head_dim=16, sharing=3)
GPU = Placement(device=torch.device("cuda", 0), dtype=torch.bfloat16, activation=torch.bfloat16)
TARGETS = {"A100": 80, "H100, H200": 90, "B200": 100}
BYTES_PER_BLOCK = {
    80: 163 << 10,
    90: 227 << 10,
    100: 227 << 10,
}  # of shared memory (CUDA C++ Programming Guide, table 30)


def test_the_kernels_agree_with_attention_sequence_by_sequence() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tests.support.paged_interpreted"],
        capture_output=True, text=True, timeout=600, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout)
    assert found["trial"] is None
    assert len(found["cases"]) == 16
    wrong = {case: error for case, error in found["cases"].items() if not error < (2e-3 if "16" in case[-3:] else 2e-6)}
    assert wrong == {}


@pytest.mark.parametrize("capability", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize(
    ("dtype", "rows", "keys", "split"),
    [("bf16", DECODE_ROWS, KEYS, True), ("bf16", PREFILL_ROWS, KEYS, False), ("fp32", EXACT_ROWS, EXACT_KEYS, False)],
)
def test_it_compiles_for_the_gpus_that_there_are(
    capability: int, dtype: str, rows: int, keys: int, split: bool
) -> None:
    pointer, counts = f"*{dtype}", "*i32"
    signature = dict.fromkeys(("out", "queries", "keys", "values"), pointer)
    signature |= dict.fromkeys(("parts", "sums"), "*fp32" if split else pointer)
    signature |= dict.fromkeys(("tiles", "tables", "contexts", "starts"), counts)
    signature |= {"scale": "fp32"}
    signature |= dict.fromkeys(("table_stride", "query_stride", "slot_stride", "tokens", "splits"), "i32")
    constants = {
        "HEAD_DIM": 128, "WIDTH": 128, "SHARING": 4, "ROWS": rows, "KEYS": keys, "BLOCK_SIZE": BLOCK_SIZE,
        "SPLIT": split, "PRECISION": "ieee",
    }  # fmt: skip
    compiled = compile_for(capability, attend_tile, signature, constants)
    assert f".target sm_{capability}" in compiled.asm["ptx"]
    assert compiled.metadata.shared <= BYTES_PER_BLOCK[capability], "of shared memory, which a launch would not get"
    assert len(compiled.asm["cubin"]) > 1000


@pytest.mark.parametrize("capability", TARGETS.values(), ids=TARGETS)
def test_so_does_what_joins_the_parts(capability: int) -> None:
    signature = {"out": "*bf16", "parts": "*fp32", "sums": "*fp32", "rows": "i32", "splits": "i32"}
    compiled = compile_for(capability, join_splits, signature, {"HEAD_DIM": 128, "WIDTH": 128, "SPLITS": 32})
    assert f".target sm_{capability}" in compiled.asm["ptx"]


def compile_for(
    capability: int, kernel: object, signature: dict[str, str], constants: dict[str, object]
) -> triton.compiler.CompiledKernel:
    named = {**signature, **dict.fromkeys(constants, "constexpr")}
    ordered = {name: named[name] for name in kernel.arg_names}  # type: ignore[attr-defined]
    source = ASTSource(fn=kernel, signature=ordered, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": True})


@pytest.mark.parametrize(
    ("programs", "context", "splits"),
    [(8, 100, 1), (8, 1024, 4), (8, 100_000, 32), (64, 100_000, 4), (512, 100_000, 1), (1, 600, 2)],
)
def test_keys_are_split_where_a_small_batch_would_leave_a_gpu_idle(programs: int, context: int, splits: int) -> None:
    assert splits_for(programs, context) == splits


class Broken:
    """What it is like where a kernel is wrong, or can't run."""

    def __init__(self, error: Exception | None) -> None:
        self._error = error

    def plan(self, sequences: Sequence[SequenceSlice], device: torch.device) -> AttendLayer:
        plain = SequenceAttention().plan(sequences, device)

        def attend(queries: Tensor, cache: LayerCache) -> Tensor:
            if self._error is not None:
                raise self._error
            return plain(queries, LayerCache(cache.keys, cache.values.roll(1, 0)))

        return attend


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (None, "its result differs from the plain one's"),
        (RuntimeError("no kernel image"), "RuntimeError: no kernel image"),
    ],
)
def test_one_that_is_wrong_or_raises_is_left_out(error: Exception | None, said: str) -> None:
    assert differs(SequenceAttention(), CPU, torch.float32, SHAPE) is None
    assert differs(Broken(error), CPU, torch.float32, SHAPE) == said


def test_without_a_gpu_that_can_run_it_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a GPU: the trial is real, and fails here, for want of one."""
    with caplog.at_level(logging.WARNING):
        chosen = choose_attention(GPU, SHAPE)
    assert isinstance(chosen, SequenceAttention)
    assert "attention goes sequence by sequence" in caplog.text
    monkeypatch.setattr(attention_choice, "differs", lambda *_: None)
    assert type(choose_attention(GPU, SHAPE)).__name__ == "PagedAttention"


def test_triton_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "lockstep_runtime.layers.paged_attention")
    found = attention_choice.paged_attention()
    assert isinstance(found, str)
    assert "triton" in found
