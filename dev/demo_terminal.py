"""What the demo's parts share: kubectl on the cluster that was asked for, and printing."""

import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
CONTEXT: Final = os.environ.get("CONTEXT", "")
TOOL: Final = f"kubectl --context {CONTEXT}" if CONTEXT else "kubectl"  # as a reader would type it
WIDTH: Final = 118
BREAK: Final = WIDTH - 10  # where a line of streamed text ends at the next space
INDENT: Final = 13


class Page:
    """Prints a text while it comes, wrapped and indented, with whole lines between its words."""

    def __init__(self) -> None:
        self._column = 0

    def open(self, who: str) -> None:
        """Begin a new speaker's text."""
        self._write(f"\n  {who:{INDENT - 2}}")

    def text(self, piece: str) -> None:
        """A piece may end in the middle of a word."""
        for part in re.findall(r"\s+|\S+", piece):
            if self._column == 0:
                self._write(" " * INDENT)
            if not part.isspace():
                self._write(part)
            elif self._column > BREAK or "\n" in part:
                self._write("\n")
            elif self._column > INDENT:
                self._write(" ")

    def dots(self) -> None:
        """The text stops here for a while."""
        if self._column:
            self._write(" …")

    def line(self, words: str) -> None:
        """On lines of its own."""
        if self._column:
            self._write("\n")
        for row in textwrap.wrap(words, WIDTH, initial_indent="    ", subsequent_indent=" " * INDENT):
            print(f"\033[33m{row}\033[0m", flush=True)

    def end(self) -> None:
        if self._column:
            self._write("\n")

    def _write(self, characters: str) -> None:
        print(characters, end="", flush=True)
        line = characters.rpartition("\n")[2]
        self._column = len(line) if "\n" in characters else self._column + len(line)


def command(*arguments: str) -> list[str]:
    return ["kubectl", *(["--context", CONTEXT] if CONTEXT else []), *arguments]


def kubectl(*arguments: str, stdin: str | None = None) -> str:
    """What it prints; the demo ends with its words when it fails."""
    done = subprocess.run(command(*arguments), input=stdin, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.rstrip()


def run(arguments: Sequence[str]) -> None:
    """Show a kubectl command and what it prints."""
    show(f"kubectl {' '.join(arguments)}")
    print(kubectl(*arguments), flush=True)


def show(words: str) -> None:
    print(f"\n\033[1m$ {words}\033[0m", flush=True)


def say(words: str) -> None:
    print(f"\n\033[36m{words}\033[0m", flush=True)
