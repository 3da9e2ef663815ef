"""What one open page is sent: first all that it shows, then what changed of it (pure)."""

from __future__ import annotations

from typing import Final

import msgspec

from lockstep_operator.live.board import Board, Entry
from lockstep_operator.live.cards import FaultCard, ModelCard, Mood, identity

PAGE_SIZE: Final = 20  # models
FAULTS_SHOWN: Final = 30
FILTER_LIMIT: Final = 100  # characters


class View(msgspec.Struct, frozen=True, kw_only=True):
    """What the page asks for: models whose namespace/name contains `text`, in this mood only, so many pages on."""

    text: str = ""
    mood: Mood | None = None
    page: int = 1


class Message(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """`ids` are the models to be shown, in order, and `fault_ids` the faults; None where they are as before."""

    now: float  # unix seconds, of the operator
    tally: dict[str, int]
    page: int
    pages: int
    matching: int
    ids: list[str] | None = None
    models: list[ModelCard] = []
    fault_ids: list[str] | None = None
    faults: list[FaultCard] = []


def read_view(query: dict[str, str]) -> View:
    """Raises msgspec.ValidationError, with a sentence."""
    view = msgspec.convert(query, View, strict=False)
    if len(view.text) > FILTER_LIMIT or view.page < 1:
        raise msgspec.ValidationError(f"a filter has {FILTER_LIMIT} characters at most, and pages begin with 1")
    return view


class Session:
    def __init__(self, board: Board, view: View) -> None:
        self._board = board
        self._view = view
        self._ids: list[str] | None = None
        self._fault_ids: list[str] | None = None
        self.sent = -1  # the board's revision

    def message(self, now: float) -> Message:
        """What is new since the last one."""
        matching = sorted(
            (one for one in self._board.entries() if self._matches(one)), key=lambda one: identity(one.key)
        )
        pages = max(1, -(-len(matching) // PAGE_SIZE))
        page = min(self._view.page, pages)
        shown = matching[(page - 1) * PAGE_SIZE : page * PAGE_SIZE]
        known, known_faults = set(self._ids or ()), set(self._fault_ids or ())
        ids = [identity(one.key) for one in shown]
        faults = [kept for kept in self._board.faults() if self._view.text.lower() in kept[1].model][:FAULTS_SHOWN]
        fault_ids = [card.id for _, card in faults]
        message = Message(
            now=now,
            tally={str(name): count for name, count in self._board.tally().items()},
            page=page,
            pages=pages,
            matching=len(matching),
            ids=ids if ids != self._ids else None,
            models=[
                one.card for name, one in zip(ids, shown, strict=True) if one.changed > self.sent or name not in known
            ],
            fault_ids=fault_ids if fault_ids != self._fault_ids else None,
            faults=[card for changed, card in faults if changed > self.sent or card.id not in known_faults],
        )
        self._ids, self._fault_ids, self.sent = ids, fault_ids, self._board.revision
        return message

    def _matches(self, entry: Entry) -> bool:
        wanted = self._view.mood is None or entry.mood is self._view.mood
        return wanted and self._view.text.lower() in identity(entry.key)
