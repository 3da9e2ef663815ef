"""Prefix caching of a model with recurrent states through a real group: what is shared, with whom, after a rank was
killed in the middle of an answer, and what is told of it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any, Final

import pytest
from tests.support.architectures import write_random, write_words
from tests.support.http import HTTP
from tests.support.serve import Served, served
from tests.support.stream import Stream
from tests.unit.test_models_hybrid import SMALL
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

BLOCK: Final = 32
SYSTEM: Final = [7 + number * number % 113 for number in range(9 * BLOCK)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("states")
    model = write_random(folder / "model", Qwen3_5ForCausalLM, Qwen3_5TextConfig(**SMALL))
    write_words(model, SMALL["vocab_size"])
    arguments = ("--tensor-parallel-size", "2", "--threads-per-rank", "1", "--served-name", "hybrid")
    with served(folder, *arguments, model=model) as serve:
        serve.ready()
        yield serve


def body(salt: str, *question: int, **more: Any) -> dict[str, Any]:
    prompt = [*SYSTEM, *question]
    return {"model": "hybrid", "prompt": prompt, "temperature": 0, "max_tokens": 40, "cache_salt": salt, **more}


def ask(serve: Served, salt: str, *question: int) -> tuple[str, int]:
    """The answer, and how many tokens of its prompt were cached."""
    answer = HTTP.post(f"{serve.api}/v1/completions", json=body(salt, *question), timeout=120)
    answer.raise_for_status()
    found = answer.json()
    assert found["usage"]["prompt_tokens"] == len(SYSTEM) + len(question)
    return found["choices"][0]["text"], found["usage"]["prompt_tokens_details"]["cached_tokens"]


def counted(serve: Served, name: str) -> float:
    lines = HTTP.get(f"{serve.api}/metrics").text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(f"lockstep_{name}_total{{"))


def test_what_was_computed_before_is_not_computed_again(server: Served) -> None:
    queries, hits = (counted(server, name) for name in ("prefix_cache_queries", "prefix_cache_hits"))
    whole = len(SYSTEM) + BLOCK
    text, cached = ask(server, "one", *range(20, 60))
    assert cached == 0
    assert ask(server, "one", *range(20, 60)) == (text, whole)
    other, cached = ask(server, "one", 5, 6)
    assert cached == 0, "where the two part no state was kept yet"
    assert ask(server, "one", 5, 6) == (other, len(SYSTEM))
    assert ask(server, "one", 8, 9)[1] == len(SYSTEM)
    assert ask(server, "two", *range(20, 60)) == (text, 0)
    assert counted(server, "prefix_cache_queries") - queries == 6 * len(SYSTEM) + 3 * 40 + 3 * 2
    assert counted(server, "prefix_cache_hits") - hits == whole + 2 * len(SYSTEM)


@pytest.mark.parametrize("rank", [1, 0])
def test_states_outlive_a_rank_that_is_killed_during_an_answer(server: Served, rank: int) -> None:
    salt = f"killed {rank}"
    text, _ = ask(server, salt, 5, 6)
    before = server.status().recoveries
    stream = Stream(server.api, body(salt, 5, 6, max_tokens=400), 120)
    server.until(lambda: stream.pieces > 0, "the answer has begun")
    os.kill(server.pid_of(f"rank={rank}"), signal.SIGKILL)
    answer = stream.wait()
    assert (answer.finish, answer.text[: len(text)]) == ("length", text)
    server.until(lambda: server.status().recoveries > before, "the repair is told")
    assert ask(server, salt, 5, 6) == (text, len(SYSTEM))
