"""The API keys that clients may send: one that was given, or the lines of a file that may change while it is used."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
from pathlib import Path
from typing import Final

from lockstep_runtime.api.blockers import Blocker, Blockers
from lockstep_runtime.sources.errors import lasts
from lockstep_runtime.sources.files import unreadable

log = logging.getLogger(__name__)

MAX_BYTES: Final = 64 * 1024
LOOK_SECONDS: Final = 2.0
PART: Final = "keys"
_NOBODY: Final = "no client can be let in"


class ApiKeys:
    """Without a key and without a file, none is asked for.

    Args:
        key: one key that is always valid.
        file: a file of keys, one a line, looked at again with every request: a mounted Secret changes there. One that
            can't be read leaves the keys as they were, at first none; then nobody is let in.
    """

    def __init__(self, key: str | None = None, file: Path | None = None) -> None:
        self._file = file
        self._fixed = _digests(key.encode()) if key else ()
        self._read: tuple[bytes, ...] = ()
        self._version: object = None
        self._problem = Blocker("")  # why the file can't be read

    @property
    def asked_for(self) -> bool:
        return bool(self._fixed) or self._file is not None

    def accepts(self, key: bytes) -> bool:
        """Digests have one length, and all are compared: the time reveals nothing of the keys."""
        given = _digest(key)
        return sum([hmac.compare_digest(given, valid) for valid in (*self._fixed, *self._from_file())]) > 0

    def blocker(self) -> Blocker | None:
        """Why no key is valid though one is asked for; None while there is one. It looks at the file."""
        if not self.asked_for or self._fixed or self._from_file():
            return None
        if self._problem.reason:
            return self._problem
        return Blocker(f"{self._file} holds no API key, so {_NOBODY}: write one on each line")

    async def watch(self, blockers: Blockers) -> None:
        """Report, without waiting for a request, that no key is valid; until cancelled."""
        told: Blocker | None = None
        while self._file is not None:
            found = self.blocker()
            if found != told:
                told = found
                blockers.set(PART, found)
            await asyncio.sleep(LOOK_SECONDS)

    def _from_file(self) -> tuple[bytes, ...]:
        if self._file is None:
            return ()
        try:
            stat = self._file.stat()
            version: object = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
            if version != self._version:
                with self._file.open("rb") as file:
                    self._read = _digests(file.read(MAX_BYTES))
                self._problem = Blocker("")
                log.info("%d API keys are valid, from %s", len(self._read), self._file)
        except OSError as error:
            version = str(error)
            if version != self._version:
                why = f"the API keys can't be read, so {_NOBODY}: {unreadable(self._file, error)}"
                self._problem = Blocker(why, may_pass=not lasts(error))
                log.warning("the API keys can't be read (%s); %d stay valid", error, len(self._read))
        self._version = version
        return self._read


def _digests(text: bytes) -> tuple[bytes, ...]:
    return tuple(_digest(line.strip()) for line in text.splitlines() if line.strip())


def _digest(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()
