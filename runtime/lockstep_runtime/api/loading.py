"""Loads the model's text files, retrying until it succeeds, and reports why it can't."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from lockstep_runtime.api import model
from lockstep_runtime.api.blockers import Blocker, Blockers
from lockstep_runtime.api.model import ModelUnavailableError, ServedModel
from lockstep_runtime.config import ServeConfig
from lockstep_runtime.sources.model_folder import POLL_SECONDS, StillFetchingError

log = logging.getLogger(__name__)

RETRY_SECONDS: Final = 2.0
PART: Final = "model"
_BEGUN: Final = "the tokenizer and the chat template are being read"


class ModelLoader:
    """`why_not` is a sentence until `run` has returned."""

    def __init__(self, config: ServeConfig, blockers: Blockers) -> None:
        self._config, self._blockers = config, blockers
        self.why_not = _BEGUN

    async def run(self) -> ServedModel:
        """Retries: a wrong path may be fixed, a hub that is away comes back."""
        self._blockers.set(PART, Blocker(_BEGUN, loading=True))
        while True:
            try:
                loaded = await asyncio.to_thread(model.load, self._config)
            except StillFetchingError:
                await asyncio.sleep(POLL_SECONDS)
                continue
            except ModelUnavailableError as error:
                self._tell(str(error), may_pass=error.may_pass)
                await asyncio.sleep(max(RETRY_SECONDS, error.retry_after))
                continue
            self.why_not = ""
            self._blockers.set(PART, None)
            log.info("the tokenizer is loaded")
            return loaded

    def _tell(self, why_not: str, *, may_pass: bool) -> None:
        if self.why_not != why_not:
            log.warning("the tokenizer can't be loaded: %s", why_not)
            self.why_not = why_not
            self._blockers.set(PART, Blocker(why_not, may_pass=may_pass))
