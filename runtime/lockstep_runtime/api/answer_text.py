"""A choice's text becoming what is sent: reasoning, prose, and calls of tools."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lockstep_runtime.api.tools.parser import ToolParser
from lockstep_runtime.api.tools.parts import CallArguments, CallBegun, CallBroken, CallEnded, Part, Prose
from lockstep_runtime.protocol.step import SampledToken


@dataclass(frozen=True, slots=True)
class Delta:
    """Text or a part of a call to send, and the tokens sampled since the last piece, if log probabilities were
    requested."""

    text: str = ""
    reasoning: bool = False
    tokens: Sequence[SampledToken] = ()
    call: CallBegun | CallArguments | CallBroken | None = None


class AnswerText:
    """
    Args:
        thinks: the text is reasoning at first.
        begins: it is just behind a marker, so line breaks at its beginning belong to the markup.
        parser: None: what looks like a call is text.
        parallel: whether more than one call is wanted: otherwise the text is `full` with the first, and the rest of
            what was fed with it is dropped.
    """

    __slots__ = ("_answered", "_breaks", "_parallel", "_parser", "_trim", "calls", "reasoning")

    def __init__(
        self,
        *,
        thinks: bool = False,
        begins: bool = False,
        parser: ToolParser | None = None,
        parallel: bool = True,
    ) -> None:
        self.reasoning = thinks
        self.calls = 0  # that ended
        self._parser, self._parallel = parser, parallel
        self._answered = False
        self._trim = begins
        self._breaks = ""

    @property
    def full(self) -> bool:
        """No more text is wanted."""
        return bool(self.calls) and not self._parallel

    @property
    def may_think(self) -> bool:
        """Whether reasoning may begin: before the answer does."""
        return not self.reasoning and not self._answered

    def feed(self, text: str) -> list[Delta]:
        parser = self._parser
        if parser is None or (self.reasoning and not parser.ends_reasoning):
            return self._say(text)
        parser.thinking = self.reasoning
        return self._deltas(parser.feed(text))

    def turn(self, *, reasoning: bool) -> list[Delta]:
        """A marker came: what follows is reasoning, or no more."""
        deltas = self.finish()
        self.reasoning, self._trim, self._breaks = reasoning, True, ""
        return deltas

    def finish(self, *, cut: bool = False) -> list[Delta]:
        """`cut`: see `ToolParser.finish`."""
        return [] if self._parser is None else self._deltas(self._parser.finish(cut=cut))

    def _deltas(self, parts: Iterable[Part]) -> list[Delta]:
        deltas: list[Delta] = []
        for part in parts:
            if self.full:
                break
            match part:
                case Prose(text):
                    deltas += self._say(text)
                case CallEnded():
                    self.calls += 1
                case _:
                    self.reasoning, self._answered = False, True
                    deltas.append(Delta(call=part))
        return deltas

    def _say(self, text: str) -> list[Delta]:
        if self._trim:
            text = text.lstrip("\n")
            self._trim = not text
        if self.reasoning:
            text = self._breaks + text
            kept = text.rstrip("\n")
            self._breaks, text = text[len(kept) :], kept
        elif text.strip():
            self._answered = True
        return [Delta(text, self.reasoning)] if text else []
