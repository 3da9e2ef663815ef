"""Clients that ask again and again while something is done to the model, and remember every request that failed."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Self

from openai import OpenAI, OpenAIError
from tests.support.cluster_model import Model

QUESTION = "What is a generator?"
PAUSE_SECONDS = 0.2  # between an answer and the next question: the pods that start meanwhile need the cores


class Load:
    """So many clients at once; the even ones keep their connection, the odd ones open a new one for every request.

    `pause` is in seconds, from an answer to the next question.
    """

    def __init__(self, model: Model, clients: int = 4, pause: float = PAUSE_SECONDS) -> None:
        self._model, self._served, self._pause = model, model.served(), pause
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._ask_on, args=(number,)) for number in range(clients)]
        self.answered = 0
        self.failures: list[str] = []
        self.texts: set[str] = set()  # all are asked the same

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=130)

    def _ask_on(self, number: int) -> None:
        client, asked = self._model.client(), 0
        while not self._stop.is_set():
            if number % 2 and asked:
                client.close()
                client = self._model.client()
            asked += 1
            self._ask(client, stream=asked % 2 == 0, number=number)
            self._stop.wait(self._pause)
        client.close()

    def _ask(self, client: OpenAI, *, stream: bool, number: int) -> None:
        began = time.time()
        try:
            answer = _streamed(client, self._served) if stream else _whole(client, self._served)
        except (OpenAIError, IncompleteError) as error:
            with self._lock:
                self.failures.append(
                    f"client {number}, {'stream' if stream else 'whole'}, after {time.time() - began:.2f} s at "
                    f"{time.strftime('%H:%M:%S')}: {type(error).__name__}: {error} ({error.__cause__!r})"
                )
        else:
            with self._lock:
                self.answered += bool(answer)
                self.texts.add(answer)


class IncompleteError(Exception):
    """An answer that ended without a finish reason."""


def _whole(client: OpenAI, served: str) -> str:
    choice = client.chat.completions.create(
        model=served, messages=[{"role": "user", "content": QUESTION}], max_tokens=8, temperature=0
    ).choices[0]
    if choice.finish_reason not in ("stop", "length"):
        raise IncompleteError(f"finish_reason is {choice.finish_reason}")
    return choice.message.content or ""


def _streamed(client: OpenAI, served: str) -> str:
    text, finish = "", None
    for chunk in client.chat.completions.create(
        model=served, messages=[{"role": "user", "content": QUESTION}], max_tokens=8, temperature=0, stream=True
    ):
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finish = choice.finish_reason or finish
    if finish not in ("stop", "length"):
        raise IncompleteError(f"the stream ended with finish_reason {finish} after {text!r}")
    return text
