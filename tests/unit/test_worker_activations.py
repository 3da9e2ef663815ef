"""What the largest step takes, told by small ones: held against a step of full size, and against a known tensor."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.architectures import write_random
from tests.support.vision import TowerShape
from tests.support.vision_model import write_vision_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from lockstep_runtime.config import EngineLimits, ServeConfig
from lockstep_runtime.distributed.join import SingleCommunicator
from lockstep_runtime.layers.batch import build_batch
from lockstep_runtime.layers.cache import BLOCK_SIZE, CacheSize
from lockstep_runtime.protocol.images import HELD_TOKENS
from lockstep_runtime.protocol.step import SequenceSlice, StateSlots
from lockstep_runtime.sources.errors import ModelError
from lockstep_runtime.worker.activations import LiveBytes
from lockstep_runtime.worker.memory import cpu_budget, cuda_budget
from lockstep_runtime.worker.model_runner import ModelRunner

COMMON: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 131, "max_position_embeddings": 4096,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
MODELS: dict[str, tuple[Any, Any]] = {
    "dense": (LlamaForCausalLM, LlamaConfig(**COMMON)),
    "experts": (Qwen3MoeForCausalLM, Qwen3MoeConfig(**COMMON, **EXPERTS)),
    "states": (Qwen3_5ForCausalLM, Qwen3_5TextConfig(**COMMON, linear_num_key_heads=2, linear_num_value_heads=4)),
}
LARGEST = 1024


def test_the_most_that_tensors_took_at_once() -> None:
    with LiveBytes() as live:
        first = torch.zeros(1000)
        view = first[10:20].view(2, 5)
        del first
        second = torch.ones(500)
        assert live.peak == 6000, "a view keeps what it looks at, and takes nothing"
        del view, second
        third = torch.empty(100).add_(1)
        assert live.peak == 6000
        keep = [third, torch.empty(2000)]
    assert live.peak == 8400
    assert len(keep) == 2


@pytest.mark.parametrize("name", MODELS)
def test_small_steps_tell_what_a_large_one_takes(tmp_path: Path, name: str) -> None:
    write_random(tmp_path, *MODELS[name])
    limits = EngineLimits(max_batch_tokens=LARGEST, kv_cache_bytes=1 << 24, max_sequences=2)
    runner = ModelRunner(ServeConfig(model=str(tmp_path), served_name="m", backend="cpu", limits=limits), 0)
    report = runner.load(lambda done, total: None)
    blocks = LARGEST // BLOCK_SIZE
    cache = runner.allocate(CacheSize(blocks=blocks + 1, state_slots=report.cache.state_slots))
    whole = SequenceSlice(
        sequence_id=1, position=0, tokens=[5] * LARGEST, blocks=list(range(blocks)), state=StateSlots(0, 1)
    )
    with torch.inference_mode(), LiveBytes() as live:
        runner.model.forward(build_batch([whole], torch.device("cpu")), cache, SingleCommunicator())
    assert live.peak <= report.step_bytes <= 3 * live.peak + (1 << 22)


def test_small_images_tell_what_a_large_one_takes(tmp_path: Path) -> None:
    tower = TowerShape(hidden=96, intermediate=400, patch=8, positions=2304)
    write_vision_model(tmp_path, tower)
    limits = EngineLimits(max_batch_tokens=64, kv_cache_bytes=1 << 24, max_sequences=2)
    runner = ModelRunner(ServeConfig(model=str(tmp_path), served_name="m", backend="cpu", limits=limits), 0)
    report = runner.load(lambda done, total: None)
    vision = runner.model.vision
    assert vision is not None
    with torch.inference_mode(), LiveBytes() as live:
        tokens = vision.encode(torch.zeros(384, 384, 3, dtype=torch.uint8), SingleCommunicator())
    held = HELD_TOKENS * tokens.shape[1] * tokens.itemsize
    assert live.peak + held <= report.step_bytes <= 3 * live.peak + held + (1 << 22)


@pytest.mark.parametrize(("step", "found"), [(0, 500), (400, 500), (700, 300), (1200, 0)])
def test_a_cache_leaves_room_for_the_largest_step(step: int, found: int) -> None:
    assert cpu_budget(1000, 8000, 100, 1, step) == found
    assert cuda_budget(1000, 1000, 0, 1, step) == (900 if not step else max(0, 1000 - step))


def test_a_step_that_leaves_no_room_is_told_with_its_numbers(tmp_path: Path) -> None:
    write_random(tmp_path, *MODELS["dense"])
    limits = EngineLimits(max_batch_tokens=1 << 30)
    runner = ModelRunner(ServeConfig(model=str(tmp_path), served_name="m", backend="cpu", limits=limits), 0)
    with pytest.raises(
        ModelError, match=r"a step of 1073741824 tokens and 64 sequences may take: .*--max-batch-tokens"
    ):
        runner.load(lambda done, total: None)


def test_measuring_brings_no_compiler(tmp_path: Path) -> None:
    """Which takes seconds to import, in every process that loads."""
    write_random(tmp_path, *MODELS["dense"])
    program = f"""
import sys
from lockstep_runtime.config import ServeConfig
from lockstep_runtime.worker.model_runner import ModelRunner
ModelRunner(ServeConfig(model={str(tmp_path)!r}, served_name="m", backend="cpu"), 0).load(lambda done, total: None)
print([name for name in ("torch._dynamo", "torch._inductor", "sympy") if name in sys.modules])
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert run.stdout.strip() == "[]"
