"""For every kind of tokenizer: text that comes out token by token is the text of all tokens at once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.api_server import TINY_CHAT
from tests.support.tokenizer_kinds import BYTES, KINDS
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from lockstep_runtime.api.detokenizer import MOST_HELD, Detokenizer
from lockstep_runtime.api.tokenizer import TextTokenizer, UnsupportedTokenizerError

TINY = TextTokenizer.from_file(TINY_CHAT / "tokenizer.json")
ALL = {"tiny": TINY, **{name: TextTokenizer(make()) for name, make in KINDS.items()}}
LLAMA = ALL["llama"]
kinds = pytest.mark.parametrize("kind", ALL)


def streamed(tokenizer: TextTokenizer, ids: Sequence[int], after: Sequence[int] = ()) -> str:
    detokenizer = Detokenizer(tokenizer, after)
    return "".join(detokenizer.feed(id) for id in ids) + detokenizer.finish()


def whole(tokenizer: TextTokenizer, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True)


def parts_of_characters(tokenizer: TextTokenizer) -> list[int]:
    odd = [id for id in range(tokenizer.size) if "\ufffd" in tokenizer.decode([id])]
    return odd or list(range(tokenizer.size))


@kinds
@given(data=st.data())
@settings(max_examples=200)
def test_any_tokens_stream_to_what_the_library_decodes(kind: str, data: st.DataObject) -> None:
    tokenizer = ALL[kind]
    known = st.integers(0, tokenizer.size + 3)
    ids = data.draw(st.lists(known | st.sampled_from(parts_of_characters(tokenizer)), max_size=60))
    assert streamed(tokenizer, ids) == whole(tokenizer, ids)


@kinds
@given(text=st.text(st.characters(codec="utf-8") | st.sampled_from("🎉日本語é\n👩‍👩‍👧 hello"), max_size=60))
def test_any_text_streams_to_itself(kind: str, text: str) -> None:
    ids = ALL[kind].encode(text)
    assert streamed(ALL[kind], ids) == whole(ALL[kind], ids)


@pytest.mark.parametrize("kind", ["tiny", "byte_level", "llama", "gemma"])
def test_malformed_bytes_are_let_out_although_they_never_end(kind: str) -> None:
    tokenizer = ALL[kind]
    ids = parts_of_characters(tokenizer)[:1] * (5 * MOST_HELD)
    detokenizer = Detokenizer(tokenizer)
    before_the_end = "".join(map(detokenizer.feed, ids))
    assert before_the_end + detokenizer.finish() == whole(tokenizer, ids)
    assert len(before_the_end) > len(whole(tokenizer, ids)) // 2


def byte(value: int) -> int:
    id = LLAMA.id_of(BYTES[value])
    assert id is not None
    return id


def test_a_malformed_run_of_byte_tokens_which_the_librarys_own_stream_refuses() -> None:
    ids = [byte(0x61), byte(0xE4), LLAMA.id_of("x") or 0]
    raw, stream = Tokenizer.from_str(KINDS["llama"]().to_str()), DecodeStream()
    with pytest.raises(Exception, match="Invalid prefix"):
        [stream.step(raw, id) for id in ids]
    assert streamed(LLAMA, ids) == whole(LLAMA, ids) == "\ufffd\ufffdx"


def test_a_long_run_of_byte_tokens_comes_in_parts() -> None:
    ids = [byte(value) for value in ("語" * 100).encode()]
    detokenizer = Detokenizer(LLAMA)
    pieces = [detokenizer.feed(id) for id in ids]
    assert max(map(len, pieces)) < 30
    assert "".join(pieces) + detokenizer.finish() == "語" * 100


def test_the_parts_of_a_character_wait_for_each_other() -> None:
    detokenizer = Detokenizer(TINY)
    ids = [id for part in (b"\xc3", b"\xa9", b"!") for id in range(TINY.size) if TINY.token_bytes(id) == part]
    assert [detokenizer.feed(id) for id in ids] == ["", "é", "!"]


def test_an_unfinished_character_shows_at_the_end() -> None:
    detokenizer = Detokenizer(TINY)
    assert detokenizer.feed(next(id for id in range(TINY.size) if TINY.token_bytes(id) == b"\xf0")) == ""
    assert detokenizer.finish() == "\ufffd"


@pytest.mark.parametrize("kind", ["llama", "gemma", "metaspace", "word_piece"])
def test_what_follows_a_prompt_keeps_the_space_between_them(kind: str) -> None:
    tokenizer = ALL[kind]
    prompt, answer = tokenizer.encode("hello"), tokenizer.encode("world")
    assert streamed(tokenizer, answer) == tokenizer.decode(answer)
    assert tokenizer.decode(prompt) + streamed(tokenizer, answer, prompt) == tokenizer.decode([*prompt, *answer])


# --- bytes of single tokens


@pytest.mark.parametrize("kind", ["tiny", "byte_level", "llama", "gemma"])
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\u2581"), max_size=30))
def test_the_bytes_of_a_texts_tokens_are_its_bytes(kind: str, text: str) -> None:
    tokenizer = ALL[kind]
    joined = b"".join(tokenizer.token_bytes(id) for id in tokenizer.encode(text))
    assert joined.decode() == (" " if kind in ("llama", "gemma") and text else "") + text


@pytest.mark.parametrize(
    ("kind", "token", "expected"),
    [
        ("byte_level", "Ġh", b" h"),
        ("llama", "<0xE4>", b"\xe4"),
        ("llama", "\u2581hello", b" hello"),
        ("metaspace", "\u2581world", b" world"),
        ("metaspace", "日", "日".encode()),
        ("word_piece", "##t", b"t"),
        ("word_piece", "hello", b" hello"),
        ("llama", "</s>", b"</s>"),
        ("gemma", "two words", b"two words"),
    ],
)
def test_what_a_token_stands_for_within_a_text(kind: str, token: str, expected: bytes) -> None:
    id = ALL[kind].id_of(token)
    assert id is not None
    assert ALL[kind].token_bytes(id) == expected


@kinds
def test_ids_of_the_padded_vocabulary_are_nothing(kind: str) -> None:
    assert ALL[kind].token_bytes(ALL[kind].size + 5) == b""
    assert streamed(ALL[kind], [ALL[kind].size + 5]) == ""


# --- what a tokenizer's file says of its training


@pytest.mark.parametrize("direction", ["Left", "Right"])
@kinds
def test_settings_of_the_training_never_change_a_prompt(tmp_path: Path, kind: str, direction: str) -> None:
    path = tmp_path / "tokenizer.json"
    saved = json.loads((TINY_CHAT / "tokenizer.json").read_text() if kind == "tiny" else KINDS[kind]().to_str())
    saved["truncation"] = {"direction": direction, "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    saved["padding"] = {
        "strategy": {"Fixed": 64}, "direction": direction, "pad_to_multiple_of": 8, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "<unk>",
    }  # fmt: skip
    path.write_text(json.dumps(saved))
    text = "hello world, hello world. hello"
    read = TextTokenizer.from_file(path)
    for add_special_tokens in (False, True):
        expected = ALL[kind].encode(text, add_special_tokens=add_special_tokens)
        assert read.encode(text, add_special_tokens=add_special_tokens) == expected
    assert len(read.encode(text)) > 4


@pytest.mark.parametrize("kind", [*KINDS])
@pytest.mark.parametrize("text", ["a</s>b", "hello<s>world", "<s></s>"])
def test_cut_at_its_break_points_a_text_encodes_to_no_special_token(kind: str, text: str) -> None:
    tokenizer = ALL[kind]
    edges = [0, *tokenizer.break_points(text), len(text)]
    first, *further = [text[start:end] for start, end in pairwise(edges)]
    ids = [*tokenizer.encode(first), *(id for part in further for id in tokenizer.encode_further(part))]
    special = tokenizer.special_ids - {tokenizer.id_of("<unk>")}
    assert not special.intersection(ids)
    assert special.intersection(tokenizer.encode(text))
    if kind in ("byte_level", "llama", "gemma", "metaspace"):
        assert tokenizer.decode(ids).removeprefix(" ") == text


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": {"type": "Unheard"}}'])
def test_what_is_no_tokenizer_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(UnsupportedTokenizerError):
        TextTokenizer.from_file(path)
