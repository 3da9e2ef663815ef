"""Server-sent events as a client joins them."""

from __future__ import annotations

import json


def joined(stream: str) -> str:
    """The text of a stream of chunks with one choice, to its end."""
    assert stream.endswith("data: [DONE]\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in stream.splitlines() if line.startswith("data: {")]
    choices = [choice for event in events for choice in event["choices"]]
    return "".join(choice["text"] if "text" in choice else choice["delta"].get("content") or "" for choice in choices)
