"""Every order of events, six deep, for up to three ranks: the supervisor's machine and the engine's policy.

States that were reached before are not followed again, so the orders are all of them and yet few.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

import pytest

from lockstep_runtime.protocol.status import Fault
from lockstep_runtime.recovery.diagnosis import Evidence
from lockstep_runtime.recovery.policy import REBUILDS, RESPAWNS, RecoveryPolicy, Rung
from lockstep_runtime.supervisor.state_machine import (
    ENGINE,
    ZYGOTE,
    Action,
    Finish,
    Machine,
    Name,
    Phase,
    SayStopped,
    Signal,
    Spawn,
)

DEPTH = 6
T = TypeVar("T")


@dataclass
class Pod:
    """A supervisor's machine, and the processes that its actions made."""

    machine: Machine
    now: float = 0.0
    alive: set[Name] = field(default_factory=set)
    finished: bool = False

    def do(self, actions: Iterable[Action]) -> None:
        for action in actions:
            assert not self.finished, "it acts after its end"
            match action:
                case Spawn():
                    assert action.name not in self.alive, "a process is doubled"
                    assert ZYGOTE in self.alive or not isinstance(action.name, int), "a rank is born of nothing"
                    self.alive.add(action.name)
                case Signal():
                    assert action.name in self.alive, "a dead process is signalled"
                case SayStopped():
                    assert action.rank in self.alive
                case Finish():
                    assert not self.alive, "a process is left over"
                    self.finished = True

    def copy(self) -> Pod:
        """As copy.deepcopy, in a small part of its time."""
        machine = _copied(self.machine)
        machine.children = {name: _copied(one) for name, one in self.machine.children.items()}
        return Pod(machine, self.now, set(self.alive), self.finished)

    def key(self) -> Hashable:
        """Times count from now."""
        children = tuple(
            (
                name,
                child.alive,
                child.failures,
                _ahead(child.spawn_at, self.now),
                _ahead(child.stopped_at, self.now),
                _ahead(child.silent_at, self.now),
            )
            for name, child in self.machine.children.items()
        )
        machine = (self.machine.phase, _ahead(self.machine.deadline, self.now), self.machine.zygote_is_ready)
        return machine, children, frozenset(self.alive), self.finished


def _copied(one: T) -> T:
    """As copy.copy has it, of a dataclass with slots."""
    made = object.__new__(type(one))
    for name in one.__slots__:  # type: ignore[attr-defined] # it has them
        setattr(made, name, getattr(one, name))
    return made


def _ahead(at: float | None, now: float) -> float | None:
    return None if at is None else round(at - now, 3)


def events(ranks: int) -> list[Callable[[Pod], None]]:
    def exits(name: Name, healthy: bool) -> Callable[[Pod], None]:
        def event(pod: Pod) -> None:
            if name in pod.alive:
                pod.alive.discard(name)
                pod.do(pod.machine.exited(name, healthy=healthy, now=pod.now))

        return event

    def stops(name: Name) -> Callable[[Pod], None]:
        def event(pod: Pod) -> None:
            if name in pod.alive:
                pod.machine.stopped(name, 19, pod.now)

        return event

    def passes(seconds: float) -> Callable[[Pod], None]:
        def event(pod: Pod) -> None:
            pod.now += seconds
            pod.do(pod.machine.tick(pod.now))

        return event

    def becomes_ready(pod: Pod) -> None:
        if ZYGOTE in pod.alive:
            pod.do(pod.machine.zygote_ready(pod.now))

    def births_fail(pod: Pod) -> None:
        """Rank 0 was to be forked just now."""
        if 0 in pod.alive:
            pod.alive.discard(0)
            pod.do(pod.machine.spawn_failed(0, "no answer", pod.now, zygote_is_lost=True))

    def spawn_fails(name: Name) -> Callable[[Pod], None]:
        def event(pod: Pod) -> None:
            if name in pod.alive:
                pod.alive.discard(name)
                pod.do(pod.machine.spawn_failed(name, "no room", pod.now))

        return event

    names: list[Name] = [*range(ranks), ENGINE, ZYGOTE]
    return [
        *(exits(name, healthy) for name in names for healthy in (True, False)),
        *(stops(name) for name in (0, ZYGOTE)),
        passes(1.0),
        passes(60.0),
        becomes_ready,
        births_fail,
        *(spawn_fails(name) for name in (0, ENGINE)),
        lambda pod: pod.do(pod.machine.asked_to_end(pod.now, connected=True)),
        lambda pod: pod.do(pod.machine.released(pod.now)),
        lambda pod: pod.do(pod.machine.disconnected(pod.now)),
        lambda pod: pod.do(pod.machine.kill(0, "asked")),
    ]


