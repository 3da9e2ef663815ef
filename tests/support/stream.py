"""A streamed completion as a client reads it: its text, when each piece came, and how it ended."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import httpx
from tests.support.http import HTTP

# Greedy and seeded: both must go on with the tokens that would have come.
REQUESTS: Final = (
    {"prompt": "What is a module? ", "temperature": 0},
    {"prompt": "The for statement is used to", "temperature": 1.0, "seed": 7},
)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client can tell of a stream that has ended."""

    text: str
    finish: str  # the finish reason; empty when none came
    done: bool  # `data: [DONE]` was the last event
    error: str

    @property
    def looks_whole(self) -> bool:
        return bool(self.finish) or self.done


class Stream:
    """Read by a thread of its own, whose every wait lasts `seconds` at most. `times` are those of its pieces, monotonic
    seconds."""

    path = "/v1/completions"

    def __init__(self, api: str, request: Mapping[str, object], seconds: float) -> None:
        self.text, self.finish, self.done, self.error = "", "", False, ""
        self.times: list[float] = []
        self._url, self._seconds = f"{api}{self.path}", seconds
        self._body = {"ignore_eos": True, "stream": True, **request}
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    @property
    def pieces(self) -> int:
        return len(self.times)

    @property
    def pause(self) -> float:
        """The longest time between two pieces, in seconds."""
        return max((later - sooner for sooner, later in zip(self.times, self.times[1:], strict=False)), default=0.0)

    def wait(self) -> Answer:
        """Once it has ended.

        Raises:
            TimeoutError: it doesn't.
        """
        self._thread.join(self._seconds)
        if self._thread.is_alive():
            raise TimeoutError(f"the stream does not end; {self.pieces} pieces came: {self.text!r}")
        return Answer(self.text, self.finish, self.done, self.error)

    def piece(self, choice: Mapping[str, Any]) -> str:
        """What one event adds to the text."""
        return str(choice["text"])

    def _read(self) -> None:
        try:
            with HTTP.stream("POST", self._url, json=self._body, timeout=self._seconds) as answer:
                if answer.status_code != httpx.codes.OK:
                    self.error = f"{answer.status_code}: {answer.read().decode()}"
                for line in answer.iter_lines():
                    self._take(line)
        except httpx.HTTPError as error:
            self.error = f"{type(error).__name__}: {error}"

    def _take(self, line: str) -> None:
        self.done = self.done or line == "data: [DONE]"
        if not line.startswith("data: {"):
            return
        event = json.loads(line.removeprefix("data: "))
        self.error = self.error or str(event.get("error", ""))
        for choice in event.get("choices", []):
            if piece := self.piece(choice):
                self.times.append(time.monotonic())
                self.text += piece
            self.finish = choice.get("finish_reason") or self.finish


class ChatStream(Stream):
    """A streamed chat completion: its content, or its tool calls' names and arguments."""

    path = "/v1/chat/completions"

    def piece(self, choice: Mapping[str, Any]) -> str:
        delta = choice["delta"]
        calls = [call.get("function") or {} for call in delta.get("tool_calls") or []]
        said = [f"{call.get('name') or ''}{call.get('arguments') or ''}" for call in calls]
        return (delta.get("content") or "") + "".join(said)


def start(api: str, model: str, tokens: int, seconds: float) -> list[Stream]:
    """A stream for each of the requests."""
    return [Stream(api, {"model": model, "max_tokens": tokens, **request}, seconds) for request in REQUESTS]


def answers(streams: Sequence[Stream]) -> list[Answer]:
    return [stream.wait() for stream in streams]
