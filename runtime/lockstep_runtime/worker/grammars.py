"""Grammars on rank 0: compiled in a thread beside the steps, each once, and followed from draw to draw."""

from __future__ import annotations

import logging
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

from llguidance import LLMatcher, LLTokenizer

from lockstep_runtime.config import ServeConfig
from lockstep_runtime.grammar.compiler import GrammarError, compile_grammar
from lockstep_runtime.grammar.vocabulary import NoVocabularyError, read_vocabulary
from lockstep_runtime.protocol.step import Grammar
from lockstep_runtime.sources.errors import ModelError
from lockstep_runtime.sources.model_folder import find_model

logger = logging.getLogger(__name__)

KEPT: Final = 64  # compiled grammars


class Grammars:
    """
    Args:
        tokenizer: None: there is none, and `why_not` says why.
    """

    def __init__(self, tokenizer: LLTokenizer | None = None, why_not: str = "it has not been read") -> None:
        self._tokenizer, self._why_not = tokenizer, why_not
        self._compiled: OrderedDict[tuple[str, str], Future[LLMatcher]] = OrderedDict()
        self._thread: ThreadPoolExecutor | None = None  # not before it is needed: this process may be forked

    def begin(self, grammar: Grammar) -> Future[LLMatcher]:
        """At its start, once it is compiled; with a `GrammarError` if it can't be."""
        key = (grammar.kind, grammar.text)
        compiled = self._compiled.pop(key, None) or self._submit(grammar)
        self._compiled[key] = compiled
        if len(self._compiled) > KEPT:
            self._compiled.popitem(last=False)
        return compiled

    def _submit(self, grammar: Grammar) -> Future[LLMatcher]:
        if self._tokenizer is None:
            refused: Future[LLMatcher] = Future()
            refused.set_exception(GrammarError(f"rank 0 has no vocabulary: {self._why_not}"))
            return refused
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="lockstep-grammar")
        return self._thread.submit(compile_grammar, grammar, self._tokenizer)


def load_grammars(config: ServeConfig, rows: int) -> Grammars:
    """Takes a second or so for a large vocabulary. rows: of the model's logits."""
    try:
        folder = find_model(config.model, config.model_revision, config.download_dir)
        return Grammars(read_vocabulary(folder, rows))
    except (NoVocabularyError, ModelError) as error:
        logger.warning("answers can't be constrained: %s", error)
        return Grammars(None, str(error))
