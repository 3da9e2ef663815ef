"""Every architecture is healed: a rank killed, a context computed again, a weight that has changed; the tokens stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import pytest
from tests.support.architectures import write_random, write_words
from tests.support.chaos import STREAM_SECONDS, healed
from tests.support.faults import inject
from tests.support.serve import AS_JSON, Served, served
from tests.support.stream import Answer, Stream, answers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from lockstep_runtime.protocol.chaos import FaultPhase, Injection
from lockstep_runtime.protocol.status import Fault
from lockstep_runtime.recovery.log_trail import TrailPhase
from lockstep_runtime.worker.scrub import INTERVAL_VARIABLE

NAME: Final = "small"
WORDS: Final = 500
TOKENS: Final = 150
COMMON: Final = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": WORDS, "max_position_embeddings": 512,
}  # fmt: skip
EXPERTS: Final = {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True}
HYBRID: Final = {
    "num_hidden_layers": 4, "head_dim": 16, "linear_key_head_dim": 8, "linear_value_head_dim": 12,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
ARCHITECTURES: Final[dict[str, tuple[Any, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**COMMON, tie_word_embeddings=True)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**COMMON)),
    "mistral": (MistralForCausalLM, MistralConfig(**COMMON, sliding_window=None)),
    "qwen3_moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig(**COMMON, **EXPERTS)),
    "qwen3_next": (
        Qwen3NextForCausalLM,
        Qwen3NextConfig(**COMMON | HYBRID | EXPERTS, shared_expert_intermediate_size=40),
    ),
    "qwen3_5": (Qwen3_5ForCausalLM, Qwen3_5TextConfig(**COMMON | HYBRID)),
}
IN_THIRD: Final = ("qwen3_moe", "qwen3_next")
REQUESTS: Final = (
    {"prompt": "w5 w77 w140", "temperature": 0},
    {"prompt": "w9 w10 w11 w12 w13 w14 w15", "temperature": 1.0, "seed": 7},
)


def start(serve: Served) -> list[Stream]:
    return [Stream(serve.api, {"model": NAME, "max_tokens": TOKENS, **body}, STREAM_SECONDS) for body in REQUESTS]


def is_whole(answer: Answer) -> bool:
    return len(answer.text.split()) == TOKENS and answer.done and not answer.error


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.third] if name in IN_THIRD else []) for name in ARCHITECTURES]
)
def test_requests_in_flight_outlive_its_faults(tmp_path: Path, name: str) -> None:
    kind, config = ARCHITECTURES[name]
    model = write_random(tmp_path / NAME, kind, config)
    write_words(model, WORDS)
    arguments = (
        "--tensor-parallel-size",
        "2",
        "--threads-per-rank",
        "1",
        "--kv-cache-memory",
        "64Mi",
        "--allow-faults",
    )
    variables = {**AS_JSON, INTERVAL_VARIABLE: "3"}
    with served(tmp_path, *arguments, "--allow-faults", model=model, environment=variables) as serve:
        serve.ready()
        undisturbed = answers(start(serve))
        assert all(is_whole(answer) for answer in undisturbed), undisturbed
        for kind_of_fault, rank in ((Injection.SIGKILL, 1), (Injection.SIGSEGV, 0)):
            inject(serve, kind_of_fault, rank, phase=FaultPhase.DECODE, skip=40)
            assert answers(start(serve)) == undisturbed, serve.log.read_text()
        resumed = [line for line in serve.records() if line.get("phase") == TrailPhase.RESUMED]
        assert [line["kept"] for line in resumed] == [True, False]
        inject(serve, Injection.FLIP_BIT, 1, phase=FaultPhase.IDLE, number=987_654_321)
        serve.until(lambda: is_told(serve), "the changed weight is found")
        healed(serve)
        assert answers(start(serve)) == undisturbed, serve.log.read_text()


def is_told(serve: Served) -> bool:
    return any(record.fault is Fault.CORRUPTION and record.rank == 1 for record in serve.status().faults)
