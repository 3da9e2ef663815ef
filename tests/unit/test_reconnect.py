"""How long those who have lost the engine wait between attempts."""

from __future__ import annotations

from lockstep_runtime.protocol.reconnect import FIRST_SECONDS, MOST_SECONDS, Pauses


def test_pauses_grow_to_a_bound_and_start_over_after_a_connection() -> None:
    pauses = Pauses()
    waited = [pauses.next() for _ in range(20)]
    assert FIRST_SECONDS / 2 <= waited[0] <= FIRST_SECONDS
    assert max(waited) <= MOST_SECONDS
    assert min(waited[-5:]) >= MOST_SECONDS / 2
    pauses.start_over()
    assert pauses.next() <= FIRST_SECONDS


def test_two_processes_do_not_wait_equally_long() -> None:
    assert len({Pauses().next() for _ in range(50)}) > 40
