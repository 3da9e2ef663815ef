"""From the form that a request asks for to the grammar that rank 0 follows."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from lockstep_runtime.api.chat_prompt import ChatPrompt
from lockstep_runtime.api.errors import invalid, unavailable
from lockstep_runtime.api.generation import Job
from lockstep_runtime.api.grammar_fields import Form
from lockstep_runtime.api.model import ServedModel
from lockstep_runtime.api.reasoning import has_marker
from lockstep_runtime.grammar.checker import GrammarChecker
from lockstep_runtime.protocol.step import Grammar, Thoughts

MOST_WAITING: Final = 16  # for a grammar to be tried
RETRY_SECONDS: Final = 5.0


class GrammarChecks:
    """Grammars of requests, tried one by one: one that is known waits for none, and other requests for no grammar."""

    def __init__(self) -> None:
        self._checker = GrammarChecker()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lockstep-grammar")
        self._waiting = 0

    async def check(self, job: Job) -> None:
        """
        Raises:
            ApiError: 400, the form that the job's answer is to have can't be used; 503, too many wait.
        """
        rules = job.requests[0].rules
        if rules is None or rules.grammar is None:
            return
        verdict = self._checker.known(rules.grammar)
        if verdict is None:
            if self._waiting >= MOST_WAITING:
                raise unavailable(f"{self._waiting} forms of answers are being tried", RETRY_SECONDS)
            self._waiting += 1
            try:
                loop = asyncio.get_running_loop()
                verdict = await loop.run_in_executor(self._thread, self._checker.check, rules.grammar)
            finally:
                self._waiting -= 1
        if verdict.error:
            raise invalid(f"{job.form_field}: {verdict.error}", job.form_field)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._checker.close()


def grammar_of(form: Form, model: ServedModel, prompt: ChatPrompt | None = None) -> Grammar:
    """prompt: of a chat, whose answer may begin with the model's thoughts.

    Raises:
        ApiError: 400, no token of this model ends an answer.
    """
    rows = model.tokenizer.size if model.vocabulary is None else model.vocabulary
    ends = tuple(sorted(id for id in model.stop_ids if id < rows))
    if not ends:
        raise invalid(f"{form.field}: this model names no token that ends an answer", form.field)
    return Grammar(kind=form.kind, text=form.text, end_ids=ends, thoughts=_thoughts(model, prompt))


def _thoughts(model: ServedModel, prompt: ChatPrompt | None) -> Thoughts | None:
    markers = model.markers
    if markers is None or prompt is None:
        return None
    if not prompt.thinks and (prompt.continues or has_marker(markers, prompt.ids)):
        return None  # there were thoughts already, if only empty ones: the template was asked for none
    return Thoughts(opening=markers.opening, closing=markers.closing, open=prompt.thinks)
