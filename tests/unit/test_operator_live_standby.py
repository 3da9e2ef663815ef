"""The live page of an operator that stands by: it is the page of the one that works, or it says why it isn't."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import aiohttp
from tests.support.live_models import KEY, report_of, status_of
from tests.support.ports import free_port

from lockstep_operator.cluster import lease
from lockstep_operator.live.board import Board
from lockstep_operator.live.passing_on import PASSED_ON, Leader
from lockstep_operator.live.site import serve, site
from lockstep_operator.settings import Settings
from lockstep_operator.types.observed import GroupReport, Object

SECONDS = 10.0


def a_board() -> Board:
    board = Board()
    board.model(KEY, status_of(), {0: GroupReport(report_of())})
    return board


@asynccontextmanager
async def served(board: Board, elsewhere: Callable[[], Leader | None] = lambda: None) -> AsyncIterator[str]:
    port = free_port()
    runner = await serve(site(board, local=False, elsewhere=elsewhere), port=port, local=False)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        await runner.cleanup()


async def read(url: str, **headers: str) -> tuple[int, str, str]:
    """Status, media type and body."""
    async with aiohttp.ClientSession() as http, asyncio.timeout(SECONDS), http.get(url, headers=headers) as answer:
        return answer.status, answer.content_type, await answer.text()


async def event(answer: aiohttp.ClientResponse) -> Object:
    """The next of a feed."""
    async with asyncio.timeout(SECONDS):
        line = await answer.content.readuntil(b"\n\n")
    told: Object = json.loads(line.removeprefix(b"data: "))
    return told


async def test_every_file_and_the_feed_are_those_of_the_one_that_works() -> None:
    board = a_board()
    async with served(board) as leader, served(Board(), lambda: Leader("first", leader)) as standby:
        for path in ("/", "/live.css", "/live.js", "/nowhere"):
            assert await read(standby + path) == await read(leader + path)
        assert (await read(f"{standby}/feed?page=x"))[0] == 400, "what is asked is passed on, too"
        async with aiohttp.ClientSession() as http, http.get(f"{standby}/feed") as feed:
            assert (feed.status, feed.content_type) == (200, "text/event-stream")
            assert (await event(feed))["ids"] == ["team/chat"]
            board.heard(KEY, 0, report_of(revision=2, requests_running=7))
            assert (await event(feed))["models"][0]["groups"][0]["running"] == 7, "as it happens"


async def test_a_reader_is_let_go_with_the_one_that_worked_and_then_sees_the_next() -> None:
    works: list[Leader | None] = []
    async with served(a_board(), lambda: works[-1]) as standby, aiohttp.ClientSession() as http:
        async with served(a_board()) as leader:
            works.append(Leader("first", leader))
            feed = await http.get(f"{standby}/feed")
            await event(feed)
        async with asyncio.timeout(SECONDS):
            await feed.content.read()
        status, _, text = await read(f"{standby}/")
        assert (status, "The one that works is first: ask that pod." in text, leader in text) == (503, True, True)
        works.append(None)
        async with http.get(f"{standby}/feed") as again:
            assert (await event(again))["ids"] == ["team/chat"], "this one works by now"


async def test_without_an_address_and_between_two_that_both_stand_by_it_says_who_works() -> None:
    async with served(Board(), lambda: Leader("first")) as standby:
        status, _, text = await read(standby)
        assert (status, "knows nothing of models. The one that works is first" in text) == (503, True)
    async with served(Board(), lambda: Leader("first", "http://127.0.0.1:1")) as standby:
        status, _, text = await read(standby, **{PASSED_ON: "1"})
        assert (status, "knows nothing of models" in text) == (503, True), "it is passed on once"


def test_the_lease_tells_where_its_holders_page_is() -> None:
    made = lease.with_page(lease.new("system", "lockstep", "first", 10, 0.0), "http://10.0.0.1:8081")
    assert lease.page_of(made) == "http://10.0.0.1:8081"
    assert lease.page_of(lease.with_page(made, "")) == ""
    assert lease.page_of(lease.released(made, 1.0)) == "", "nobody works"


def test_others_reach_the_page_where_it_is_served_to_the_cluster() -> None:
    of_cluster = Settings(runtime_image="r", live_page="Cluster", live_host="10.0.0.1")
    assert of_cluster.live_url == "http://10.0.0.1:8081"
    assert Settings(runtime_image="r", live_page="Cluster", live_host="fd00::1").live_url == "http://[fd00::1]:8081"
    assert Settings(runtime_image="r", live_page="Local", live_host="10.0.0.1").live_url == ""
    assert Settings(runtime_image="r", live_page="Cluster").live_url == ""
