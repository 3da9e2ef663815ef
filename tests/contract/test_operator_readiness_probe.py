"""All pods of a StatefulSet have the same readiness probe: what it is answered by the supervisor of each."""

from __future__ import annotations

import time

import httpx
import msgspec
import pytest

from lockstep_runtime.config import ServeConfig
from lockstep_runtime.protocol.bus import GroupReadiness
from lockstep_runtime.protocol.status import GroupState, PodProblem, PodProblemReason
from lockstep_runtime.supervisor.callers import Callers
from lockstep_runtime.supervisor.member_readiness import MemberReadiness
from lockstep_runtime.supervisor.server import create_app
from lockstep_runtime.supervisor.status_store import BELIEVED_SECONDS, Seen, StatusStore, parse_seen

CONFIG = ServeConfig(model="m", served_name="m")


async def probe(board: StatusStore | MemberReadiness) -> httpx.Response:
    transport = httpx.ASGITransport(create_app(board, Callers("secret")))
    async with httpx.AsyncClient(transport=transport, base_url="http://pod") as client:
        return await client.get("/readyz")


async def test_the_first_pod_is_ready_while_its_group_accepts_requests() -> None:
    board = StatusStore(CONFIG)
    first = await probe(board)
    assert (first.status_code, first.text) == (503, "the group takes no requests: the engine is starting\n")
    for state, accepting in ((GroupState.READY, True), (GroupState.RECOVERING, True), (GroupState.RECOVERING, False)):
        board.take(msgspec.structs.replace(board.status, state=state, accepting=accepting, message="so it is"))
        assert (await probe(board)).status_code == (200 if accepting else 503)


async def test_without_its_engine_it_is_not_ready_whatever_was_said_before() -> None:
    board = StatusStore(CONFIG)
    board.take(msgspec.structs.replace(board.status, state=GroupState.READY, accepting=True))
    board.engine_lost("was killed by signal 9")
    answer = await probe(board)
    assert answer.status_code == 503
    assert "the engine was killed by signal 9" in answer.text


def told(*, accepting: bool, whole: bool) -> GroupReadiness:
    return GroupReadiness(accepting=accepting, whole=whole, message="rank 1 is missing")


async def fence(readiness: StatusStore | MemberReadiness, method: str, token: str = "secret") -> int:
    transport = httpx.ASGITransport(create_app(readiness, Callers("secret")))
    async with httpx.AsyncClient(transport=transport, base_url="http://pod") as client:
        answer = await client.request(method, "/fence", headers={"Authorization": f"Bearer {token}"})
    return answer.status_code


async def test_a_fenced_group_takes_no_requests_whatever_its_engine_says_until_it_is_freed() -> None:
    board = StatusStore(CONFIG)
    ready = msgspec.structs.replace(board.status, state=GroupState.READY, accepting=True, message="well", since=1.0)
    board.take(ready)
    assert await fence(board, "PUT", "another") == 401
    assert (await probe(board)).status_code == 200
    before = board.status.revision
    assert [await fence(board, "PUT"), await fence(board, "PUT")] == [200, 200]
    board.take(msgspec.structs.replace(ready, requests_running=1))
    assert (board.status.fenced, board.status.accepting, board.status.revision) == (True, False, before + 2)
    assert (await probe(board)).text == "the group takes no requests: it is fenced; well\n"
    assert await fence(board, "DELETE") == 200
    assert (await probe(board)).status_code == 200
    assert not board.status.fenced
    assert time.time() - board.status.since < 60, "how long it was not Ready behind the fence says nothing"
    assert await fence(MemberReadiness(), "PUT") == 404


