"""A streamed completion as a client reads it: its text, when each piece came, and how it ended."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping

import httpx


class Stream:
    """Read by a thread of its own, whose every wait lasts `seconds` at most."""

    def __init__(self, api: str, request: Mapping[str, object], seconds: float) -> None:
        self.text, self.finish, self.error = "", "", ""
        self.times: list[float] = []  # monotonic seconds, of the chunks that have text
        self._url, self._seconds = f"{api}/v1/completions", seconds
        self._body = {"ignore_eos": True, "stream": True, **request}
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    @property
    def chunks(self) -> int:
        return len(self.times)

    def wait(self) -> tuple[str, str, str]:
        """Text, finish reason and error, once it has ended."""
        self._thread.join(self._seconds)
        if self._thread.is_alive():
            return self.text, "", f"the stream does not end; {self.chunks} chunks came"
        return self.text, self.finish, self.error

    def pause(self) -> float:
        """The longest time between two chunks, in seconds."""
        return max(later - sooner for sooner, later in zip(self.times, self.times[1:], strict=False))

    def _read(self) -> None:
        try:
            with httpx.stream("POST", self._url, json=self._body, timeout=self._seconds) as answer:
                if answer.status_code != httpx.codes.OK:
                    self.error = f"{answer.status_code}: {answer.read().decode()}"
                for line in answer.iter_lines():
                    if line.startswith("data: {"):
                        self._take(json.loads(line.removeprefix("data: ")))
        except httpx.HTTPError as error:
            self.error = f"{type(error).__name__}: {error}"

    def _take(self, event: dict[str, list[dict[str, str]]]) -> None:
        self.error = self.error or str(event.get("error", ""))
        for choice in event.get("choices", []):
            if choice["text"]:
                self.times.append(time.monotonic())
                self.text += choice["text"]
            self.finish = choice.get("finish_reason") or self.finish
