"""A hybrid model with experts outlives a rank that is killed, raises or hangs, in a prompt and in decode.

A repeated step reads the recurrent states that it read before, and the tokens are those of an undisturbed life.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import pytest
from tests.support.architectures import write_random, write_words
from tests.support.chaos import STREAM_SECONDS, Arena, Cell, as_parameters, survive
from tests.support.serve import Served
from tests.support.stream import Stream
from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

from lockstep_runtime.protocol.chaos import CollectivePoint, FaultPhase, Injection

NAME: Final = "hybrid"
WORDS: Final = 500
SETTINGS: Final = {
    "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2,
    "vocab_size": WORDS, "max_position_embeddings": 1024, "pad_token_id": None, "eos_token_id": None,
}  # fmt: skip
LONG: Final = " ".join(f"w{(7 * number) % WORDS}" for number in range(300))  # words: several chunks
REQUESTS: Final = (
    {"prompt": LONG, "temperature": 0},
    {"prompt": "w9 w10 w11 w12 w13 w14 w15", "temperature": 1.0, "seed": 7},
)
CELLS: Final = [
    Cell(kind, CollectivePoint.BEFORE, phase, rank, 2)
    for kind in (Injection.SIGKILL, Injection.RAISE, Injection.HANG)
    for phase in (FaultPhase.PREFILL, FaultPhase.DECODE)
    for rank in (0, 1)
]
THIRD: Final = {
    (Injection.SIGKILL, FaultPhase.DECODE, 1),
    (Injection.SIGKILL, FaultPhase.PREFILL, 0),
    (Injection.RAISE, FaultPhase.PREFILL, 1),
    (Injection.HANG, FaultPhase.DECODE, 0),
}


def requests(serve: Served, tokens: int) -> list[Stream]:
    return [Stream(serve.api, {"model": NAME, "max_tokens": tokens, **body}, STREAM_SECONDS) for body in REQUESTS]


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    directory = tmp_path_factory.mktemp("hybrid")
    model = write_random(directory / NAME, Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig(**SETTINGS))
    write_words(model, WORDS)
    arena = Arena(directory, 2, "--max-batch-tokens", "96", model=model, requests=requests)
    yield arena
    arena.close()


@pytest.mark.parametrize("cell", as_parameters(CELLS, lambda cell: (cell.kind, cell.phase, cell.rank) in THIRD))
def test_requests_in_flight_outlive(cell: Cell, hybrid: Arena) -> None:
    survive(hybrid, cell)
