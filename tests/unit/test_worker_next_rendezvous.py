"""Opening the next epoch's rendezvous ahead of its need."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from tests.support.wait import until

from lockstep_runtime.distributed.errors import CommunicatorError
from lockstep_runtime.worker.next_rendezvous import NextRendezvous


@dataclass
class Place:
    address: str = "shm:///somewhere"
    keeps: bool = True
    closed: bool = False

    def close(self) -> None:
        self.closed = True


@dataclass
class Opener:
    """Opens places, once it may."""

    may: threading.Event = field(default_factory=threading.Event)
    begun: threading.Event = field(default_factory=threading.Event)
    opened: list[Place] = field(default_factory=list)

    def __call__(self) -> Place:
        self.begun.set()
        assert self.may.wait(10)
        self.opened.append(Place())
        return self.opened[-1]


def test_it_is_taken_once() -> None:
    opener = Opener()
    opener.may.set()
    following = NextRendezvous(opener, delay=0)
    following.prepare()
    until("it is open", lambda: bool(opener.opened), 10)
    assert following.take() is opener.opened[0]
    assert following.take() is None


def test_one_that_is_being_opened_is_waited_for() -> None:
    opener = Opener()
    following = NextRendezvous(opener, delay=0)
    following.prepare()
    assert opener.begun.wait(10)
    threading.Timer(0.05, opener.may.set).start()
    assert following.take() is opener.opened[0]


def test_one_that_is_needed_before_its_time_is_not_opened() -> None:
    opener = Opener()
    following = NextRendezvous(opener, delay=3600)
    following.prepare()
    assert following.take() is None
    assert not opener.begun.is_set()


def test_without_room_there_is_none() -> None:
    tried = threading.Event()

    def refused() -> Place:
        tried.set()
        raise CommunicatorError("no room")

    following = NextRendezvous(refused, delay=0)
    following.prepare()
    assert tried.wait(10)
    assert following.take() is None


def test_what_nobody_took_is_closed() -> None:
    opener = Opener()
    opener.may.set()
    following = NextRendezvous(opener, delay=0)
    following.prepare()
    until("it is open", lambda: bool(opener.opened), 10)
    following.close()
    assert opener.opened[0].closed
