"""Whether a grammar can be used, found out in a process that may be lost (grammar/trial.py)."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from typing import Final

import msgspec

from lockstep_runtime.grammar.trial import Verdict, too_complex
from lockstep_runtime.protocol.step import Grammar

KEPT: Final = 256  # verdicts
MOST_SECONDS: Final = 30.0  # on a busy machine: the process ends after half a second of CPU time
START_SECONDS: Final = 60.0
_VARIABLES: Final = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "TMPDIR")  # no secrets


class GrammarChecker:
    """Blocks: call it in a thread of its own, in which other requests don't wait."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._verdicts: OrderedDict[Grammar, Verdict] = OrderedDict()

    def known(self, grammar: Grammar) -> Verdict | None:
        """Doesn't block."""
        return self._verdicts.get(_alone(grammar))

    def check(self, grammar: Grammar) -> Verdict:
        """Whether it is well-formed, supported, and compiled within bounds of time and memory."""
        alone = _alone(grammar)
        with self._lock:
            verdict = self._verdicts.pop(alone, None) or self._try(alone)
            self._verdicts[alone] = verdict
            if len(self._verdicts) > KEPT:
                self._verdicts.popitem(last=False)
        return verdict

    def close(self) -> None:
        """A check that is under way ends at once."""
        if process := self._process:
            process.kill()
        with self._lock:
            self._end()

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _try(self, grammar: Grammar) -> Verdict:
        seconds = MOST_SECONDS
        if self._process is None or self._process.poll() is not None:
            self._end()
            self._process, seconds = _start(), START_SECONDS
        line = _ask(self._process, msgspec.json.encode(grammar) + b"\n", time.monotonic() + seconds)
        if not line.endswith(b"\n"):
            self._end()
            return Verdict(error=too_complex())
        return msgspec.json.decode(line, type=Verdict)


def _alone(grammar: Grammar) -> Grammar:
    """What it can be used for depends on nothing but itself; the trial's vocabulary ends with its own token."""
    return Grammar(kind=grammar.kind, text=grammar.text, end_ids=(256,))


def _start() -> subprocess.Popen[bytes]:
    environment = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    command = [sys.executable, "-m", "lockstep_runtime.grammar.trial"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env=environment)


def _ask(process: subprocess.Popen[bytes], question: bytes, deadline: float) -> bytes:
    """Its answer; a part of one, or nothing, if it ended or took too long."""
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("the process has no pipes")
    answer = b""
    try:
        view = memoryview(question)
        while view:
            view = view[process.stdin.write(view) :]
        while not answer.endswith(b"\n"):
            readable, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not readable or not (part := process.stdout.read(1 << 16)):
                return answer
            answer += part
    except BrokenPipeError:
        return b""
    return answer
