"""The CUDA path as far as it goes without a GPU: which device, how much of it, and no tensor left on the host."""

from __future__ import annotations

import pytest
import torch
from tests.support.models import ModelShape
from tests.support.ranks import piece
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from lockstep_runtime.cli import UsageError, build_parser, config_from
from lockstep_runtime.config import Backend, Device, ServeConfig
from lockstep_runtime.layers.batch import build_batch
from lockstep_runtime.layers.cache import KVCache
from lockstep_runtime.layers.placement import choose_placement
from lockstep_runtime.layers.weight import PlainWeight, stacked_rows
from lockstep_runtime.models.qwen3 import Qwen3
from lockstep_runtime.parallel.group import SingleGroup, choose_backend
from lockstep_runtime.weights.errors import ModelError
from lockstep_runtime.weights.plan import Shard
from lockstep_runtime.worker.device import choose_device, sharers
from lockstep_runtime.worker.memory import cuda_budget

GIB = 2**30
CUDA = torch.device("cuda", 0)


def config(device: Device = "auto", ranks_per_pod: int = 2, backend: Backend = "auto") -> ServeConfig:
    return ServeConfig(
        model="m", served_name="m", tensor_parallel_size=4, ranks_per_pod=ranks_per_pod, device=device, backend=backend
    )


@pytest.mark.parametrize(
    ("device", "backend", "rank", "visible", "expected"),
    [
        ("auto", "gloo", 1, 4, "cpu"),
        ("cpu", "gloo", 1, 4, "cpu"),
        ("auto", "nccl", 1, 2, "cuda:1"),
        ("auto", "nccl", 2, 2, "cuda:0"),  # the first rank of the second pod
        ("cuda", "nccl", 3, 8, "cuda:1"),
        ("cuda", "gloo", 0, 1, "cuda:0"),
        ("cuda", "gloo", 1, 1, "cuda:0"),  # two ranks share it
        ("cuda", "gloo", 3, 2, "cuda:1"),
    ],
)
def test_the_device_of_a_rank(device: Device, backend: str, rank: int, visible: int, expected: str) -> None:
    assert choose_device(config(device), backend, rank, visible) == torch.device(expected)


def test_too_few_gpus_are_told_in_a_sentence() -> None:
    with pytest.raises(ModelError, match="rank 1 needs a GPU of its own: 2 ranks run here, and CUDA sees 1"):
        choose_device(config(), "nccl", 1, 1)
    with pytest.raises(ModelError, match="CUDA sees none"):
        choose_device(config("cuda"), "gloo", 0, 0)


def test_the_backend_follows_the_device() -> None:
    assert choose_backend(config("cpu")) == "gloo"
    assert choose_backend(config("cpu", backend="nccl")) == "nccl"  # which the command line refuses
    assert choose_backend(config("cuda", backend="gloo")) == "gloo"


def test_the_command_line_takes_a_device() -> None:
    parse = build_parser({"LOCKSTEP_DEVICE": "cuda"}).parse_args
    assert config_from(parse(["serve", "m", "--backend", "gloo"])).device == "cuda"
    assert config_from(parse(["serve", "m", "--device", "cpu"])).device == "cpu"
    with pytest.raises(UsageError, match="nccl computes on GPUs"):
        config_from(parse(["serve", "m", "--backend", "nccl", "--device", "cpu"]))


def test_a_gpu_of_its_own_is_used_but_for_a_tenth() -> None:
    assert cuda_budget(free=70 * GIB, total=80 * GIB, used=9 * GIB, sharers=1) == 62 * GIB
    assert cuda_budget(free=5 * GIB, total=80 * GIB, used=9 * GIB, sharers=1) == 0


def test_ranks_that_share_a_gpu_leave_the_others_their_part() -> None:
    """The first to look sees all of it free."""
    assert [sharers(config(ranks_per_pod=ranks), visible) for ranks, visible in ((2, 1), (4, 2), (2, 2), (1, 8))] == [
        2, 2, 1, 1,
    ]  # fmt: skip
    first = cuda_budget(free=78 * GIB, total=80 * GIB, used=GIB, sharers=2)
    second = cuda_budget(free=77 * GIB - first, total=80 * GIB, used=GIB, sharers=2)
    assert first == 35 * GIB
    assert 0 < second <= first
    assert first + second + 3 * GIB <= 80 * GIB


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [1, 2])
def test_the_model_computes_wholly_on_its_device(dtype: str, size: int) -> None:
    """With tensors that have a shape and a device, but no memory: mixing devices raises as on a GPU."""
    shape = ModelShape(bias=True, dtype=dtype)
    placement = choose_placement(CUDA, getattr(torch, dtype))
    with FakeTensorMode(shape_env=ShapeEnv()), torch.inference_mode():
        model = Qwen3.build(shape.config(), Shard(0, size), placement)
        for weight in model.weights():
            assert isinstance(weight, PlainWeight)
            rows, rest = stacked_rows(weight.cuts), weight.cuts[0].local_shape[1:]
            weight.data = torch.empty((rows, *rest), dtype=placement.dtype, device=CUDA)
        model.loaded()
        cache = KVCache(model.cache_shape, 8, placement)
        apart = piece(1, 33, [1], [5, 3])  # blocks that don't lie side by side
        batch = build_batch([piece(0, 0, [1, 2, 3], [0]), apart], CUDA)
        group = SingleGroup()  # of several ranks, too, each sums alone here
        hidden = model.forward(batch, cache, group)[batch.last]
        logits, best = model.logits(hidden, group), model.best(hidden, group)
    assert logits is not None
    assert best is not None
    found: list[Tensor] = [hidden, logits, *best]
    assert {tensor.device for tensor in found} == {CUDA}
    assert hidden.shape == (2, shape.hidden)
