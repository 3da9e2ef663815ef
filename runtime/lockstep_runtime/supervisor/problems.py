"""What this pod complains of: the newest of each reason, until it has not happened for a while. Pure."""

from __future__ import annotations

from typing import Final

from lockstep_runtime.protocol.status import PodProblem, PodProblemReason

REMEMBERED_SECONDS: Final = 60.0  # longer than the longest pause between two attempts to start a process
MAX_TEXT: Final = 512


class Problems:
    """`now` is in unix seconds."""

    def __init__(self, pod_index: int) -> None:
        self._pod_index = pod_index
        self._by_reason: dict[PodProblemReason, PodProblem] = {}

    def add(self, reason: PodProblemReason, message: str, now: float) -> None:
        message = message if len(message) <= MAX_TEXT else message[: MAX_TEXT - 1] + "…"
        self._by_reason[reason] = PodProblem(pod_index=self._pod_index, reason=reason, message=message, at=now)

    def forget_old(self, now: float) -> bool:
        """Whether one is over."""
        over = [reason for reason, one in self._by_reason.items() if not 0 <= now - one.at < REMEMBERED_SECONDS]
        for reason in over:
            del self._by_reason[reason]
        return bool(over)

    def all(self) -> list[PodProblem]:
        return sorted(self._by_reason.values(), key=lambda one: one.at)
