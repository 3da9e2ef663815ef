"""File descriptors: raises the limit and divides it.

A connection takes a descriptor before the server knows its peer. So every server of a process has a bound, and
all bounds together leave what the process itself needs: idle clients never keep a rank from connecting.
"""

from __future__ import annotations

import logging
import resource
from dataclasses import dataclass
from typing import Final

logger = logging.getLogger(__name__)

MOST: Final = 65_536  # more are of no use, and some programs walk through all of them
OWN: Final = 64  # of a process: its files, event loop, name look-ups, libraries
FEW: Final = 1024


@dataclass(frozen=True, slots=True)
class Shares:
    """Of the engine's process. `backlog`: connections that may be accepted at once, before any of them is counted."""

    clients: int
    strangers: int  # on the bus, that have not proved themselves
    backlog: int


def raise_limit() -> int:
    """Raise the soft limit to the hard one; for the children too. Returns the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST if hard == resource.RLIM_INFINITY else min(hard, MOST)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return limit()
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if wanted < FEW:
        logger.warning("only %d file descriptors are allowed: few clients can be served at once (ulimit -Hn)", wanted)
    return wanted


def limit() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST if soft == resource.RLIM_INFINITY else soft


def shares(limit: int, peers: int) -> Shares:
    """`peers`: the ranks and supervisors of the group, for each of which there is a second descriptor while a new
    connection takes an old one's place. Pure."""
    backlog = min(2048, max(16, limit // 8))
    strangers = min(64, max(8, limit // 8))
    left = limit - OWN - 2 * peers - strangers - 2 * backlog  # two servers accept
    return Shares(clients=max(8, left), strangers=strangers, backlog=backlog)
