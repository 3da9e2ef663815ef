"""Every kernel that this machine can run, run; and the trial of kernels that don't work."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from lockstep_runtime.layers.matmul_kernels import (
    ONEDNN_BATCH,
    Kernel,
    Multiply,
    candidates,
    choose_kernel,
    trial,
    within_float16,
)  # fmt: skip
from lockstep_runtime.layers.matrix import PACKED_WINDOW_BYTES, PackedMatrix
from lockstep_runtime.weights.sharding import replicated

CPU = torch.device("cpu")
HALVES = (torch.bfloat16, torch.float16)
KERNELS = [pytest.param(dtype, kernel, id=f"{kernel.name}-{dtype}") for dtype in HALVES for kernel in candidates(dtype)]


def runnable(kernel: Kernel) -> Kernel:
    if (trouble := trial(kernel)) is not None:
        pytest.skip(f"this machine or torch can't run it: {trouble}")
    return kernel


@pytest.mark.parametrize(("dtype", "kernel"), KERNELS)
@pytest.mark.parametrize("outputs", [1, 16, 37, 300])
@pytest.mark.parametrize("batch", [1, 2, ONEDNN_BATCH, 33])
def test_a_kernel_multiplies(dtype: torch.dtype, kernel: Kernel, outputs: int, batch: int) -> None:
    multiply = runnable(kernel).pack
    rows, x = torch.randn(outputs, 100).to(dtype), torch.randn(batch, 100).to(kernel.activation)
    with torch.inference_mode():
        product = multiply(rows.to(kernel.rows))(x)
        again = multiply(rows.to(kernel.rows))(x)
    assert product.dtype == kernel.activation
    assert torch.equal(product, again)
    eps = torch.finfo(kernel.activation).eps
    torch.testing.assert_close(product.float(), F.linear(x.float(), rows.float()), rtol=2 * eps, atol=1e-4)


@pytest.mark.parametrize(("dtype", "kernel"), KERNELS)
def test_a_matrix_of_several_windows_is_one(dtype: torch.dtype, kernel: Kernel) -> None:
    columns = 2048
    rows = torch.randn(PACKED_WINDOW_BYTES // (columns * 4) + 21, columns).to(dtype)
    packed = PackedMatrix(replicated("w", *rows.shape), kernel=runnable(kernel))
    x = torch.randn(3, columns).to(kernel.activation)
    with torch.inference_mode():
        packed.attach(rows)
        product = packed(x)
    expected = F.linear(x.float(), rows.float())
    torch.testing.assert_close(product.float(), expected, rtol=2 * torch.finfo(product.dtype).eps, atol=1e-3)


def test_values_beyond_float16_stay_exact() -> None:
    rows, x = torch.randn(32, 16), torch.randn(3, 16)
    rows[5, 5] = 1e6

    def never(rows: Tensor) -> Multiply:
        raise AssertionError("packed, though float16 has no such value")

    torch.testing.assert_close(within_float16(never, rows)(x), x @ rows.T)


def wrong(kernel: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Multiply]:
    return lambda rows: lambda x: kernel(F.linear(x, rows))


def no_such_operator(rows: Tensor) -> Multiply:
    packed = torch.ops.mkldnn._an_operator_of_another_torch(rows)
    return lambda x: F.linear(x, packed)


def raises_when_called(rows: Tensor) -> Multiply:
    def multiply(x: Tensor) -> Tensor:
        raise RuntimeError("the CPU can't do that")

    return multiply


BROKEN = {
    "no such operator": (no_such_operator, "AttributeError: "),
    "raises when called": (raises_when_called, "RuntimeError: the CPU can't do that"),
    "refuses the rows": (lambda rows: wrong(lambda y: y)(rows.view(7, 7)), "RuntimeError: shape"),
    "one value off": (wrong(lambda y: y.index_fill(1, torch.tensor([7]), 0.5)), "differs from F.linear's"),
    "all a little off": (wrong(lambda y: y * 1.02), "differs from F.linear's"),
    "not finite": (wrong(lambda y: y / 0), "differs from F.linear's"),
    "another shape": (wrong(lambda y: y[:, :-1]), "differs from F.linear's"),
    "another type": (wrong(lambda y: y.double()), "differs from F.linear's"),
    "only one row right": (wrong(lambda y: y[:1].expand_as(y)), "product of 3 rows differs from F.linear's"),
}


@pytest.mark.parametrize("if_native", [True, False])
def test_a_kernel_that_multiplies_in_float32_is_not_native(if_native: bool) -> None:
    def pack(rows: Tensor) -> Multiply:
        return lambda x: F.linear(x.float(), rows.float()).to(x.dtype)

    through_float32 = Kernel(
        name="float32", rows=torch.bfloat16, activation=torch.bfloat16, pack=pack, if_native=if_native
    )
    assert trial(through_float32) == ("the CPU has no multiplication in torch.bfloat16" if if_native else None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", BROKEN)
def test_a_kernel_that_does_not_work_is_left_out(
    name: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    pack, reason = BROKEN[name]
    broken = Kernel(name=name, rows=dtype, activation=dtype, pack=pack)
    right = Kernel(name="right", rows=dtype, activation=dtype, pack=wrong(lambda y: y))
    with caplog.at_level(logging.INFO):
        assert choose_kernel([broken, right, broken]) is right
        assert choose_kernel([broken]) is None
    (first, _) = caplog.messages
    assert first.startswith(f"matrices can't be multiplied by {name} here: ")
    assert reason in first


SMALLER = [
    pytest.param({"ATEN_CPU_CAPABILITY": "avx2"}, None, id="torch's own kernels of AVX2"),
    pytest.param({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, "FBGEMM float16", id="AVX-512 that knows no bfloat16"),
    pytest.param({"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}, "FBGEMM float16", id="AVX2"),
    pytest.param({"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}, "FBGEMM float16", id="SSE"),
]
TELL_AND_TEST = """
import sys, pytest, torch
from lockstep_runtime.layers.placement import choose_placement
kernel = choose_placement(torch.device("cpu"), torch.bfloat16).kernel
print(kernel.name, torch.backends.cpu.get_cpu_capability(), flush=True)
sys.exit(pytest.main(sys.argv[1:]))
"""


@pytest.mark.skipif("AVX512" not in torch.backends.cpu.get_cpu_capability(), reason="this CPU is no larger than those")
@pytest.mark.parametrize(("variables", "chosen"), SMALLER)
def test_a_large_cpu_acts_as_a_smaller_one(variables: dict[str, str], chosen: str | None) -> None:
    """torch's own kernels obey one variable, oneDNN another; FBGEMM neither. What oneDNN then refuses is not used."""
    environment = {**os.environ, **variables, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    with_model = [str(Path(__file__).with_name("test_models_qwen3.py"))] if "AVX2" in variables.values() else []
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "not smaller_one and not transformers"]
    first, _, said = run_python(["-c", TELL_AND_TEST, *options, __file__, *with_model], environment).partition("\n")
    told = first.split()
    assert told[-1] == {"avx2": "AVX2", "default": "DEFAULT"}.get(variables.get("ATEN_CPU_CAPABILITY", ""), "AVX512")
    assert chosen is None or told[:-1] == chosen.split()
    assert " passed" in said
    print(said)  # what was skipped, and why


def run_python(arguments: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
