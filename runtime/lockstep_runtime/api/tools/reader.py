"""Text that arrives in pieces, read by generators that yield where they need more of it.

A parser is then written as if the whole text were there. What it does depends on the text alone, not on where it was
cut, and each character is looked at a bounded number of times.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from typing import Final, TypeVar

T = TypeVar("T")
Reading = Generator[None, None, T]

_NO_SPACE: Final = re.compile(r"\S")


class EndOfTextError(Exception):
    """There is no more text where more was needed."""


class Reader:
    """`taken` is what was taken since it was last emptied."""

    def __init__(self) -> None:
        self.text = ""
        self.at = 0  # what is before was taken
        self.taken: list[str] = []
        self._ended = False

    def feed(self, text: str) -> None:
        self.text = self.text[self.at :] + text
        self.at = 0

    def end(self) -> None:
        """No more text will be fed."""
        self._ended = True

    def restart(self) -> None:
        """Another text follows the one that has ended."""
        self._ended = False

    def more(self) -> Reading[bool]:
        """Wait until there is more, or false: the text has ended."""
        if self._ended:
            return False
        yield
        return True

    def need(self) -> Reading[None]:
        """
        Raises:
            EndOfTextError: there is no more.
        """
        if not (yield from self.more()):
            raise EndOfTextError

    @property
    def rest(self) -> int:
        """Characters that have come and are not taken."""
        return len(self.text) - self.at

    def take(self, count: int) -> str:
        text = self.text[self.at : self.at + count]
        self.at += count
        self.taken.append(text)
        return text

    def forget(self) -> str:
        """What was taken, for the last time."""
        text = "".join(self.taken)
        self.taken.clear()
        return text

    def skip_space(self) -> Reading[None]:
        """Up to a character that is none.

        Raises:
            EndOfTextError: none comes.
        """
        while True:
            found = _NO_SPACE.search(self.text, self.at)
            self.take((found.start() if found else len(self.text)) - self.at)
            if found:
                return
            yield from self.need()

    def comes(self, word: str) -> Reading[bool]:
        """Whether `word` comes next.

        Raises:
            EndOfTextError: in the middle of what may be the word.
        """
        while self.rest < len(word) and word.startswith(self.text[self.at :]):
            yield from self.need()
        return self.text.startswith(word, self.at)

    def skip(self, word: str) -> Reading[bool]:
        """As `comes`; the word is taken."""
        if not (yield from self.comes(word)):
            return False
        self.take(len(word))
        return True

    def held(self, words: Sequence[str]) -> int:
        """How many characters at the end may be the beginning of one of these words."""
        longest = min(max(map(len, words)) - 1, self.rest)
        for size in range(longest, 0, -1):
            tail = self.text[-size:]
            if any(word.startswith(tail) for word in words if len(word) > size):
                return size
        return 0
