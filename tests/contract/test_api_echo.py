"""`echo` with `logprobs`: what evaluation harnesses score prompts with, in the form that they read."""

from __future__ import annotations

from collections.abc import AsyncIterator
from operator import itemgetter
from typing import Any

import httpx
import pytest
from tests.support.api_server import SERVED, TINY_CHAT, serving
from tests.support.engine import FakeEngine
from tests.support.http import async_http
from tokenizers import Tokenizer

from lockstep_runtime.api.limits import Limits

TOKENIZER: Tokenizer = Tokenizer.from_file(str(TINY_CHAT / "tokenizer.json"))
END = TOKENIZER.token_to_id("<|im_end|>") or 0
ANSWER = "yes 🎉"


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False).ids


@pytest.fixture
async def engine() -> FakeEngine:
    return FakeEngine(lambda _: ids(ANSWER), END)


@pytest.fixture
async def client(engine: FakeEngine) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(engine) as url, async_http(base_url=url) as client:
        yield client


async def complete(client: httpx.AsyncClient, **fields: Any) -> Any:
    response = await client.post("/v1/completions", json={"model": SERVED, "echo": True, "logprobs": 1} | fields)
    assert response.status_code == 200, response.text
    return response.json()


def harness(answer: Any, context_lengths: list[int]) -> list[tuple[float, bool]]:
    """As lm-evaluation-harness' `local-completions` reads an answer.

    Source: https://github.com/EleutherAI/lm-evaluation-harness/blob/main/lm_eval/models/openai_completions.py
    """
    read = []
    for choice, length in zip(sorted(answer["choices"], key=itemgetter("index")), context_lengths, strict=True):
        logprobs = choice["logprobs"]["token_logprobs"][length:-1]
        tops = choice["logprobs"]["top_logprobs"][length:-1]
        greedy = all(one == max(top.values()) for one, top in zip(logprobs, tops, strict=True))
        read.append((sum(logprobs), greedy))
    return read


async def test_a_harness_reads_what_the_engine_said(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    prompts = [ids("The sky is blue"), ids("one two three four five")]
    answer = await complete(client, prompt=prompts, max_tokens=1, temperature=0, seed=1234)
    lengths = [len(prompt) - 2 for prompt in prompts]
    assert harness(answer, lengths) == [(-float(len(prompt) - 2 + len(prompt) - 1), False) for prompt in prompts]
    assert [request.sampling.prompt_logprobs for request in engine.requests] == [1, 1]


@pytest.mark.parametrize("prompt", ["The sky ist blau, größer 🎉!", "Hi", "a<|im_end|>b", "日本語"])
async def test_every_token_of_prompt_and_answer_once(client: httpx.AsyncClient, prompt: str) -> None:
    for given in (prompt, ids(prompt)):
        answer = await complete(client, prompt=given, max_tokens=50)
        [choice] = answer["choices"]
        logprobs = choice["logprobs"]
        assert choice["text"] == prompt + ANSWER
        count = len(ids(prompt)) + len(ids(ANSWER))
        assert {name: len(values) for name, values in logprobs.items()} == dict.fromkeys(
            ("tokens", "token_logprobs", "top_logprobs", "text_offset"), count
        )
        assert (logprobs["token_logprobs"][0], logprobs["top_logprobs"][0]) == (None, None)
        assert None not in logprobs["token_logprobs"][1:]
        for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
            assert token.startswith("bytes:") or choice["text"].startswith(token, offset)
        for token, value, top in list(
            zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
        )[1:]:
            assert top[token] == value
        assert logprobs["text_offset"][len(ids(prompt))] == len(prompt)


async def test_streamed_it_is_the_same(client: httpx.AsyncClient) -> None:
    whole = (await complete(client, prompt="The größer 🎉", max_tokens=50, logprobs=2))["choices"][0]
    body = {"model": SERVED, "prompt": "The größer 🎉", "max_tokens": 50, "echo": True, "logprobs": 2, "stream": True}
    response = await client.post("/v1/completions", json=body)
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line.startswith("data: {")]
    choices = [httpx.Response(200, text=event).json()["choices"][0] for event in events]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    for name, values in whole["logprobs"].items():
        assert [one for choice in choices if choice["logprobs"] for one in choice["logprobs"][name]] == values
    assert choices[0]["text"] == "The größer 🎉"


