"""What health and time make of a group's recovery state (pure): attempts come back, repairs prove themselves."""

from __future__ import annotations

from typing import Final

from msgspec.structs import replace

from lockstep_operator.types.recovery_state import RecoveryState
from lockstep_operator.types.spec_blocks import RecoverySpec

PROVED_SECONDS: Final = 60.0  # a repair that holds for so long has worked


def update_budget(policy: RecoverySpec, state: RecoveryState, healthy: bool | None, now: float) -> RecoveryState:
    """`healthy` is None when nobody knows."""
    if state == RecoveryState():
        return state
    if healthy and state.healthy_since is None:
        action = replace(state.action, healed=True, pods=()) if state.action else None
        return replace(state, healthy_since=now, action=action)
    if healthy is False and state.healthy_since is not None:
        return _on_unhealthy(policy, state, now)
    return _proved(policy, state, now)


def _proved(policy: RecoverySpec, state: RecoveryState, now: float) -> RecoveryState:
    healthy = 0.0 if state.healthy_since is None else now - state.healthy_since
    if healthy >= max(policy.window, PROVED_SECONDS):
        return RecoveryState(avoided=state.avoided, healthy_since=state.healthy_since if state.avoided else None)
    if healthy >= PROVED_SECONDS:
        return replace(state, action=None, failures=0, next_try=None, stalled=False)
    return state


def _on_unhealthy(policy: RecoverySpec, state: RecoveryState, now: float) -> RecoveryState:
    """Healthy time has earned attempts back; a repair that didn't hold for long has failed."""
    healthy = max(0.0, now - (state.healthy_since or now))  # another node's clock may have been ahead
    earned = int(healthy * policy.attempts / policy.window)
    state = _proved(policy, state, now)
    left = {rung: count - earned for rung, count in state.attempts_used.items() if count > earned}
    return replace(state, attempts_used=left, healthy_since=None)
