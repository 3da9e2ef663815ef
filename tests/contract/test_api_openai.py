"""The `openai` client decides whether the API is OpenAI's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionChunk
from tests.support.api_server import SERVED, TINY_CHAT, serving
from tests.support.engine import FakeEngine, Part, eventually
from tests.support.http import async_http
from tokenizers import Tokenizer

from lockstep_runtime.api.limits import Limits
from lockstep_runtime.engine.client import (
    EngineBusyError,
    GenerationFailedError,
    GenerationRequest,
    RequestTooLongError,
)
from lockstep_runtime.protocol.step import SamplingParams

TOKENIZER: Tokenizer = Tokenizer.from_file(str(TINY_CHAT / "tokenizer.json"))
END = TOKENIZER.token_to_id("<|im_end|>") or 0
ANSWER = "Hello, wörld! 🎉 日本語\nend"
PROMPT = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False).ids


@dataclass
class Served:
    engine: FakeEngine
    client: openai.AsyncOpenAI
    url: str
    parts: Sequence[Part]

    async def chat(self, **extra: Any) -> Any:
        return await self.client.chat.completions.create(
            model=SERVED, messages=[{"role": "user", "content": "Hi"}], **extra
        )

    async def complete(self, **extra: Any) -> Any:
        options: dict[str, Any] = {"model": SERVED, "prompt": "Hi", "max_tokens": 100} | extra
        return await self.client.completions.create(**options)

    async def chunks(self, **extra: Any) -> list[ChatCompletionChunk]:
        return [chunk async for chunk in await self.chat(stream=True, **extra)]


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    holder: list[Served] = []

    def script(_: GenerationRequest) -> Iterable[Part]:
        return holder[0].parts

    engine = FakeEngine(script, END)
    async with (
        serving(engine, limits=Limits(keep_alive_seconds=0.1, headers_seconds=0.1)) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        holder.append(Served(engine, client, url, ids(ANSWER)))
        yield holder[0]


def joined(chunks: Iterable[ChatCompletionChunk], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    return "".join(choice.delta.content or "" for choice in choices)


def reasons(chunks: Iterable[ChatCompletionChunk]) -> list[str]:
    return [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]


async def test_chat_whole(served: Served) -> None:
    answer = await served.chat()
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == SERVED
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", ANSWER, "stop")
    assert served.engine.requests[0].prompt == tuple(ids(PROMPT))
    assert answer.usage.prompt_tokens == len(ids(PROMPT))
    assert answer.usage.completion_tokens == len(ids(ANSWER)) + 1
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


async def test_chat_streamed_says_the_role_first_and_ends_once(served: Served) -> None:
    chunks = await served.chunks()
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:])
    assert joined(chunks) == ANSWER
    assert reasons(chunks) == ["stop"]
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


async def test_usage_comes_last_when_asked_for(served: Served) -> None:
    chunks = await served.chunks(stream_options={"include_usage": True})
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(ids(ANSWER)) + 1
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)


async def test_the_stream_on_the_wire_ends_with_done(served: Served) -> None:
    body = {"model": SERVED, "messages": [{"role": "user", "content": "Hi"}], "stream": True}
    async with async_http() as client:
        response = await client.post(f"{served.url}/v1/chat/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.text.endswith("data: [DONE]\n\n")
    assert response.text.count("[DONE]") == 1


async def test_the_synchronous_client_too(served: Served) -> None:
    def talk() -> tuple[str | None, str]:
        with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            whole = client.chat.completions.create(model=SERVED, messages=[{"role": "user", "content": "Hi"}])
            with client.completions.create(model=SERVED, prompt="Hi", stream=True, max_tokens=100) as stream:
                return whole.choices[0].message.content, "".join(chunk.choices[0].text for chunk in stream)

    assert await asyncio.to_thread(talk) == (ANSWER, ANSWER)


@pytest.mark.parametrize("stream", [False, True])
async def test_length_is_the_reason_when_the_answer_is_cut(served: Served, stream: bool) -> None:
    if stream:
        assert reasons(await served.chunks(max_completion_tokens=3)) == ["length"]
    else:
        answer = await served.chat(max_tokens=3)
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 3


async def test_chat_takes_the_rest_of_the_model_and_completions_sixteen(served: Served) -> None:
    await served.chat()
    await served.client.completions.create(model=SERVED, prompt="Hi")
    chat, completion = served.engine.requests
    assert chat.max_tokens == 2048 - len(chat.prompt)
    assert completion.max_tokens == 16


async def test_sampling_reaches_the_engine(served: Served) -> None:
    await served.chat(temperature=0.7, top_p=0.9, seed=-1, extra_body={"top_k": 5, "min_p": 0.1, "stop_token_ids": [9]})
    request = served.engine.requests[0]
    assert request.sampling == SamplingParams(temperature=0.7, top_p=0.9, top_k=5, min_p=0.1, seed=2**64 - 1)
    assert request.stop_token_ids == {9, END, TOKENIZER.token_to_id("<|endoftext|>")}


async def test_unasked_sampling_is_what_the_models_authors_advise(served: Served) -> None:
    await served.chat()
    await served.chat()
    first, second = (request.sampling for request in served.engine.requests)
    assert first.temperature == 0  # generation_config.json: do_sample false
    assert first.seed != second.seed


async def test_eos_can_be_ignored(served: Served) -> None:
    answer = await served.chat(max_tokens=40, extra_body={"ignore_eos": True})
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 40)
    assert answer.choices[0].message.content == ANSWER


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_over_several_tokens_never_shows(served: Served, stream: bool) -> None:
    if stream:
        chunks = await served.chunks(stop=["never", "日本"])
        text, reason = joined(chunks), reasons(chunks)
    else:
        answer = await served.chat(stop="日本")
        text, reason = answer.choices[0].message.content, [answer.choices[0].finish_reason]
    assert (text, reason) == ("Hello, wörld! 🎉 ", ["stop"])


async def test_no_token_is_drawn_in_vain_after_a_stop_string(served: Served) -> None:
    served.parts = [*ids("Hello, wörld!"), asyncio.Event()]
    answer = await served.chat(stop="wör")
    assert answer.choices[0].message.content == "Hello, "
    await eventually(lambda: not served.engine.running)
    assert served.engine.cancelled == [served.engine.requests[0].request_id]


async def test_several_choices_have_their_own_seeds(served: Served) -> None:
    answer = await served.chat(n=3, seed=7)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert {choice.message.content for choice in answer.choices} == {ANSWER}
    assert answer.usage.prompt_tokens == len(ids(PROMPT))
    assert answer.usage.completion_tokens == 3 * (len(ids(ANSWER)) + 1)
    seeds = [request.sampling.seed for request in served.engine.requests]
    assert seeds[0] == 7
    assert len(set(seeds)) == 3


async def test_several_choices_streamed(served: Served) -> None:
    chunks = await served.chunks(n=2)
    assert [joined(chunks, 0), joined(chunks, 1)] == [ANSWER, ANSWER]
    assert reasons(chunks) == ["stop", "stop"]


@pytest.mark.parametrize("stream", [False, True])
async def test_log_probabilities_of_chat(served: Served, stream: bool) -> None:
    options: dict[str, Any] = {"logprobs": True, "top_logprobs": 2}
    if stream:
        chunks = await served.chunks(**options)
        entries = [e for c in chunks if c.choices[0].logprobs for e in c.choices[0].logprobs.content or []]
    else:
        entries = (await served.chat(**options)).choices[0].logprobs.content
    assert bytes(byte for entry in entries for byte in entry.bytes or []).decode() == ANSWER
    assert {entry.logprob for entry in entries} == {-0.5}
    assert [len(entry.top_logprobs) for entry in entries] == [2] * len(ids(ANSWER))


async def test_log_probabilities_of_completions(served: Served) -> None:
    answer = await served.complete(logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == len(ids(ANSWER))
    assert logprobs.text_offset[:2] == [0, len(logprobs.tokens[0])]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Hi", [ids("Hi")]),
        (["Hi", "you there"], [ids("Hi"), ids("you there")]),
        ([5, 6, 7], [[5, 6, 7]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
        ("a<|im_end|>", [[*ids("a"), END]]),
    ],
)
async def test_every_form_of_prompt(served: Served, prompt: Any, expected: list[list[int]]) -> None:
    answer = await served.complete(prompt=prompt)
    assert [list(request.prompt) for request in served.engine.requests] == expected
    assert [choice.text for choice in answer.choices] == [ANSWER] * len(expected)
    assert answer.object == "text_completion"
    assert answer.usage.prompt_tokens == sum(map(len, expected))


async def test_echo_gives_the_prompt_back(served: Served) -> None:
    answer = await served.complete(prompt=["Hi ", "you "], n=2, echo=True)
    assert [choice.text for choice in answer.choices] == ["Hi " + ANSWER] * 2 + ["you " + ANSWER] * 2
    answer = await served.complete(prompt=ids("Hi "), echo=True)
    assert answer.choices[0].text == "Hi " + ANSWER
    stream = await served.complete(prompt="Hi ", echo=True, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == "Hi " + ANSWER


async def test_echo_with_log_probabilities(served: Served) -> None:
    answer = await served.complete(prompt="Hi there ", echo=True, logprobs=2, max_tokens=3)
    [choice] = answer.choices
    prompt = ids("Hi there ")
    assert len(choice.logprobs.tokens) == len(prompt) + 3
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.token_logprobs[1 : len(prompt)] == [-float(index) for index in range(1, len(prompt))]
    assert choice.text.startswith("Hi there ")
    scored = await served.complete(prompt=[prompt, prompt[:1]], echo=True, logprobs=1, max_tokens=0)
    assert [len(one.logprobs.tokens) for one in scored.choices] == [len(prompt), 1]
    assert scored.usage.completion_tokens == 0


async def test_values_that_mean_none(served: Served) -> None:
    answer = await served.chat(
        stop="", top_p=0, n=None, seed=None, logprobs=False, top_logprobs=0, frequency_penalty=0, presence_penalty=0,
        logit_bias={}, tools=[], tool_choice="none", response_format={"type": "text"}, max_completion_tokens=None,
        stream=None, user="", metadata={}, extra_body={"top_k": -1, "min_p": 0, "ignore_eos": None},
    )  # fmt: skip
    assert answer.choices[0].message.content == ANSWER


async def test_models(served: Served) -> None:
    [card] = (await served.client.models.list()).data
    assert (card.id, card.object) == (SERVED, "model")
    assert (await served.client.models.retrieve(SERVED)).id == SERVED
    with pytest.raises(openai.NotFoundError):
        await served.client.models.retrieve("other")


async def test_silence_is_filled_with_comments(served: Served) -> None:
    resume = asyncio.Event()
    served.parts = [*ids("one"), resume, *ids(" two")]
    body = {"model": SERVED, "messages": [{"role": "user", "content": "Hi"}], "stream": True}
    lines: list[str] = []
    async with (
        async_http() as client,
        client.stream("POST", f"{served.url}/v1/chat/completions", json=body) as response,
    ):
        async for line in response.aiter_lines():
            lines.append(line)
            if lines.count(": keep-alive") == 2:
                resume.set()
    assert lines[-2:] == ["data: [DONE]", ""]
    assert lines.count(": keep-alive") >= 2


async def test_the_client_outlives_a_pause(served: Served) -> None:
    resume = asyncio.Event()
    served.parts = [resume, *ids(ANSWER)]
    stream = await served.chat(stream=True)
    resume.set()
    assert joined([chunk async for chunk in stream]) == ANSWER


async def test_a_stream_that_fails_does_not_look_finished(served: Served) -> None:
    served.parts = [*ids("some"), GenerationFailedError("the group could not be healed")]
    seen: list[ChatCompletionChunk] = []

    async def read() -> None:
        async for chunk in await served.chat(stream=True):
            seen.append(chunk)

    with pytest.raises(openai.APIError, match="could not be healed"):
        await read()
    assert reasons(seen) == []


async def test_a_failed_stream_has_no_done_on_the_wire(served: Served) -> None:
    fail = asyncio.Event()
    served.parts = [*ids("some"), fail, GenerationFailedError("the group could not be healed")]
    body = {"model": SERVED, "prompt": "Hi", "stream": True}
    text = ""
    async with (
        async_http() as client,
        client.stream("POST", f"{served.url}/v1/completions", json=body) as response,
    ):
        async for part in response.aiter_text():
            text += part
            fail.set()
    assert response.status_code == 200
    assert "could not be healed" in text
    assert "[DONE]" not in text
    assert '"finish_reason":"' not in text


async def test_a_whole_answer_that_fails(served: Served) -> None:
    served.parts = [*ids("some"), GenerationFailedError("the group could not be healed")]
    with pytest.raises(openai.InternalServerError, match="could not be healed"):
        await served.chat()


@pytest.mark.parametrize("stream", [False, True])
async def test_refusals_are_statuses_streamed_or_not(served: Served, stream: bool) -> None:
    served.engine.refusal = EngineBusyError("the queue is full", 2.5)
    with pytest.raises(openai.InternalServerError) as busy:
        await served.chat(stream=stream)
    assert (busy.value.status_code, busy.value.response.headers["retry-after"]) == (503, "3")
    served.engine.refusal = RequestTooLongError("needs 90 blocks, there are 80")
    with pytest.raises(openai.BadRequestError, match="90 blocks") as long:
        await served.chat(stream=stream)
    assert long.value.code == "context_length_exceeded"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_away_cancels_its_request(served: Served, stream: bool) -> None:
    served.parts = [*ids("one"), asyncio.Event()]
    request = asyncio.create_task(served.chat() if not stream else served.chunks())
    await eventually(lambda: len(served.engine.running) == 1)
    request.cancel()
    await eventually(lambda: not served.engine.running)
    assert served.engine.cancelled == [served.engine.requests[0].request_id]
    await asyncio.gather(request, return_exceptions=True)


async def test_many_at_once(served: Served) -> None:
    answers = await asyncio.gather(*(served.chat() for _ in range(50)))
    assert {answer.choices[0].message.content for answer in answers} == {ANSWER}


async def test_too_long_says_the_numbers(served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match=r"2048 .* 3000") as prompt:
        await served.complete(prompt=[5] * 3000)
    assert (prompt.value.code, prompt.value.param) == ("context_length_exceeded", "prompt")
    with pytest.raises(openai.BadRequestError, match=r"2048 .* 2049 .* 2 .* 2047") as answer:
        await served.complete(prompt=[5, 6], max_tokens=2047)
    assert (answer.value.code, answer.value.param) == ("context_length_exceeded", "max_tokens")


async def test_another_model_is_not_found(served: Served) -> None:
    with pytest.raises(openai.NotFoundError, match="other") as error:
        await served.client.chat.completions.create(model="other", messages=[{"role": "user", "content": "Hi"}])
    assert error.value.code == "model_not_found"