async def test_no_tokens_at_all_is_the_prompt_alone(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    for stream in (False, True):
        body = {"model": SERVED, "prompt": "The sky", "max_tokens": 0, "echo": True, "logprobs": 0, "stream": stream}
        response = await client.post("/v1/completions", json=body)
        text = response.text.split("\n\n")[0].removeprefix("data: ") if stream else response.text
        choice = httpx.Response(200, text=text).json()["choices"][0]
        assert choice["text"] == "The sky"
        assert len(choice["logprobs"]["tokens"]) == len(ids("The sky"))
        assert choice["logprobs"]["top_logprobs"][1:] == [{}] * (len(ids("The sky")) - 1)
        if not stream:
            assert choice["finish_reason"] == "length"
            assert response.json()["usage"]["completion_tokens"] == 0
    plain = await complete(client, prompt="The sky", max_tokens=0, logprobs=None)
    assert (plain["choices"][0]["text"], plain["choices"][0]["logprobs"]) == ("The sky", None)
    nothing = await complete(client, prompt="The sky", max_tokens=0, echo=False, logprobs=None)
    assert (nothing["choices"][0]["text"], nothing["choices"][0]["finish_reason"]) == ("", "length")
    assert all(request.max_tokens == 1 for request in engine.requests)


async def test_a_prompt_of_one_token_has_no_log_probability(client: httpx.AsyncClient) -> None:
    answer = await complete(client, prompt=[ids("a")[0]], max_tokens=0)
    assert answer["choices"][0]["logprobs"] == {
        "tokens": ["a"], "token_logprobs": [None], "top_logprobs": [None], "text_offset": [0]
    }  # fmt: skip


async def test_several_choices_and_prompts(client: httpx.AsyncClient) -> None:
    answer = await complete(client, prompt=["one", "two three"], n=2, max_tokens=1)
    lengths = [len(choice["logprobs"]["tokens"]) - 1 for choice in answer["choices"]]
    assert lengths == [len(ids("one"))] * 2 + [len(ids("two three"))] * 2
    assert answer["usage"]["prompt_tokens"] == len(ids("one")) + len(ids("two three"))


async def test_tokens_that_are_parts_of_a_character_are_told_apart(client: httpx.AsyncClient) -> None:
    parts = ids("🎉")
    assert len(parts) > 1, "the example's vocabulary has it as a whole"
    answer = await complete(client, prompt="🎉", max_tokens=0)
    tokens = answer["choices"][0]["logprobs"]["tokens"]
    assert len(set(tokens)) == len(tokens) == len(parts)
    raw = "".join(token.removeprefix("bytes:") for token in tokens)
    assert raw == "".join(f"\\x{byte:02x}" for byte in "🎉".encode())
    assert answer["choices"][0]["logprobs"]["text_offset"] == [0] * len(parts)
    body = {"model": SERVED, "messages": [{"role": "user", "content": "Hi"}], "logprobs": True, "top_logprobs": 1}
    entries = (await client.post("/v1/chat/completions", json=body)).json()["choices"][0]["logprobs"]["content"]
    assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == ANSWER
    cut = [entry for entry in entries if "\\x" in entry["token"]]
    assert len(cut) == len(parts)
    assert "".join(entry["token"] for entry in cut) == raw


async def test_more_log_probabilities_than_can_be_held_are_refused() -> None:
    limits = Limits(max_logprobs=100)
    fake = FakeEngine(lambda _: ids(ANSWER), END)
    async with serving(fake, limits=limits) as url, async_http(base_url=url) as client:
        for fields, status in (
            ({"prompt": [5] * 50, "logprobs": 1, "max_tokens": 0}, 400),  # 51 times two
            ({"prompt": [5] * 49, "logprobs": 1, "max_tokens": 0}, 200),
            ({"prompt": [5] * 50, "logprobs": 1, "max_tokens": 1, "echo": False}, 200),
            ({"prompt": "Hi", "logprobs": 4, "n": 3, "max_tokens": 7, "echo": False}, 400),
            ({"prompt": "Hi", "logprobs": 4, "n": 3, "max_tokens": 7, "echo": False, "stream": True}, 200),
            ({"prompt": [5] * 60, "logprobs": 1, "max_tokens": 1, "stream": True}, 400),
            ({"prompt": "Hi", "n": 3, "logprobs": None, "max_tokens": 700}, 200),
        ):
            response = await client.post("/v1/completions", json={"model": SERVED, "echo": True, **fields})
            assert response.status_code == status, fields
            if status == 400:
                assert response.json()["error"]["param"] == "logprobs"
                assert "stream the answer" in response.json()["error"]["message"]
