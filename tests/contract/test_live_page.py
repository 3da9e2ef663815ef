"""The live page in a real browser, on models that a test makes up: what a person sees while a rank hangs and after."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest
import pytest_asyncio
import yaml
from aiohttp import web
from playwright.async_api import Browser
from tests.support.browser import Watched, browsing, opened
from tests.support.http import HTTP
from tests.support.kube_fake import FakeKube, resource
from tests.support.kube_http import serving_kube
from tests.support.live_models import KEY, hang, report_of, status_of
from tests.support.local_operator import LocalOperator
from tests.support.ports import free_port
from tests.support.wait import until

from lockstep_operator.live.board import Board
from lockstep_operator.live.session import PAGE_SIZE
from lockstep_operator.live.site import BYTES_PER_SECOND, READERS, serve, site
from lockstep_operator.types.names import KIND, ModelKey
from lockstep_operator.types.observed import GroupReport
from lockstep_runtime.protocol.status import GroupState

pytestmark = pytest.mark.asyncio(loop_scope="module")
RANKS = "[...document.querySelectorAll('.rank')].map(one => one.dataset.mood).join()"
HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    async with browsing() as browser:
        yield browser


@asynccontextmanager
async def serving(board: Board, port: int = 0) -> AsyncIterator[str]:
    port = port or free_port()
    runner: web.AppRunner = await serve(site(board, local=True), port=port, local=True)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        await runner.cleanup()


def working(revision: int = 1, **fields: Any) -> GroupReport:
    return GroupReport(report_of(revision=revision, requests_running=3, last_step_at=time.time(), **fields))


def a_board(groups: int = 1) -> Board:
    board = Board()
    board.model(KEY, status_of(groups), {0: working()})
    return board


async def sees(watched: Watched, *words: str) -> None:
    for word in words:
        await watched.page.get_by_text(word).first.wait_for()


async def test_a_rank_that_hangs_stops_while_the_others_wait_and_the_repair_unfolds(browser: Browser) -> None:
    board = a_board()
    async with serving(board) as url, opened(browser, url) as watched:
        await watched.until(f"{RANKS} === 'ready,ready'")
        assert "3 running" in await watched.text(".figures")

        began = time.time()
        broken = report_of(0, hang(began), revision=2, absent=[1], state=GroupState.RECOVERING)
        board.heard(KEY, 0, broken)
        await watched.until(f"{RANKS} === 'waiting,stopped'")
        await sees(watched, "Healing", "rank 1 stopped before embed_tokens", "detect 1.92 s", "abort …")
        assert "Hang in team/chat, group 0 rank 1" in await watched.page.locator("#said").inner_text()
        ranks = (
            await watched.page.get_by_role("list", name="Ranks of group 0").get_by_role("listitem").all_inner_texts()
        )
        assert [text.replace("\n", "") for text in ranks] == ["0rank 0: waits", "1rank 1: stopped"]

        board.heard(KEY, 0, report_of(0, hang(began, healed=True), revision=3))
        await sees(watched, "abort 31 ms", "respawn 72 ms", "rebuild 19 ms", "verify 15 ms")
        await sees(watched, "healed by Respawn in 137 ms; 3 requests went on")
        assert await watched.page.locator(".fault").count() == 1
        await watched.until(f"{RANKS} === 'ready,mended'")
        assert watched.problems == []


async def test_a_group_that_makes_no_step_stands_still_before_anybody_knows_why(browser: Browser) -> None:
    board = a_board()
    async with serving(board) as url, opened(browser, url) as watched:
        await watched.until(f"{RANKS} === 'ready,ready'")
        await watched.until(f"{RANKS} === 'waiting,waiting'")
        await sees(watched, "with 3 requests at work")
        board.model(KEY, status_of(), {0: working(revision=2)})
        await watched.until(f"{RANKS} === 'ready,ready'")


async def test_every_text_stays_text(browser: Browser) -> None:
    board = a_board()
    board.model(ModelKey("team", HOSTILE), status_of(message=HOSTILE), {0: working(message=HOSTILE)})
    board.heard(KEY, 0, report_of(0, hang(time.time(), message=HOSTILE), revision=2))
    async with serving(board) as url, opened(browser, url) as watched:
        await watched.until("document.querySelectorAll('.model').length === 2")
        await sees(watched, HOSTILE)
        made = "[...document.querySelectorAll('img, script')].map(one => one.outerHTML).join()"
        assert await watched.page.evaluate(made) == '<script src="live.js" defer=""></script>'
        assert watched.problems == []


async def test_it_says_when_it_is_stale_and_comes_back_by_itself(browser: Browser) -> None:
    port = free_port()
    async with serving(a_board(), port) as url:
        watching = opened(browser, url)
        watched = await watching.__aenter__()
        await watched.until("document.getElementById('link').dataset.state === 'live'")
    try:
        await sees(watched, "not connected: this is what was last heard")
        assert await watched.text(".model h3") == "chat"
        after = a_board()
        after.model(ModelKey("team", "other"), status_of(), {})
        async with serving(after, port):
            await watched.until("document.getElementById('link').dataset.state === 'live'")
            await sees(watched, "other")
    finally:
        await watching.__aexit__(None, None, None)


async def test_an_operator_serves_it_and_another_in_its_place_too(browser: Browser, tmp_path: Path) -> None:
    kube = FakeKube(time.time)
    kube.put(KIND, resource("chat", replicas=0))
    settings = {"LOCKSTEP_RUNTIME_IMAGE": "runtime:1", "LOCKSTEP_OPERATOR_NAMESPACE": "lockstep-system"}
    async with serving_kube(kube, tmp_path) as (_, kubeconfig):
        server = yaml.safe_load(kubeconfig.read_text())["clusters"][0]["cluster"]["server"]
        operator = LocalOperator(server, "team", settings, tmp_path / "operator")
        await asyncio.to_thread(operator.start)
        try:
            await asyncio.to_thread(until, "the page", lambda: answers(operator.live_url), 60.0)
            async with opened(browser, operator.live_url) as watched:
                await watched.until("document.querySelectorAll('.model').length === 1", 60)
                assert await watched.text(".model h3") == "chat"
                await asyncio.to_thread(operator.kill)
                await sees(watched, "not connected")
                kube.put(KIND, resource("more", replicas=0))
                await asyncio.to_thread(operator.start)
                await watched.until("document.querySelectorAll('.model').length === 2", 60)
        finally:
            await asyncio.to_thread(operator.kill)


def answers(url: str) -> bool:
    try:
        return HTTP.get(url).status_code == 200
    except httpx.TransportError:
        return False


async def test_two_thousand_models_are_paged_filtered_and_bounded(browser: Browser) -> None:
    board = Board()
    keys = [ModelKey("team", f"model-{number:04}") for number in range(2000)]

    def report(key: ModelKey, revision: int) -> None:
        board.model(
            key, status_of(2), {group: GroupReport(report_of(group, revision=revision, size=8)) for group in (0, 1)}
        )

    for key in keys:
        report(key, 1)
    board.model(keys[7], status_of(message="no such folder", stalled=True), {})
    async with serving(board) as url:
        async with opened(browser, url) as watched:
            await watched.until(f"document.querySelectorAll('.model').length === {PAGE_SIZE}")
            await sees(watched, "1 of 100 (2000 models)")
            await watched.page.get_by_role("button", name="Next").press("Enter")
            await sees(watched, "2 of 100", "model-0020")
            await watched.page.get_by_role("button", name="Needs a person 1").press("Enter")
            await sees(watched, "Needs a person: Because")
            assert await watched.page.locator(".model").count() == 1
            await watched.page.get_by_role("button", name="All").press("Enter")
            await watched.page.get_by_role("searchbox").fill("model-19")
            await sees(watched, "1 of 5 (100 models)", "model-1900")
            assert watched.problems == []
        received, seconds = 0, 3.0
        async with aiohttp.ClientSession() as client, client.get(f"{url}/feed") as answer:
            until = time.monotonic() + seconds
            revision = 1
            while time.monotonic() < until:
                revision += 1
                for key in keys[:100]:
                    report(key, revision)
                received += len(await answer.content.readany())
        assert PAGE_SIZE * 1000 < received < (seconds + 2) * BYTES_PER_SECOND


async def test_it_can_be_looked_at_and_nothing_else() -> None:
    board = a_board()
    async with serving(board) as url, aiohttp.ClientSession() as client:
        async with client.get(url) as page:
            policy = page.headers["Content-Security-Policy"]
            assert page.status == 200
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
        for method in ("POST", "PUT", "DELETE", "PATCH"):
            async with client.request(method, url) as refused:
                assert refused.status == 405
        for path in ("/../server.py", "/page/live.js", "/metrics"):
            async with client.get(f"{url}{path}") as missing:
                assert missing.status == 404
        async with client.get(url, headers={"Host": "attacker.example:8081"}) as rebound:
            assert rebound.status == 403
            assert "forward a port" in await rebound.text()
        async with client.get(f"{url}/feed?page=none") as wrong:
            assert wrong.status == 400


async def test_so_many_pages_may_be_open_and_those_that_close_make_room() -> None:
    async with serving(a_board()) as url:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as client:
            open_pages = [await client.get(f"{url}/feed") for _ in range(READERS)]
            async with client.get(f"{url}/feed") as refused:
                assert refused.status == 503
                assert "close one" in await refused.text()
            open_pages.pop().close()
            deadline = time.monotonic() + 20
            while True:
                async with client.get(f"{url}/feed") as again:
                    if again.status == 200:
                        break
                assert time.monotonic() < deadline
                await asyncio.sleep(0.2)
            for page in open_pages:
                page.close()


async def test_dark_and_narrow(browser: Browser) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    async with (
        serving(a_board()) as url,
        opened(browser, url) as light,
        opened(browser, url, dark=True, width=400) as dark,
    ):
        assert await light.page.evaluate(ground) != await dark.page.evaluate(ground)
        await dark.until(f"{RANKS} === 'ready,ready'")
        assert await dark.page.evaluate("document.documentElement.scrollWidth <= 400")
