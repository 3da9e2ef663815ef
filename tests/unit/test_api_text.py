"""Text that comes out token by token is the text of all tokens at once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.api_server import TINY_CHAT

from lockstep_runtime.api.text import Decoder, StopMatcher
from lockstep_runtime.api.tokenizer import TextTokenizer

TOKENIZER = TextTokenizer.from_file(TINY_CHAT / "tokenizer.json")


def streamed(ids: Sequence[int]) -> str:
    decoder = Decoder()
    return "".join(decoder.feed(TOKENIZER.token_bytes(id)) for id in ids) + decoder.finish()


@given(st.text(st.characters(codec="utf-8") | st.sampled_from("🎉日本語é\n👩‍👩‍👧"), max_size=60))
def test_any_text_streams_to_itself(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert streamed(ids) == TOKENIZER.decode(ids)


@given(st.lists(st.integers(0, TOKENIZER.size - 1), max_size=40))
def test_any_tokens_stream_to_what_the_library_decodes(ids: list[int]) -> None:
    assert streamed(ids) == TOKENIZER.decode(ids)


def test_the_parts_of_a_character_wait_for_each_other() -> None:
    decoder = Decoder()
    assert [decoder.feed(bytes([byte])) for byte in "é!".encode()] == ["", "é", "!"]


def test_an_unfinished_character_shows_at_the_end() -> None:
    decoder = Decoder()
    assert decoder.feed("🎉".encode()[:3]) == ""
    assert decoder.finish() == "\ufffd"


def cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The specification: up to the stop string that ends first, of those the longest."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - len(max(ending, key=len))], True
    return text, False


@given(
    st.lists(st.text("ab ", max_size=4), max_size=12),
    st.lists(st.text("ab ", min_size=1, max_size=5), max_size=4),
)
@settings(max_examples=1000)
def test_stop_strings_never_leak_however_the_text_is_cut(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    out = ""
    for piece in pieces:
        out += matcher.feed(piece)
        assert cut("".join(pieces), stops)[0].startswith(out)
        if matcher.stopped:
            break
    else:
        out += matcher.finish()
    assert (out, matcher.stopped) == cut("".join(pieces), stops)


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    matcher = StopMatcher(["STOP"])
    assert [matcher.feed(text) for text in ("go S", "T", "ART ST", "OP")] == ["go ", "", "START ", ""]
    assert matcher.stopped


def test_without_stop_strings_nothing_is_held_back() -> None:
    matcher = StopMatcher([])
    assert matcher.feed("at once") == "at once"
    assert matcher.finish() == ""


@pytest.mark.parametrize("text", ["a<|im_end|>b", "<|im_end|>", "<|<|im_start|>im_start|>", "<|im_end|><|im_end|>"])
def test_cut_at_its_break_points_a_text_encodes_to_no_special_token(text: str) -> None:
    edges = [0, *TOKENIZER.break_points(text), len(text)]
    ids = [id for start, end in pairwise(edges) for id in TOKENIZER.encode(text[start:end])]
    assert not TOKENIZER.special_ids.intersection(ids)
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.special_ids.intersection(TOKENIZER.encode(text))


def test_ids_of_the_padded_vocabulary_are_nothing() -> None:
    assert TOKENIZER.token_bytes(TOKENIZER.size + 5) == b""
