"""What the operator knows of every model, for those who look at the live page; without any it costs little."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from lockstep_operator.live.cards import FaultCard, ModelCard, Mood, fault_cards, identity, model_card, mood
from lockstep_operator.types.model_status import ModelStatus
from lockstep_operator.types.names import ModelKey
from lockstep_operator.types.observed import GroupReport
from lockstep_runtime.protocol.status import GroupStatus

FAULTS_KEPT: Final = 200


@dataclass(slots=True)
class Entry:
    """One model. `changed` is the board's revision of its last change; what is shown is made when somebody looks."""

    key: ModelKey
    status: ModelStatus
    reports: dict[int, GroupReport] = field(default_factory=dict)
    changed: int = 0
    _mood: tuple[int, Mood] | None = None
    _card: tuple[int, ModelCard] | None = None

    @property
    def mood(self) -> Mood:
        if self._mood is None or self._mood[0] != self.changed:
            self._mood = (self.changed, mood(self.status, self.reports))
        return self._mood[1]

    @property
    def card(self) -> ModelCard:
        if self._card is None or self._card[0] != self.changed:
            self._card = (self.changed, model_card(self.key, self.status, self.reports))
        return self._card[1]


class Board:
    """On one event loop. `revision` rises with every change."""

    def __init__(self) -> None:
        self.revision = 0
        self._entries: dict[ModelKey, Entry] = {}
        self._faults: dict[str, tuple[int, FaultCard]] = {}  # with the revision of its last change
        self._news = asyncio.Event()

    def model(self, key: ModelKey, status: ModelStatus, reports: Mapping[int, GroupReport] | None = None) -> None:
        """After a pass. `reports` are those of its groups' present first pods; None leaves them as they are."""
        entry = self._entries.setdefault(key, Entry(key, status))
        entry.status = status
        if reports is not None:
            entry.reports = {group: _newer(entry.reports.get(group), report) for group, report in reports.items()}
        self._changed(entry, faults=True)

    def heard(self, key: ModelKey, group: int, status: GroupStatus) -> None:
        """A group's new report, which comes before the pass that it may cause."""
        entry = self._entries.get(key)
        if entry is None:
            return
        before, entry.reports[group] = entry.reports.get(group), GroupReport(status=status)
        known = before.status.faults if before and before.status else []
        self._changed(entry, faults=known != status.faults)

    def forget(self, key: ModelKey) -> None:
        if self._entries.pop(key, None):
            mine = identity(key)
            self._faults = {name: kept for name, kept in self._faults.items() if kept[1].model != mine}
            self._tell()

    def clear(self) -> None:
        """The models are to be read anew: some may be gone."""
        self._entries.clear()
        self._faults.clear()
        self._tell()

    def entries(self) -> Iterable[Entry]:
        return self._entries.values()

    def tally(self) -> Counter[Mood]:
        return Counter(entry.mood for entry in self._entries.values())

    def faults(self) -> list[tuple[int, FaultCard]]:
        """The newest first, each with the revision of its last change."""
        return sorted(self._faults.values(), key=lambda kept: kept[1].at, reverse=True)

    async def news(self, after: int) -> None:
        """Wait until `revision` is higher than this."""
        while self.revision <= after:
            await self._news.wait()

    def _changed(self, entry: Entry, *, faults: bool) -> None:
        self._tell()
        entry.changed = self.revision
        if faults:
            for card in fault_cards(entry.key, entry.status, entry.reports):
                known = self._faults.get(card.id)
                if known is None or known[1] != card:
                    self._faults[card.id] = (self.revision, card)
            for _, card in self.faults()[FAULTS_KEPT:]:
                del self._faults[card.id]

    def _tell(self) -> None:
        self.revision += 1
        self._news.set()
        self._news = asyncio.Event()


def _newer(heard: GroupReport | None, passed: GroupReport) -> GroupReport:
    """A pass takes time: of the same process something newer may have been heard meanwhile."""
    if heard is None or heard.status is None or passed.status is None or passed.unreachable_since is not None:
        return passed
    same = heard.status.incarnation == passed.status.incarnation
    return heard if same and heard.status.revision > passed.status.revision else passed
