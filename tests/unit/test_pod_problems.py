"""What a pod's supervisor complains of stands in the group's status, and explains what the group waits for."""

from __future__ import annotations

import time

from tests.support.live_engine import LiveEngine, live_engine

from lockstep_runtime.protocol import bus
from lockstep_runtime.protocol.bus import PodReport
from lockstep_runtime.protocol.status import PodProblem, PodProblemReason
from lockstep_runtime.recovery.exits import exit_text

OOM = "killed by the kernel: out of memory (limit 350 MiB, used 350 MiB)"


def problem(pod_index: int, message: str) -> PodProblem:
    return PodProblem(
        pod_index=pod_index, reason=PodProblemReason.OUT_OF_MEMORY, message=message, at=time.time() + pod_index
    )


async def complain(live: LiveEngine, pod_index: int, *problems: PodProblem) -> None:
    await live.until(lambda: pod_index in live.links and live.links[pod_index].connected, "the pod is connected")
    live.links[pod_index].send(PodReport(problems=list(problems)))


async def test_a_zygote_that_is_killed_again_and_again_is_why_the_ranks_do_not_come() -> None:
    async with live_engine(start=False) as live:
        told = problem(0, f"the zygote of pod 0 was {OOM}")
        await complain(live, 0, told)
        await live.until(lambda: live.engine.status().pod_problems == [told], "the status has it")
        assert live.engine.status().message == f"waiting for ranks 0, 1 to connect: {told.message}"
        await complain(live, 0)
        await live.until(lambda: not live.engine.status().pod_problems, "it is over")
        assert live.engine.status().message == "waiting for ranks 0, 1 to connect"


async def test_every_pod_has_its_own_and_they_end_with_its_connection() -> None:
    async with live_engine(start=False) as live:
        first, second = problem(0, "one"), problem(1, "another")
        await complain(live, 1, second)
        await complain(live, 0, first)
        await live.until(lambda: live.engine.status().pod_problems == [first, second], "both are there, by pod")
        assert live.engine.status().message.endswith("another")  # the later one
        live.engine.group.supervisors[1].close()
        await live.until(lambda: live.engine.status().pod_problems == [first], "who isn't there complains of nothing")


async def test_a_rank_that_was_killed_for_want_of_memory_is_a_fault_that_says_so() -> None:
    async with live_engine() as live:
        await live.until(lambda: 1 in live.links and live.links[1].connected, "the pod is connected")
        lost = live.ranks[1].incarnation
        await live.ranks[1].die()
        live.links[1].send(bus.ProcessExited(rank=1, pid=1001, incarnation=lost, signal=9, oom=OOM))
        await live.until(lambda: "out of memory" in str(live.engine.status().faults), "the exit is told")
        assert live.engine.status().faults[0].message == f"rank 1 (pid 1001) was {OOM}"
        await live.ranks[1].respawn()
        await live.ready()


def test_how_a_process_ended() -> None:
    gone = bus.ProcessExited(rank=0, pid=1, incarnation="i", signal=9)
    assert exit_text(gone) == "was killed by SIGKILL"
    assert exit_text(bus.ProcessExited(rank=0, pid=1, incarnation="i", signal=9, oom=OOM)) == f"was {OOM}"
    assert exit_text(bus.ProcessExited(rank=0, pid=1, incarnation="i", exit_code=3)) == "ended with exit code 3"
