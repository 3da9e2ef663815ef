"""The model on a GPU computes what it does on a CPU, in a cache that fits, with weights that are watched."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
import torch
from tests.support.agreement import Text
from tests.support.architectures import write_random
from tests.support.ranks import everything, piece

from lockstep_runtime.config import Device, EngineLimits, ServeConfig
from lockstep_runtime.distributed.join import SingleCommunicator
from lockstep_runtime.layers import grouped_product
from lockstep_runtime.layers.cache import CacheSize
from lockstep_runtime.protocol import bus
from lockstep_runtime.protocol.step import PROBE_STATE_SLOTS, SampledToken, SamplingParams
from lockstep_runtime.worker.model_runner import ModelRunner
from lockstep_runtime.worker.scrub import INTERVAL_VARIABLE, CorruptionError, Scrub

TINY_CHAT = Path(__file__).parents[2] / "examples" / "tiny-chat"
TOKENS = 40
PROMPT = list(range(100, 140))
BLOCKS = list(range(3))
VOCABULARY = 2048


def config(device: Device, limits: EngineLimits | None = None, model: Path = TINY_CHAT) -> ServeConfig:
    return ServeConfig(
        model=str(model), served_name="t", dtype="float32", device=device, weight_cache="Off",
        backend="cpu", limits=limits or EngineLimits(kv_cache_bytes=1 << 26),
    )  # fmt: skip


def with_experts(folder: Path) -> Path:
    transformers = pytest.importorskip("transformers")  # a borrowed machine need not have it
    shape = transformers.Qwen3MoeConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    return write_random(folder, transformers.Qwen3MoeForCausalLM, shape)


def hybrid(folder: Path) -> Path:
    """Delta nets and gated attention."""
    transformers = pytest.importorskip("transformers")
    shape = transformers.Qwen3_5TextConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, vocab_size=VOCABULARY, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=32,
        linear_value_head_dim=32,
    )  # fmt: skip
    return write_random(folder, transformers.Qwen3_5ForCausalLM, shape)


MODELS: Final[dict[str, Callable[[Path], Path]]] = {
    "dense": lambda folder: TINY_CHAT,
    "experts": with_experts,
    "hybrid": hybrid,
}


def greedy(device: Device, model: Path) -> list[SampledToken]:
    """Prefill, then token by token, with the log probabilities of all tokens."""
    runner, group = ModelRunner(config(device, model=model), 0), SingleCommunicator()
    runner.load(lambda done, total: None)
    runner.allocate(CacheSize(blocks=16, state_slots=3 + PROBE_STATE_SLOTS))
    drawn: list[SampledToken] = []
    text = Text(1, PROMPT, BLOCKS)
    for number in range(TOKENS):
        part = text.piece(len(text.tokens) - text.position, sample=everything(VOCABULARY))
        drawn += runner.step(bus.Step(epoch=1, step=number, sequences=[part]), group).sampled
        text.book(part)
        text.tokens = [*text.tokens, drawn[-1].token]
    return drawn


@pytest.mark.parametrize("kind", MODELS)
def test_the_same_tokens_as_on_a_cpu(tmp_path: Path, kind: str) -> None:
    model = MODELS[kind](tmp_path)
    on_cpu, on_gpu = greedy("cpu", model), greedy("cuda", model)
    assert [one.token for one in on_gpu] == [one.token for one in on_cpu]
    for mine, theirs in zip(on_gpu, on_cpu, strict=True):
        torch.testing.assert_close(
            torch.tensor([logprob for _, logprob in sorted(mine.top)]),
            torch.tensor([logprob for _, logprob in sorted(theirs.top)]),
            rtol=1e-3, atol=2e-3,
        )  # fmt: skip


def test_experts_are_multiplied_by_in_one_product() -> None:
    assert grouped_product.works(torch.device("cuda", 0), torch.bfloat16)


def test_the_cache_is_sized_by_the_gpus_free_memory() -> None:
    free, total = torch.cuda.mem_get_info(0)
    runner = ModelRunner(config("cuda", EngineLimits(max_sequences=1 << 20)), 0)
    report = runner.load(lambda done, total: None)
    size = runner.allocate(CacheSize(blocks=report.cache.blocks)).nbytes
    assert size <= free - 0.1 * total
    assert size > 0.8 * (free - 0.1 * total)
    step = bus.Step(epoch=1, step=0, sequences=[piece(1, 0, PROMPT, BLOCKS, SamplingParams(temperature=0))])
    assert runner.step(step, SingleCommunicator()).sampled
    del runner
    torch.cuda.empty_cache()


def test_a_flipped_bit_in_the_gpus_memory_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(INTERVAL_VARIABLE, "0.1")
    runner = ModelRunner(config("cuda"), 0)
    scrub = runner.load(lambda done, total: None).scrub
    assert scrub is not None
    once_round(scrub)
    damaged = runner.flip_bit(987_654_321)
    with pytest.raises(CorruptionError, match=damaged.split(" + ")[0]):
        once_round(scrub)


def once_round(scrub: Scrub) -> None:
    before = scrub.rounds
    while scrub.rounds == before:
        scrub.turn(time.monotonic())
