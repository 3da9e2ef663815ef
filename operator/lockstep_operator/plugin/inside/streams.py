"""Inside a group's first pod: some completions at once, streamed, as a client reads them; what came as JSON.

Arguments: the model's name, tokens of each answer, seconds that a stream may take in all.
"""

import json
import os
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

# Greedy and seeded: each must go on with the tokens that would have come.
REQUESTS = (
    {"prompt": "Explain what happens when one of several ranks fails.", "temperature": 0},
    {"prompt": "Once upon a time, a cluster", "temperature": 1.0, "seed": 7},
)


class Reader(threading.Thread):
    """One stream: its text, how it ended, the longest time between two of its pieces in seconds."""

    def __init__(self, model: str, tokens: int, seconds: float, request: dict[str, object]) -> None:
        super().__init__(daemon=True)
        self.text, self.finish, self.error, self.pause, self.pieces = "", "", "", 0.0, 0
        self._last = 0.0
        self._until = time.monotonic() + seconds
        body = {"model": model, "max_tokens": tokens, "ignore_eos": True, "stream": True, **request}
        self._request = urllib.request.Request(
            "http://localhost:8000/v1/completions", json.dumps(body).encode(), headers(), method="POST"
        )

    def run(self) -> None:
        try:
            with urllib.request.urlopen(self._request, timeout=self._left()) as answer:  # noqa: S310
                for line in answer:
                    self._take(line.decode().strip())
                    self._left()
        except urllib.error.HTTPError as error:
            self.error = f"{error.code}: {error.read().decode(errors='replace')}"
        except OSError as error:
            self.error = f"{type(error).__name__}: {error}"

    def _left(self) -> float:
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError("the stream has not ended in time")
        return left

    def _take(self, line: str) -> None:
        if not line.startswith("data: {"):
            return
        event = json.loads(line.removeprefix("data: "))
        self.error = self.error or str(event.get("error") or "")
        for choice in event.get("choices", []):
            now = time.monotonic()
            if choice["text"]:
                self.pause = max(self.pause, now - self._last) if self.pieces else 0.0
                self._last, self.pieces, self.text = now, self.pieces + 1, self.text + choice["text"]
            self.finish = choice.get("finish_reason") or self.finish


def headers() -> dict[str, str]:
    """With one of the API keys, which the pod has as a file."""
    file = os.environ.get("LOCKSTEP_API_KEY_FILE")
    found = {"Content-Type": "application/json"}
    if file:
        lines = [line.strip() for line in Path(file).read_text().splitlines() if line.strip()]
        found["Authorization"] = f"Bearer {lines[0]}"
    return found


def main() -> None:
    model, tokens, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    readers = [Reader(model, tokens, seconds, request) for request in REQUESTS]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(seconds + 10)
    kept = ("text", "finish", "error", "pause")
    print(json.dumps([{name: getattr(reader, name) for name in kept} for reader in readers]))  # noqa: T201


if __name__ == "__main__":
    main()
