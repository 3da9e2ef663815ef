"""A process in which grammars are tried: what takes too long or too much ends it, and nothing else.

Reads one grammar per line and answers with one `Verdict` per line, both JSON, until its input is closed.
"""

from __future__ import annotations

import resource
import signal
import sys
from typing import Final

import msgspec
from setproctitle import setproctitle

from lockstep_runtime.grammar.compiler import GrammarError, byte_tokenizer, compile_grammar
from lockstep_runtime.grammar.matcher import Matcher
from lockstep_runtime.protocol.step import Grammar

MOST_BYTES: Final = 1 << 30  # of address space
MOST_SECONDS: Final = 0.5  # of CPU time, for one grammar: rank 0 compiles it, too
STEPS: Final = 24
WALKED: Final = (0x0A, *range(0x20, 0x7F))  # the last that is allowed: a brace before a letter before a space


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    error: str = ""  # empty: it can be used


def main() -> None:
    """Until end of file."""
    setproctitle("lockstep: grammars of requests, tried")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    tokenizer = byte_tokenizer()
    for line in sys.stdin.buffer:
        grammar = msgspec.json.decode(line, type=Grammar)
        signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)  # whose signal ends the process
        try:
            _walk(Matcher(grammar, compile_grammar(grammar, tokenizer)))
            verdict = Verdict()
        except GrammarError as error:
            verdict = Verdict(error=str(error))
        except Exception as error:  # of whatever is in a grammar that a client wrote
            verdict = Verdict(error=f"{type(error).__name__}: {str(error)[:200]}")
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(msgspec.json.encode(verdict) + b"\n")
        sys.stdout.buffer.flush()


def _walk(matcher: Matcher) -> None:
    """A few characters into the grammar: what it can't get over is often at its beginning.

    Raises:
        GrammarError: a dead end.
    """
    for _ in range(STEPS):
        bits = matcher.mask().bits or b""
        allowed = [token for token in WALKED if bits[token // 8] >> token % 8 & 1]
        if not allowed:
            return
        matcher.consume(allowed[-1:])


def too_complex() -> str:
    return f"it is too complex: it takes more than {MOST_SECONDS:g} s to compile; ask for less of it"


if __name__ == "__main__":
    main()
