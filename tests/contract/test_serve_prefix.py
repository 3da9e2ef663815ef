"""Prefix caching through a real group: what is shared, with whom, after a rank was killed, and what is told of it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any, Final

import pytest
from tests.support.http import HTTP
from tests.support.serve import Served, served

SYSTEM: Final = "You explain how programs are written, one step after the other, with an example for every step. " * 8
BLOCK: Final = 32


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    arguments = ("--tensor-parallel-size", "2", "--dtype", "float32", "--threads-per-rank", "1")
    with served(tmp_path_factory.mktemp("prefix"), *arguments) as serve:
        serve.ready()
        yield serve


def ask(serve: Served, salt: str, question: str = "What is a loop?", **more: Any) -> tuple[str, int, int]:
    """The answer, and how many tokens its prompt has, and of those were cached."""
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
    body = {"model": "tiny-chat", "messages": messages, "temperature": 0, "max_tokens": 40, "cache_salt": salt, **more}
    answer = HTTP.post(f"{serve.api}/v1/chat/completions", json=body, timeout=120)
    answer.raise_for_status()
    found = answer.json()
    usage = found["usage"]
    text = found["choices"][0]["message"]["content"]
    return text, usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]


def counted(serve: Served, name: str) -> float:
    lines = HTTP.get(f"{serve.api}/metrics").text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(f"lockstep_{name}_total{{"))


def whole(tokens: int) -> int:
    """Of a prompt that was computed before: all blocks but what the last token is in."""
    return (tokens - 1) // BLOCK * BLOCK


def test_a_prompt_that_was_computed_before_is_not_computed_again(server: Served) -> None:
    queries, hits = (counted(server, name) for name in ("prefix_cache_queries", "prefix_cache_hits"))
    text, tokens, cached = ask(server, "one")
    assert tokens > 5 * BLOCK
    assert cached == 0
    assert ask(server, "one") == (text, tokens, whole(tokens))
    _, others, shared = ask(server, "one", "And what is a function?")
    assert 4 * BLOCK <= shared <= whole(tokens)
    assert counted(server, "prefix_cache_queries") - queries == 2 * tokens + others
    assert counted(server, "prefix_cache_hits") - hits == whole(tokens) + shared


def test_another_salt_shares_nothing_and_choices_of_one_prompt_count_once(server: Served) -> None:
    text, tokens, _ = ask(server, "first")
    assert ask(server, "second") == (text, tokens, 0)
    assert ask(server, "first", n=3) == (text, tokens, whole(tokens))


@pytest.mark.parametrize("rank", [1, 0])
def test_what_is_cached_outlives_a_killed_rank(server: Served, rank: int) -> None:
    salt = f"killed {rank}"
    text, tokens, _ = ask(server, salt)
    before = server.status().recoveries
    os.kill(server.pid_of(f"rank={rank}"), signal.SIGKILL)
    server.until(lambda: server.status().recoveries > before, "the repair is told")
    assert ask(server, salt) == (text, tokens, whole(tokens))


def test_a_stream_tells_it_too_and_an_echo_with_log_probabilities_computes_everything(server: Served) -> None:
    body = {"model": "tiny-chat", "prompt": SYSTEM, "max_tokens": 2, "temperature": 0, "echo": True}
    url = f"{server.api}/v1/completions"
    plain, again = (HTTP.post(url, json=body, timeout=120).json() for _ in range(2))
    tokens = plain["usage"]["prompt_tokens"]
    assert again["usage"]["prompt_tokens_details"] == {"cached_tokens": whole(tokens)}
    scored = [HTTP.post(url, json={**body, "logprobs": 0}, timeout=120).json() for _ in range(2)]
    assert [one["usage"]["prompt_tokens_details"]["cached_tokens"] for one in scored] == [0, 0]
    assert scored[0]["choices"] == scored[1]["choices"]
    assert len([one for one in scored[0]["choices"][0]["logprobs"]["token_logprobs"] if one is not None]) == tokens + 1
    streamed = HTTP.post(url, json={**body, "stream": True, "stream_options": {"include_usage": True}}, timeout=120)
    assert f'"cached_tokens":{whole(tokens)}' in streamed.text
