"""What keeps the api from serving: several parts may have a reason; the engine gets all of them."""

from __future__ import annotations

from dataclasses import dataclass

from lockstep_runtime.engine.client import EngineClient


@dataclass(frozen=True, slots=True)
class Blocker:
    """A reason, as a sentence. `loading`: nothing is wrong yet. `may_pass`: it may resolve by itself."""

    reason: str
    loading: bool = False
    may_pass: bool = False


class Blockers:
    """By the part that has the reason. `loading` is reported only where nothing is wrong."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine
        self._by_part: dict[str, Blocker] = {}

    @property
    def all(self) -> Blocker:
        """Its reason is empty where nothing keeps the api from answering."""
        wrong = [one for one in self._by_part.values() if not one.loading]
        told = wrong or list(self._by_part.values())
        reason = "; ".join(one.reason for one in told)
        return Blocker(
            reason, loading=not wrong and bool(told), may_pass=bool(wrong) and all(one.may_pass for one in wrong)
        )

    def set(self, part: str, blocker: Blocker | None) -> None:
        """None: this part has nothing against it any more."""
        if blocker is None:
            self._by_part.pop(part, None)
        else:
            self._by_part[part] = blocker
        told = self.all
        self._engine.set_serving_blocker(told.reason, loading=told.loading, may_pass=told.may_pass)
