"""Qwen3 split over ranks, held against transformers' on the same generated weights."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.agreement import Oracle, agree, agree_in_bfloat16, dense
from tests.support.models import ModelShape, write_model
from tests.support.ranks import Ranks, everything, piece
from torch import Tensor
from transformers import Qwen3ForCausalLM

from lockstep_runtime.distributed.join import SingleCommunicator
from lockstep_runtime.layers.batch import build_batch
from lockstep_runtime.layers.cache import CacheSize, KVCache
from lockstep_runtime.layers.matmul_kernels import Kernel, candidates, trial
from lockstep_runtime.layers.placement import Placement, choose_placement, place
from lockstep_runtime.models.registry import build_model
from lockstep_runtime.sources.errors import ModelError
from lockstep_runtime.sources.model_folder import read_config
from lockstep_runtime.weights.load import load_weights
from lockstep_runtime.weights.sharding import RankInfo

CPU = torch.device("cpu")

SHAPES = {
    "small": ModelShape(),
    "tied, biased, odd vocabulary": ModelShape(tied=True, bias=True, vocabulary=257, hidden=40, intermediate=72),
    "one kv head": ModelShape(heads=8, kv_heads=1, head_dim=8, layers=3, vocabulary=97),
    "wide heads, uneven mlp": ModelShape(heads=4, kv_heads=4, head_dim=32, hidden=36, intermediate=50, tied=True),
    "vocabulary of fewer rows than padding": ModelShape(vocabulary=9, heads=4, kv_heads=2),
}
ROPES = {
    "yarn": ModelShape(
        max_positions=256,
        rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ),
    "linear rope": ModelShape(rope_scaling={"rope_type": "linear", "factor": 2.0}),
    "llama3 rope": ModelShape(
        max_positions=256,
        rope_scaling={
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @functools.cache
    def make(name: str) -> Oracle:
        return Oracle(write_model(tmp_path_factory.mktemp("model"), (SHAPES | ROPES)[name], shards=3), Qwen3ForCausalLM)

    return make


@pytest.mark.parametrize(
    ("name", "size"), [*((name, size) for name in SHAPES for size in (1, 2, 4)), *((name, 2) for name in ROPES)]
)
def test_it_agrees_with_transformers(models: Any, name: str, size: int) -> None:
    agree(models(name), size)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_in_bfloat16_it_is_as_near_as_transformers(tmp_path: Path, size: int) -> None:
    path = write_model(tmp_path, ModelShape(dtype="bfloat16", hidden=64, layers=3))
    agree_in_bfloat16(path, Qwen3ForCausalLM, size)


def test_a_long_chunk_is_attended_in_tiles(models: Any) -> None:
    shape = SHAPES["small"]
    oracle = models("small")
    prompt = oracle.prompt(1300)
    with Ranks(oracle.path, 2) as ranks:
        ranks.step(piece(1, 0, prompt[:100], list(range(41))))
        output = ranks.step(piece(1, 100, prompt[100:], list(range(41)), everything(shape.vocabulary)))
    mine = dense(output.sampled[0], shape.vocabulary)
    torch.testing.assert_close(mine, oracle.logprobs(prompt)[-1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("tied", [True, False])
def test_half_precision_checkpoints_stay_close_to_float32(tmp_path: Path, dtype: str, tied: bool) -> None:
    """Weights in half precision on both sides; the oracle computes in float32, we as this machine does best."""
    shape = ModelShape(dtype=dtype, tied=tied, hidden=64)
    path = write_model(tmp_path, shape)
    oracle = Oracle(path, Qwen3ForCausalLM)
    prompt = oracle.prompt(50)
    with Ranks(path, 2) as ranks:
        output = ranks.step(piece(1, 0, prompt, [0, 1], everything(shape.vocabulary)))
        ranks.greedy(prompt, 3, [0, 1])
    mine = dense(output.sampled[0], shape.vocabulary)
    torch.testing.assert_close(mine, oracle.logprobs(prompt)[-1], atol=0.1, rtol=0)


PACKED = [
    pytest.param(dtype, kernel, id=f"{kernel.name}-{dtype}")
    for dtype in (torch.bfloat16, torch.float16)
    for kernel in candidates(dtype)
]


@pytest.mark.parametrize(("dtype", "kernel"), PACKED)
@pytest.mark.parametrize("tied", [True, False])
def test_a_whole_model_computes_with_any_kernel(tmp_path: Path, dtype: torch.dtype, kernel: Kernel, tied: bool) -> None:
    """In a process's place another one computes the same bits."""
    if (trouble := trial(kernel)) is not None:
        pytest.skip(f"this machine or torch can't run it: {trouble}")
    shape = ModelShape(dtype=str(dtype).removeprefix("torch."), tied=tied, hidden=64, vocabulary=257)
    path = write_model(tmp_path, shape)
    oracle = Oracle(path, Qwen3ForCausalLM)
    prompt = oracle.prompt(50)
    first, second = (logits_of(path, place(CPU, dtype, kernel), prompt) for _ in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first.log_softmax(-1), oracle.logprobs(prompt)[-1], atol=0.1, rtol=0)


def logits_of(path: Path, placement: Placement, prompt: list[int]) -> Tensor:
    with torch.inference_mode():
        model = build_model(read_config(path), RankInfo(0, 1), placement)
        load_weights(path, model.weights(), lambda done, total: None)
        model.loaded()
        cache = KVCache(model.cache_shape, CacheSize(blocks=4), placement)
        batch = build_batch([piece(0, 0, prompt, [0, 1])], CPU)
        logits = model.logits(model.forward(batch, cache, SingleCommunicator())[batch.last], SingleCommunicator())
    assert logits is not None
    return logits[0]


def build(config: dict[str, Any], size: int = 1) -> None:
    build_model(config, RankInfo(0, size), choose_placement(torch.device("cpu"), torch.float32))


def test_a_size_that_the_heads_can_not_take_is_refused_with_those_they_can() -> None:
    with pytest.raises(
        ModelError, match="6 attention heads and 3 kv heads can't be split over 2 ranks; it can over 1, 3, 6"
    ):
        build(ModelShape(heads=6, kv_heads=3).config(), 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"architectures": ["OPTForCausalLM"]},
            "the architecture OPTForCausalLM; Lockstep knows LlamaForCausalLM",
        ),
        ({"architectures": None}, "the architecture none"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu"),
        ({"layer_types": ["linear_attention"]}, "layers of the kind linear_attention"),
        ({"hidden_size": "many"}, r"hidden_size"),
        ({"num_key_value_heads": 3}, "4 attention heads can't share 3 kv heads"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "the kind 'llama3'"),
    ],
)
def test_a_configuration_that_is_not_supported_is_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        build(ModelShape().config() | change)
