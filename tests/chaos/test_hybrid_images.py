"""A hybrid model with experts and eyes outlives faults in a prompt and in decode, with an image and a tool call that a
grammar holds in flight: the image is encoded again where it must be, the grammar goes on where it was."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import pytest
from tests.support.chaos import STREAM_SECONDS, Arena, Cell, as_parameters, survive
from tests.support.serve import Served
from tests.support.stream import ChatStream, Stream
from tests.support.vision import data_uri, encoded, picture
from tests.support.vision_model import TEMPLATE, write_vision_model

from lockstep_runtime.protocol.chaos import CollectivePoint, FaultPhase, Injection

NAME: Final = "eyes"
NOTES: Final[dict[str, Any]] = {
    "type": "function",
    "function": {
        "name": "note",
        "parameters": {
            "type": "object",
            "properties": {"text": {"type": "string", "minLength": 1000}},
            "required": ["text"],
            "additionalProperties": False,
        },
    },
}
TOLD: Final = (
    "{%- if tools %}{{ '<|im_start|>system\\n' }}{%- for tool in tools %}{{ tool | tojson }}{%- endfor %}{%- endif %}"
)
BEFORE_ARGUMENTS: Final = 64  # tokens of the call's beginning, of which nothing is streamed
CELLS: Final = [
    Cell(kind, CollectivePoint.BEFORE, phase, rank, 2)
    for kind in (Injection.SIGKILL, Injection.SIGSEGV, Injection.RAISE, Injection.HANG, Injection.NAN)
    for phase in (FaultPhase.PREFILL, FaultPhase.DECODE)
    for rank in (0, 1)
]
THIRD: Final = {
    (Injection.SIGKILL, FaultPhase.DECODE, 0),
    (Injection.SIGSEGV, FaultPhase.DECODE, 1),
    (Injection.RAISE, FaultPhase.PREFILL, 1),
}


def requests(serve: Served, tokens: int) -> list[Stream]:
    image = {"type": "image_url", "image_url": {"url": data_uri(encoded(picture(120, 88)))}}
    seen = [{"role": "user", "content": [image, {"type": "text", "text": "What is this? " * 12}]}]
    asked = [{"role": "user", "content": "Note that. " * 12}]
    call = {"tools": [NOTES], "tool_choice": {"type": "function", "function": {"name": "note"}}}
    bodies: list[dict[str, Any]] = [
        {"messages": seen, "temperature": 0, "max_tokens": tokens},
        {"messages": asked, "temperature": 1.0, "seed": 7, "max_tokens": tokens + BEFORE_ARGUMENTS, **call},
    ]
    return [ChatStream(serve.api, {"model": NAME, **body}, STREAM_SECONDS) for body in bodies]


@pytest.fixture(scope="module")
def eyes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    directory = tmp_path_factory.mktemp("eyes")
    model = write_vision_model(directory / NAME, experts=True)
    (model / "chat_template.jinja").write_text(TOLD + TEMPLATE)
    arguments = ("--max-batch-tokens", "96", "--tool-call-parser", "hermes")
    arena = Arena(directory, 2, *arguments, model=model, requests=requests)
    yield arena
    arena.close()


@pytest.mark.parametrize("cell", as_parameters(CELLS, lambda cell: (cell.kind, cell.phase, cell.rank) in THIRD))
def test_an_image_and_a_tool_call_outlive(cell: Cell, eyes: Arena) -> None:
    survive(eyes, cell)
