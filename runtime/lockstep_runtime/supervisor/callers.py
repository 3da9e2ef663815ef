"""Who may ask a pod's supervisor for what."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

from lockstep_runtime.protocol.tokens import Purpose, entitles

log = logging.getLogger(__name__)

MAX_BYTES: Final = 4096
_OPERATORS: Final = (Purpose.STATUS, Purpose.FENCE)


class Callers:
    """Whoever knows the group's token may ask for anything, the operator for what it needs.

    Args:
        token: the group's.
        operator_file: the token that the operator shares with the model's pods. It is read again with every request: a
            mounted Secret changes there, and nobody has to be restarted for it. While it can't be read, the last one
            holds.
    """

    def __init__(self, token: str, operator_file: Path | None = None) -> None:
        self._token = token
        self._operator_file = operator_file
        self._operator_token = ""
        self._problem = ""

    def may(self, given: str, purpose: Purpose) -> bool:
        if entitles(given, self._token, purpose):
            return True
        operator = self._operators() if purpose in _OPERATORS else ""
        return bool(operator) and entitles(given, operator, purpose)

    def _operators(self) -> str:
        if self._operator_file is None:
            return ""
        try:
            with self._operator_file.open("rb") as file:
                found, problem = file.read(MAX_BYTES).decode(errors="replace").strip(), ""
        except OSError as error:
            found, problem = self._operator_token, f"{type(error).__name__}: {error}"
        if problem and problem != self._problem:
            log.warning("the operator's token can't be read, so the operator may be refused: %s", problem)
        self._operator_token, self._problem = found, problem
        return found
