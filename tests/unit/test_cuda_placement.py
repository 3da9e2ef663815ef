"""The CUDA path as far as it goes without a GPU: which device, how much of it, and no tensor left on the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.support.command_line import configuration
from tests.support.models import ModelShape
from tests.support.ranks import piece
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lockstep_runtime.config import Backend, Device, ServeConfig, UsageError
from lockstep_runtime.distributed.join import SingleCommunicator, choose_backend
from lockstep_runtime.layers.attention import SequenceAttention
from lockstep_runtime.layers.batch import build_batch
from lockstep_runtime.layers.cache import CacheSize, KVCache
from lockstep_runtime.layers.embedding import VocabularyEmbedding
from lockstep_runtime.layers.placement import Placement
from lockstep_runtime.layers.prefill_attention import candidate
from lockstep_runtime.layers.weight import PlainWeight
from lockstep_runtime.models.registry import Model, build_model
from lockstep_runtime.protocol.bus import LoadFailure
from lockstep_runtime.sources.errors import ModelError
from lockstep_runtime.weights.sharding import RankInfo
from lockstep_runtime.weights.weight import stacked_rows
from lockstep_runtime.worker.device import choose_device, sharers
from lockstep_runtime.worker.fault_classifier import load_failure
from lockstep_runtime.worker.fingerprint import on_host
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
        ("auto", "cpu", 1, 4, "cpu"),
        ("cpu", "cpu", 1, 4, "cpu"),
        ("auto", "nccl", 1, 2, "cuda:1"),
        ("auto", "nccl", 2, 2, "cuda:0"),  # the first rank of the second pod
        ("cuda", "nccl", 3, 8, "cuda:1"),
        ("cuda", "cpu", 0, 1, "cuda:0"),
        ("cuda", "cpu", 1, 1, "cuda:0"),  # two ranks share it
        ("cuda", "cpu", 3, 2, "cuda:1"),
    ],
)
def test_the_device_of_a_rank(device: Device, backend: str, rank: int, visible: int, expected: str) -> None:
    assert choose_device(config(device), backend, rank, visible) == torch.device(expected)


def test_too_few_gpus_are_told_in_a_sentence() -> None:
    with pytest.raises(ModelError, match="rank 1 needs a GPU of its own: 2 ranks run here, and CUDA sees 1") as few:
        choose_device(config(), "nccl", 1, 1)
    with pytest.raises(ModelError, match="CUDA sees none") as none:
        choose_device(config("cuda"), "cpu", 0, 0)
    assert {load_failure(few.value), load_failure(none.value)} == {LoadFailure.DEVICE_LOST}


def test_the_backend_follows_the_device() -> None:
    assert choose_backend(config("cpu")) == "cpu"
    assert choose_backend(config("cpu", backend="nccl")) == "nccl"  # which the command line refuses
    assert choose_backend(config("cuda", backend="cpu")) == "cpu"


def test_the_command_line_takes_a_device() -> None:
    variables = {"LOCKSTEP_DEVICE": "cuda"}
    assert configuration(["serve", "m", "--backend", "cpu"], variables).device == "cuda"
    assert configuration(["serve", "m", "--device", "cpu"], variables).device == "cpu"
    with pytest.raises(UsageError, match="nccl computes on GPUs"):
        configuration(["serve", "m", "--backend", "nccl", "--device", "cpu"], variables)


def test_a_gpu_of_its_own_is_used_but_for_a_tenth() -> None:
    assert cuda_budget(free=70 * GIB, total=80 * GIB, used=9 * GIB, sharers=1, step=0) == 62 * GIB
    assert cuda_budget(free=5 * GIB, total=80 * GIB, used=9 * GIB, sharers=1, step=0) == 0


def test_ranks_that_share_a_gpu_leave_the_others_their_part() -> None:
    """The first to look sees all of it free."""
    assert [sharers(config(ranks_per_pod=ranks), visible) for ranks, visible in ((2, 1), (4, 2), (2, 2), (1, 8))] == [
        2, 2, 1, 1,
    ]  # fmt: skip
    first = cuda_budget(free=78 * GIB, total=80 * GIB, used=GIB, sharers=2, step=0)
    second = cuda_budget(free=77 * GIB - first, total=80 * GIB, used=GIB, sharers=2, step=0)
    assert first == 35 * GIB
    assert 0 < second <= first
    assert first + second + 3 * GIB <= 80 * GIB


EXPERTS = {
    "architectures": ["Qwen3MoeForCausalLM"], "moe_intermediate_size": 32, "num_experts": 6, "num_experts_per_tok": 2
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {"dense": {}, "experts": EXPERTS, "experts in turn": EXPERTS}


def on_a_gpu(name: str, dtype: str, shard: RankInfo) -> tuple[Model, Placement]:
    """Of tensors without memory; "in turn": where there is no grouped product."""
    settings = ModelShape(bias=True, dtype=dtype).config() | MODELS[name]
    placement = Placement(
        device=CUDA, dtype=getattr(torch, dtype), activation=getattr(torch, dtype), grouped=not name.endswith("in turn")
    )
    model = build_model(settings, shard, placement)
    for weight in model.weights():
        assert isinstance(weight, PlainWeight)
        rows, rest = stacked_rows(weight.slices), weight.slices[0].local_shape[1:]
        weight.data = torch.empty((rows, *rest), dtype=placement.dtype, device=CUDA)
    model.loaded()
    return model, placement


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_the_model_computes_wholly_on_its_device(dtype: str, size: int, name: str) -> None:
    """With tensors that have a shape and a device, but no memory: mixing devices raises as on a GPU."""
    with FakeTensorMode(shape_env=ShapeEnv()), torch.inference_mode():
        model, placement = on_a_gpu(name, dtype, RankInfo(0, size))
        cache = KVCache(model.cache_shape, CacheSize(blocks=8), placement)
        apart = piece(1, 33, [1], [5, 3])  # blocks that don't lie side by side
        batch = build_batch([piece(0, 0, [1, 2, 3], [0]), apart], CUDA)
        group = SingleCommunicator()  # of several ranks, too, each sums alone here
        hidden = model.forward(batch, cache, group)[batch.last]
        logits, best = model.logits(hidden, group), model.best(hidden, group)
    assert logits is not None
    assert best is not None
    found: list[Tensor] = [hidden, logits, *best]
    assert {tensor.device for tensor in found} == {CUDA}
    assert hidden.shape == (2, ModelShape().hidden)


WAITING = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal")


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every operation that makes the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [one for one in pytree.tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        leaves = isinstance(result, Tensor) and result.is_cpu and any(not one.is_cpu for one in tensors)
        if leaves or func.overloadpacket.__name__ in WAITING:
            self.waits.append(str(func))
        return result


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_has_static_shapes_and_waits_for_the_device_once(size: int, dtype: str, tokens: int, name: str) -> None:
    """Without a shape environment a shape that depends on a value raises; so a step could be captured in a graph."""
    with FakeTensorMode(), torch.inference_mode():
        model, placement = on_a_gpu(name, dtype, RankInfo(0, size))
        kind = candidate(CUDA, placement.activation, ModelShape().head_dim)
        cache = KVCache(model.cache_shape, CacheSize(blocks=8), placement)
        slices = [piece(1, 33, list(range(tokens)), [1, 2]), piece(2, 3, [7], [3])]
        batch = build_batch(slices, CUDA, SequenceAttention(kind))
        group = SingleCommunicator()
        with Watch() as watch:
            states = model.forward(batch, cache, group)
            hidden = states[batch.last]
            model.best(hidden, group)
            model.logits(hidden, group)
            assert watch.waits == []
            on_host(states, hidden)
    assert len(watch.waits) == 1, watch.waits


def test_a_shape_that_depends_on_a_value_would_be_noticed() -> None:
    with FakeTensorMode(), pytest.raises(DynamicOutputShapeException):
        torch.ones(3, device=CUDA).nonzero()
    with FakeTensorMode(shape_env=ShapeEnv()), torch.inference_mode(), Watch() as watch:
        ones = torch.ones(3, device=CUDA)
        ones.nonzero()
        ones.sum().item()
        ones.cpu()
    assert [name.split(".")[1] for name in watch.waits] == ["nonzero", "item", "to"]


@pytest.mark.parametrize(("vocabulary", "size"), [(5, 4), (8, 4), (7, 2)])
def test_the_ranks_rows_of_an_embedding_add_up_to_the_table(vocabulary: int, size: int) -> None:
    """Exactly: of every token one rank has the row, and the others nothing, whatever stands in theirs."""
    table = torch.randn(vocabulary, 6)
    table[0, 1] = table[-1, 2] = float("inf")  # rows that stand in for others' while they are masked
    tokens = torch.tensor([1, 0, vocabulary - 2, 1, vocabulary - 1])
    placement = Placement(device=torch.device("cpu"), dtype=torch.float32, activation=torch.float32)
    total = torch.zeros(len(tokens), 6)
    for rank in range(size):
        embedding = VocabularyEmbedding("embed.weight", vocabulary, 6, RankInfo(rank, size), placement)
        assert isinstance(embedding.table, PlainWeight)
        tensor_slice = embedding.table.slices[0]
        embedding.table.data = table[tensor_slice.start : tensor_slice.start + tensor_slice.rows]
        total += embedding(tokens, SingleCommunicator())
    assert torch.equal(total, table[tokens])
