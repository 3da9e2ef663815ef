"""Random lives of a group, event by event: every state comes to an end by itself.

`LOCKSTEP_SIM_SCHEDULES` says how many lives there are, `LOCKSTEP_SIM_FIRST` the first one's seed.
"""

from __future__ import annotations

import os
import random
from typing import Final

import pytest
from tests.support.group_life import GroupLife, stage

from lockstep_runtime.protocol import bus
from lockstep_runtime.protocol.bus import LoadFailure
from lockstep_runtime.protocol.status import Fault, RankState
from lockstep_runtime.recovery import events
from lockstep_runtime.recovery.diagnosis import Evidence
from lockstep_runtime.recovery.policy import RESPAWNS
from lockstep_runtime.recovery.stage import Stage

LIVES: Final = int(os.environ.get("LOCKSTEP_SIM_SCHEDULES", "2000"))
FIRST: Final = int(os.environ.get("LOCKSTEP_SIM_FIRST", "0"))
CHUNK: Final = 100


def _event(life: GroupLife, chance: random.Random) -> None:
    rank = chance.randrange(life.ranks)
    known = life.processes.get(rank, 0) > 0
    here = life.group.handles[rank].hello is not None
    match chance.randrange(12):
        case 0:
            life.pod(rank, chance.choice("ab"))
        case 1:
            life.tell(events.PodDisconnected(rank))
        case 2:
            life.connect(rank)
        case 3 if here:
            life.tell(events.RankDisconnected(rank))
        case 4 if known:
            life.exit(rank)
        case 5 if here:
            life.loaded(rank)
        case 6 if here:
            life.left(rank)
        case 7 if here:
            life.tell(events.RankReported(rank, bus.LoadProgress(bytes_done=chance.randrange(9), bytes_total=9)))
        case 8 if here:
            kind = chance.choice(list(LoadFailure))
            life.tell(events.RankReported(rank, bus.LoadFailed(message="no", kind=kind)))
        case 9 if known:
            life.tell(events.RankStopped(rank, life.name(rank, life.processes[rank]), 1, "SIGSTOP"))
        case 10 if stage(life) in (Stage.ASSEMBLING, Stage.SERVING):
            life.fails(
                Evidence(chance.choice(list(Fault)), chance.choice([None, rank]), "words"), steps=chance.randrange(2)
            )
        case 11:
            life.proceed(limit=chance.randrange(8))
        case _:
            pass


def explains_itself(life: GroupLife) -> bool:
    """A first load has failed with words: `Failed` may last."""
    return not life.group.has_served and any(one.state is RankState.FAILED for one in life.group.handles)


@pytest.mark.parametrize("first", range(FIRST, FIRST + LIVES, CHUNK))
def test_whatever_happens_every_state_ends_by_itself(first: int) -> None:
    for seed in range(first, min(first + CHUNK, FIRST + LIVES)):
        chance = random.Random(seed)
        life = GroupLife(ranks=chance.randint(1, 3))
        epochs = [0]
        for _ in range(chance.randint(1, 60)):
            _event(life, chance)
            life.wait(chance.choice([0.0, 0.0, 0.1, 1.0, 20.0, 200.0]))
            assert life.group.epoch >= epochs[-1]
            epochs.append(life.group.epoch)
            if stage(life) is Stage.GATHERING:
                assert explains_itself(life) or life.group.next_deadline() is not None, f"seed {seed}"
            assert 0 <= life.group.policy.respawns.left <= RESPAWNS
        if stage(life) is Stage.ASSEMBLING and life.group.next_deadline() is None:
            life.fails(Evidence(Fault.HANG, None, "no answer"), steps=0)  # a call's own deadline
        life.wait(0.0)
        patience = 0
        while stage(life) in (Stage.PAUSING, Stage.GATHERING) and patience < 20:
            life.wait(50.0)
            patience += 1
        assert patience < 20 or explains_itself(life), f"seed {seed}: {stage(life)}"
