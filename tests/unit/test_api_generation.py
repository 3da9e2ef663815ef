"""Token events become pieces: the same text streamed or not, reasoning parted from the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.chat_model import chat_tokenizer

from lockstep_runtime.api.answer_text import Delta
from lockstep_runtime.api.generation import Choice, Job
from lockstep_runtime.api.reasoning import find_markers, opens_reasoning
from lockstep_runtime.api.response_format import ChatFormat, CompletionFormat
from lockstep_runtime.api.tokenizer import TextTokenizer
from lockstep_runtime.engine.client import FinishReason, GenerationRequest, TokenEvent
from lockstep_runtime.protocol.step import SampledToken, SamplingParams

TOKENIZER = TextTokenizer(chat_tokenizer())
MARKERS = find_markers(TOKENIZER.added, "auto")
END = TOKENIZER.id_of("<|im_end|>") or 0


def job(
    *,
    prompt: Sequence[int] = (5,),
    stops: Sequence[str] = (),
    logprobs: int = -1,
    reasoning: bool = True,
    thinks: bool = False,
) -> Job:
    request = GenerationRequest(
        request_id="r", prompt=tuple(prompt), max_tokens=1000, sampling=SamplingParams(logprobs=logprobs)
    )
    return Job(
        id="j",
        created=0,
        model="m",
        requests=(request,),
        prompt_tokens=len(prompt),
        stops=tuple(stops),
        chat=reasoning,
        markers=MARKERS if reasoning else None,
        thinks=thinks,
        stream=True,
        include_usage=False,
    )


def as_json(entry: dict[str, Any]) -> dict[str, Any]:
    """As clients read it: log probabilities are encoded already."""
    found: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(entry))
    return found


def run(text: str, job: Job, finish: FinishReason = FinishReason.STOP) -> tuple[list[Delta], Choice]:
    """As the engine would: a stop token after the text, or the last token of the text ends it."""
    choice = Choice(job, 0, TOKENIZER)
    ids = TOKENIZER.encode(text)
    events = [TokenEvent(SampledToken(sequence_id=0, token=id, logprob=-1.0)) for id in ids]
    if finish is FinishReason.STOP:
        events.append(TokenEvent(SampledToken(sequence_id=0, token=END, logprob=-1.0), finish))
    else:
        events[-1] = TokenEvent(events[-1].token, finish)
    pieces: list[Delta] = []
    for event in events:
        if choice.finish_reason is None:
            pieces += choice.feed(event)
    return pieces, choice


def parts(text: str, job: Job, finish: FinishReason = FinishReason.STOP) -> tuple[str, str]:
    """Reasoning and answer."""
    pieces, _ = run(text, job, finish)
    return (
        "".join(piece.text for piece in pieces if piece.reasoning),
        "".join(piece.text for piece in pieces if not piece.reasoning),
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>\nhm, ha\n\nso\n</think>\n\nThe answer\n", ("hm, ha\n\nso", "The answer\n")),
        ("<think>\n\n</think>\n\nAt once", ("", "At once")),
        ("\n<think>a</think>b", ("a", "\nb")),
        ("Not <think> here </think>", ("", "Not <think> here </think>")),
        ("No thought", ("", "No thought")),
        ("\n\nKept as it is\n", ("", "\n\nKept as it is\n")),
        ("<think>never done", ("never done", "")),
        ("<think>a</think>b<think>c</think>", ("a", "b<think>c</think>")),
    ],
)
def test_reasoning_is_parted_from_the_answer(text: str, expected: tuple[str, str]) -> None:
    assert parts(text, job()) == expected


def test_the_template_may_have_opened_the_reasoning() -> None:
    assert parts("hm</think>\nyes", job(thinks=True)) == ("hm", "yes")
    assert MARKERS is not None
    assert opens_reasoning(MARKERS, TOKENIZER.encode("assistant\n<think>\n"))
    assert not opens_reasoning(MARKERS, TOKENIZER.encode("assistant\n<think>\n\n</think>\n\n"))
    assert not opens_reasoning(MARKERS, TOKENIZER.encode("assistant\n"))


def test_where_reasoning_is_not_asked_for_the_markers_are_text() -> None:
    assert parts("<think>a</think>b", job(reasoning=False)) == ("", "<think>a</think>b")


@given(st.text(max_size=30), st.sampled_from(list(FinishReason)))
def test_without_markers_the_text_is_untouched(text: str, finish: FinishReason) -> None:
    ids = TOKENIZER.encode(text)
    if not ids or TOKENIZER.special_ids.intersection(ids):
        return
    assert parts(text, job(), finish)[1] == TOKENIZER.decode(ids)


def test_a_stop_string_ends_the_answer_and_nothing_follows() -> None:
    pieces, choice = run("one two three", job(stops=["tw"]))
    assert "".join(piece.text for piece in pieces) == "one "
    assert choice.finish_reason is FinishReason.STOP


def test_a_stop_string_ends_the_reasoning_too() -> None:
    pieces, choice = run("<think>one two</think>three", job(stops=["two"]))
    assert [(piece.reasoning, piece.text) for piece in pieces if piece.text][-1][0]
    assert choice.finish_reason is FinishReason.STOP


def test_what_was_held_back_comes_out_at_the_end() -> None:
    assert parts("half a st", job(stops=["stop"]), FinishReason.LENGTH)[1] == "half a st"


def test_a_finished_character_is_missing_its_rest() -> None:
    choice = Choice(job(), 0, TOKENIZER)
    id = next(id for id in range(TOKENIZER.size) if TOKENIZER.token_bytes(id) == b"\xf0")
    token = SampledToken(sequence_id=0, token=id)
    assert choice.feed(TokenEvent(token, FinishReason.LENGTH)) == [Delta("\ufffd")]


@pytest.mark.parametrize("finish", list(FinishReason))
def test_every_token_of_the_text_has_its_log_probability_once(finish: FinishReason) -> None:
    text = "one two 🎉 three st"
    pieces, _ = run(text, job(logprobs=0, stops=["stop"]), finish)
    tokens = [token.token for piece in pieces for token in piece.tokens]
    assert tokens == TOKENIZER.encode(text)


def test_minus_infinity_is_a_number_in_json() -> None:
    token = SampledToken(sequence_id=0, token=70, logprob=float("-inf"), top=[(71, float("-inf"))])
    form = ChatFormat(TOKENIZER, 1, logprobs=True)
    entry = as_json(form.delta(0, Delta("a", tokens=(token,))))["logprobs"]["content"][0]
    assert (entry["logprob"], entry["top_logprobs"][0]["logprob"]) == (-9999.0, -9999.0)


def test_offsets_go_on_from_chunk_to_chunk() -> None:
    form = CompletionFormat(TOKENIZER, [""], logprobs=True)
    pieces, _ = run("one two three", job(logprobs=0))
    offsets = [offset for piece in pieces for offset in as_json(form.delta(0, piece))["logprobs"]["text_offset"]]
    assert offsets[0] == 0
    assert offsets == sorted(offsets)
    assert offsets[-1] < len("one two three")
