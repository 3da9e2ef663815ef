"""A model of random weights with a vocabulary as large as Qwen's, whose every token is a word of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from tests.support.architectures import write_words
from tests.support.models import ModelShape, write_model
from tests.support.stream import Answer, Stream

VOCABULARY: Final = 151_936
NAME: Final = "large-vocabulary"
TOKENS: Final = 300  # of a stream
SHAPE: Final = ModelShape(hidden=64, layers=2, vocabulary=VOCABULARY, tied=True, max_positions=2048)  # 39 MB
# Greedy and seeded, with the whole vocabulary to draw from and with what the authors of Qwen advise.
REQUESTS: Final = (
    {"prompt": "w5 w77 w140000", "temperature": 0},
    {"prompt": "w9 w10 w11 w12", "temperature": 1.0, "seed": 7},
    {"prompt": "w151935", "temperature": 0.6, "top_k": 20, "top_p": 0.95, "seed": 8},
)


def write_large_vocabulary(folder: Path) -> Path:
    write_model(folder, SHAPE)
    write_words(folder, VOCABULARY)
    for file in folder.iterdir():
        file.chmod(0o644)  # pods read it as another user
    return folder


def start(api: str, model: str, seconds: float) -> list[Stream]:
    return [Stream(api, {"model": model, "max_tokens": TOKENS, **request}, seconds) for request in REQUESTS]


def is_whole(answer: Answer) -> bool:
    return len(answer.text.split()) == TOKENS and answer.done and not answer.error
