"""Decoding models of Gated DeltaNet layers in bfloat16 on CPUs: two ranks of one thread, as `bench.decode` has them.

A model of Qwen3.5-0.8B's shape is set beside transformers with two threads, from the same prompts. And a model of its
delta-net layers alone decodes after contexts of different lengths, which take turns: its rate should not fall.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import torch
from bench.decode import compare, serve_transformers
from bench.ranks import Child, Ranks, answer_orders, config, done, start
from bench.report import OUTPUT, Row, report
from tests.support.architectures import write_random

from lockstep_runtime.config import ServeConfig
from lockstep_runtime.layers.cache import BLOCK_SIZE
from lockstep_runtime.protocol import bus

LAYERS: Final[dict[str, Any]] = {
    "hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 256,
    "linear_num_key_heads": 16, "linear_num_value_heads": 16, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    "max_position_embeddings": 262144, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
QWEN3_5_0_8B: Final = LAYERS | {
    "intermediate_size": 3584, "num_hidden_layers": 24, "vocab_size": 248320, "tie_word_embeddings": True,
}  # fmt: skip
DELTA_NETS: Final = LAYERS | {
    "intermediate_size": 1024, "num_hidden_layers": 4, "vocab_size": 4096, "layer_types": ["linear_attention"] * 4,
}  # fmt: skip
SEQUENCES: Final = 8
CONTEXTS: Final = (1024, 4096, 16384)  # tokens
LONG: Final = CONTEXTS[-1] // BLOCK_SIZE + 32  # blocks of each: its context and what is decoded
CHUNK: Final = 512
STEPS: Final = 200  # after each context


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    arguments.add_argument("--tokens", type=int, default=32, help="decoded per run, after the first")
    arguments.add_argument("--rounds", type=int, default=3)
    options = arguments.parse_args()
    report("hybrid", [*flat(STEPS), *beside_transformers(options)])


def beside_transformers(options: argparse.Namespace) -> list[Row]:
    model = model_directory("qwen3.5-0.8b", QWEN3_5_0_8B)
    with (
        closing(Ranks(serve_rank, config(model))) as ours,
        closing(Child(serve_transformers, model, "Qwen3_5ForCausalLM")) as theirs,
    ):
        theirs.receive()
        return [
            row for batch in options.batches for row in compare(ours, theirs, batch, options.tokens, options.rounds)
        ]


def serve_rank(pipe: Connection, config: ServeConfig, rank: int, address: str) -> None:
    runner, _, group = start(config, rank, address, SEQUENCES)
    answer_orders(pipe, bus.Step, lambda step: done(step, runner.step(step, group)))


def serve_long_rank(pipe: Connection, config: ServeConfig, rank: int, address: str) -> None:
    runner, _, group = start(config, rank, address, len(CONTEXTS), LONG)
    answer_orders(pipe, bus.Step, lambda step: done(step, runner.step(step, group)))


def flat(steps: int) -> list[Row]:
    """Each context is a sequence, computed once; then they decode in turn, step by step, so that a busy machine slows
    all alike. A rate is that of the median step."""
    with closing(Ranks(serve_long_rank, config(model_directory("delta-nets", DELTA_NETS)), LONG)) as ranks:
        last = {context: prefill(ranks, number, context) for number, context in enumerate(CONTEXTS)}
        seconds: dict[int, list[float]] = {context: [] for context in CONTEXTS}
        for count in range(steps):
            for number, context in enumerate(CONTEXTS):
                started = time.perf_counter()
                last[context] = ranks.take(ranks.next_step([last[context]], context + count, number))
                seconds[context].append(time.perf_counter() - started)
    rates = {context: 1 / statistics.median(taken) for context, taken in seconds.items()}
    return [
        Row(
            case=f"delta nets alone, after {context} tokens", metric="decode", value=rate, unit="tok/s",
            peer=f"after {CONTEXTS[0]} tokens", peer_value=rates[CONTEXTS[0]],
        )
        for context, rate in rates.items()
    ]  # fmt: skip


def prefill(ranks: Ranks, number: int, context: int) -> list[int]:
    """In chunks; returns the token that follows."""
    prompt = torch.randint(0, 4096, (context,), generator=torch.Generator().manual_seed(number)).tolist()
    token: list[int] = []
    for start_at in range(0, context, CHUNK):
        token = ranks.take(ranks.next_step([prompt[start_at : start_at + CHUNK]], start_at, number))
    return token


def model_directory(name: str, settings: dict[str, Any]) -> Path:
    """The generated checkpoint, made once and kept."""
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    directory = OUTPUT / "models" / name
    if not (directory / "model.safetensors").exists():
        write_random(directory, Qwen3_5ForCausalLM, Qwen3_5TextConfig(**settings), dtype="bfloat16")
    return directory


if __name__ == "__main__":
    main()