@pytest.mark.parametrize("is_leader", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_no_process_is_doubled_forgotten_or_left_over(ranks: int, is_leader: bool) -> None:
    pod = Pod(Machine(ranks=range(ranks), is_leader=is_leader, grace_seconds=10.0))
    pod.do(pod.machine.start(0.0))
    pod.do(pod.machine.zygote_ready(0.0))
    seen, level = {pod.key()}, [pod]
    for _ in range(DEPTH):
        following = []
        for before in level:
            for event in events(ranks):
                after = before.copy()
                event(after)
                if (key := after.key()) not in seen:
                    seen.add(key)
                    following.append(after)
        level = following
        for one in level[:: max(1, len(level) // 50)]:
            assert_it_ends(one.copy())
    assert len(seen) > 100


def assert_it_ends(pod: Pod) -> None:
    """Asked to end, it does, whatever came before."""
    for _ in range(6):
        if pod.finished:
            return
        pod.do(pod.machine.asked_to_end(pod.now, connected=False))
        pod.now += 100.0
        pod.do(pod.machine.tick(pod.now))
        for name in sorted(pod.alive, key=str):
            if not pod.finished and pod.machine.phase is not Phase.RUNNING:
                pod.alive.discard(name)
                pod.do(pod.machine.exited(name, healthy=False, now=pod.now))
    assert pod.finished, "it does not end"


FAULTS = [
    *(Evidence(fault, rank, "words") for fault in Fault for rank in (0, None)),
    Evidence(Fault.HANG, 0, "words", stragglers=(0,)),
]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_ladder_never_overdraws_and_gives_up_only_when_the_last_rung_is_spent(ranks: int) -> None:
    seen: set[tuple[float, float, bool]] = set()
    level = [RecoveryPolicy(ranks, "Ladder")]
    for spent in range(RESPAWNS):  # also from nearly spent budgets
        policy = RecoveryPolicy(ranks, "Ladder")
        policy.respawns.left, policy.rebuilds.left = float(spent), float(spent % (REBUILDS + 1))
        level.append(policy)
    for _ in range(DEPTH):
        following = []
        for before in level:
            for after in _next(before, ranks):
                key = (after.rebuilds.left, after.respawns.left, after.rebuilt_in_vain)
                if key not in seen:
                    seen.add(key)
                    following.append(after)
        level = following
    assert len(seen) > 30


def _next(before: RecoveryPolicy, ranks: int) -> Iterable[RecoveryPolicy]:
    for cause in FAULTS:
        for by_request in (False, True):
            after = copy.deepcopy(before)
            recovery = after.decide(cause, [cause], by_request=by_request)
            assert 0 <= after.rebuilds.left <= REBUILDS
            assert 0 <= after.respawns.left <= RESPAWNS
            assert recovery.reason
            assert set(recovery.kill) <= set(range(ranks))
            assert recovery.rung is not None or before.respawns.left < 1
            assert recovery.rung is not Rung.RESPAWN or after.respawns.left == before.respawns.left - 1
            if recovery.rung is Rung.REBUILD and not by_request:
                assert after.rebuilds.left == before.rebuilds.left - 1
                assert not before.rebuilt_in_vain
            yield after
    for seconds, steps in ((0.0, True), (2.0, False), (1000.0, True)):
        after = copy.deepcopy(before)
        after.credit_healthy_time(seconds, steps=steps)
        yield after