async def test_other_pods_are_ready_as_their_group_is() -> None:
    member, now = MemberReadiness(), time.monotonic()
    assert (await probe(member)).text == "the group takes no requests: the leader hasn't been reached yet\n"
    member.take(told(accepting=True, whole=False), now)
    assert (await probe(member)).status_code == 503, "it has come to a group that recovers"
    member.take(told(accepting=True, whole=True), now)
    assert (await probe(member)).status_code == 200
    member.take(told(accepting=True, whole=False), now)
    assert (await probe(member)).status_code == 200, "a short repair changes nothing"
    member.take(told(accepting=False, whole=False), now)
    assert (await probe(member)).text == "the group takes no requests: rank 1 is missing\n"
    member.take(told(accepting=True, whole=False), now)
    assert (await probe(member)).status_code == 503


async def test_other_pods_are_not_ready_when_the_leader_has_been_silent_for_long() -> None:
    member, now = MemberReadiness(), time.monotonic()
    member.take(told(accepting=True, whole=True), now - BELIEVED_SECONDS + 5)
    assert (await probe(member)).status_code == 200
    member.take(told(accepting=True, whole=True), now - BELIEVED_SECONDS - 1)
    answer = await probe(member)
    assert (answer.status_code, "has not been heard of" in answer.text) == (503, True)


@pytest.mark.parametrize(
    ("text", "seen"),
    [("7", Seen("", 7)), ("0", Seen("", 0)), ("0123456789abcdef/12", Seen("0123456789abcdef", 12))],
)
def test_a_revision_may_name_its_board(text: str, seen: Seen) -> None:
    assert parse_seen(text) == seen


@pytest.mark.parametrize("text", ["", "x", "-1", "1.5", "/1", "zz/1", "ab/", "ab/1/2", "9" * 19, "٣", "ab/ 1"])
def test_what_is_no_revision_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="after must be a revision"):
        parse_seen(text)


async def test_the_same_revision_of_another_board_is_told_at_once() -> None:
    board = StatusStore(CONFIG)
    begun = time.monotonic()
    assert await board.after(Seen("0" * 16, board.status.revision), 30.0) is board.status
    assert await board.after(None, 30.0) is board.status
    assert time.monotonic() - begun < 5
    assert await board.after(Seen(board.incarnation, board.status.revision), 0.05) is board.status
    assert time.monotonic() - begun >= 0.05


async def test_what_the_pod_complains_of_is_told_while_there_is_no_engine() -> None:
    board = StatusStore(CONFIG)
    problem = PodProblem(pod_index=0, reason=PodProblemReason.SPAWN_FAILED, message="no", at=1.0)
    of_another = PodProblem(pod_index=1, reason=PodProblemReason.OUT_OF_MEMORY, message="no", at=1.0)
    board.take(msgspec.structs.replace(board.status, pod_problems=[of_another]))
    before = board.status.revision
    board.complain([problem])
    assert board.status.pod_problems == [problem, of_another]
    board.complain([problem])
    assert board.status.revision == before + 1
    board.complain([])
    assert board.status.pod_problems == [of_another]


async def test_a_status_that_nobody_stands_by_is_not_believed() -> None:
    board = StatusStore(CONFIG)
    ready = msgspec.structs.replace(board.status, state=GroupState.READY, accepting=True, message="all is well")
    board.take(ready)
    before = board.status.revision
    board.take(ready)  # a sign of life, and nothing new
    assert board.status.revision == before
    now = time.monotonic()
    board.check(now + BELIEVED_SECONDS - 1)
    assert (await probe(board)).status_code == 200
    board.check(now + BELIEVED_SECONDS + 1)
    answer = await probe(board)
    assert (answer.status_code, board.status.message) == (503, "the engine has not reported for 15 s")
    board.take(ready)
    assert (await probe(board)).status_code == 200


async def test_the_word_of_a_new_engine_counts_though_it_is_that_of_the_one_before() -> None:
    board = StatusStore(CONFIG)
    ready = msgspec.structs.replace(board.status, state=GroupState.READY, accepting=True)
    board.take(ready)
    board.engine_lost("was killed by signal 9")
    assert (await probe(board)).status_code == 503
    board.take(ready)
    assert (await probe(board)).status_code == 200
