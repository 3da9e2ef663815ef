"""The tokenizers and templates of real models give what transformers gives. `make test-tokenizers` fetches them."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any, Final

import pytest
from transformers import PreTrainedTokenizerFast

from lockstep_runtime.api.chat import encode_chat
from lockstep_runtime.api.chat_template import Chat
from lockstep_runtime.api.detokenizer import Detokenizer
from lockstep_runtime.api.model import ServedModel, load
from lockstep_runtime.config import ServeConfig

FETCHED: Final = Path(__file__).parents[2] / "build" / "tokenizers"
FILES: Final = {
    "qwen3": "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4",
    "llama3": "c05a3c2174e9edd5be19dc5a0748c42a9037bec2811ce062728bfd71f8702d78",
    "gptoss": "0614fe83cadab421296e664e1f48f4261fa8fef6e03e63bb75c20f38e37d07d3",
    "llama2": "fc4f0bd70b3709312d9d1d9e5ba674794b6bc5abc17429897a540f93882f25fc",
}
TEXTS: Final = (
    "Hello world", " leading and trailing ", "日本語 text 🎉👩‍👩‍👧", "a\n\n  b\tc", "", "don't we'll", "x" * 300,
    "e\u0301\u0302 ü", "1234567 ½", "def f(x):\n    return x ** 2\n", "\u2581", "<0x41>", "ﷺ \u200d \ufffd",
)  # fmt: skip
MESSAGES: Final[list[dict[str, object]]] = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "hi there 日本 🎉"},
    {"role": "assistant", "content": "ok"},
    {"role": "user", "content": "more?\n"},
]
names = pytest.mark.parametrize("name", FILES)


def folder(name: str) -> Path:
    found = FETCHED / name / "package" / "models"
    if not found.is_dir():
        pytest.fail(f"{found} is missing: run `make test-tokenizers`, which fetches it")
    return found


def served(name: str) -> ServedModel:
    return load(ServeConfig(model=str(folder(name)), served_name=name))


def oracle(name: str) -> Any:
    settings = json.loads((folder(name) / "tokenizer_config.json").read_text())
    kept = {key: settings[key] for key in ("bos_token", "eos_token", "chat_template") if key in settings}
    return PreTrainedTokenizerFast(tokenizer_file=str(folder(name) / "tokenizer.json"), **kept)


@names
def test_the_file_is_the_one_that_was_looked_at(name: str) -> None:
    assert hashlib.sha256((folder(name) / "tokenizer.json").read_bytes()).hexdigest() == FILES[name]


@names
def test_texts_encode_as_in_transformers(name: str) -> None:
    tokenizer, expected = served(name).tokenizer, oracle(name)
    for text in TEXTS:
        assert tokenizer.encode(text, add_special_tokens=True) == expected.encode(text)
        assert tokenizer.encode(text) == expected.encode(text, add_special_tokens=False)


@names
def test_chats_encode_as_in_transformers(name: str) -> None:
    model, expected = served(name), oracle(name)
    if model.template is None:
        assert expected.chat_template is None
        return
    for count in (2, 4):
        messages = MESSAGES[:count]
        chat = Chat(messages=messages)
        found = encode_chat(model.template, model.tokenizer, chat, seconds=5, limit=100_000, most=100_000)
        assert found == expected.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


@names
def test_any_tokens_stream_to_what_the_library_decodes(name: str) -> None:
    tokenizer, draw = served(name).tokenizer, random.Random(7)
    odd = [id for id in range(tokenizer.size) if "\ufffd" in tokenizer.decode([id])]
    for _ in range(1000):
        ids = [draw.choice(odd) if draw.random() < 0.5 else draw.randrange(tokenizer.size + 50) for _ in range(40)]
        detokenizer = Detokenizer(tokenizer)
        streamed = "".join(map(detokenizer.feed, ids)) + detokenizer.finish()
        assert streamed == tokenizer.decode(ids, skip_special_tokens=True)


@names
def test_the_bytes_of_a_texts_tokens_are_its_bytes(name: str) -> None:
    tokenizer, normalizer = served(name).tokenizer, oracle(name).backend_tokenizer.normalizer
    for text in filter(None, TEXTS):
        joined = b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))).decode()
        expected = normalizer.normalize_str(text) if normalizer else text
        assert joined == (expected.replace("\u2581", " ") if name == "llama2" else expected)
