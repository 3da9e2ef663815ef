"""A call that is demanded of a real model on real ranks: what comes is a call of the tool's schema, fault or none."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.support.chat_model import HERMES
from tests.support.http import HTTP
from tests.support.serve import TINY_CHAT, Served, served

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "note",
        "parameters": {
            "type": "object",
            "properties": {
                "kind": {"enum": ["loop", "module"]},
                "lines": {"type": "array", "items": {"enum": [1, 2, 3]}, "minItems": 16, "maxItems": 16},
                "done": {"type": "boolean"},
            },
            "required": ["kind", "lines", "done"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """tiny-chat in float32 with a template of tools that it was never taught."""
    folder = tmp_path_factory.mktemp("tools") / "tiny-chat"
    shutil.copytree(TINY_CHAT, folder)
    (folder / "chat_template.jinja").write_text(HERMES)
    arguments = ("--tensor-parallel-size", "2", "--dtype", "float32", "--threads-per-rank", "1")
    with served(folder.parent, *arguments, model=folder) as serve:
        serve.ready()
        yield serve


def stream(serve: Served, during: Callable[[int], None]) -> tuple[str, str, str]:
    """Name, arguments and finish reason; `during` is told of each piece of the arguments."""
    body = {
        "model": "tiny-chat",
        "messages": [{"role": "user", "content": "What is a for loop?"}],
        "tools": [TOOL],
        "tool_choice": {"type": "function", "function": {"name": "note"}},
        "stream": True,
        "seed": 5,
        "temperature": 0.8,
        "max_tokens": 400,
    }
    name, arguments, reason, pieces = "", "", "", 0
    with HTTP.stream("POST", f"{serve.api}/v1/chat/completions", json=body, timeout=120) as answer:
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event, event
            [choice] = event["choices"]
            assert not choice["delta"].get("content")
            reason = choice["finish_reason"] or reason
            for call in choice["delta"].get("tool_calls", []):
                assert call["index"] == 0
                name += call["function"].get("name", "")
                arguments += call["function"]["arguments"]
                pieces += 1
                during(pieces)
    return name, arguments, reason


def test_a_demanded_call_is_the_same_after_a_rank_is_killed(server: Served) -> None:
    undisturbed = stream(server, lambda _: None)
    name, written, reason = undisturbed
    arguments = json.loads(written)
    assert (name, reason) == ("note", "tool_calls")
    assert arguments["kind"] in ("loop", "module")
    assert len(arguments["lines"]) == 16
    assert set(arguments["lines"]) <= {1, 2, 3}
    assert isinstance(arguments["done"], bool)
    for rank in (0, 1):
        faults = len(server.status().faults)

        def kill(pieces: int, rank: int = rank) -> None:
            if pieces == 2:
                os.kill(server.pid_of(f"worker model=local group=0 rank={rank}"), signal.SIGKILL)

        assert stream(server, kill) == undisturbed
        server.ready()
        assert len(server.status().faults) == faults + 1
