"""The live page on real ranks, polled as the operator polls them: a hang is seen while it is, and its repair."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.browser import browsing, opened
from tests.support.faults import inject
from tests.support.live_models import KEY, status_of
from tests.support.ports import free_port
from tests.support.serve import TOKEN, Served, served
from tests.support.stream import answers, start

from lockstep_operator.groups.status_poller import PollTarget, StatusPoller
from lockstep_operator.live.board import Board
from lockstep_operator.live.site import serve, site
from lockstep_runtime.protocol.chaos import FaultPhase, Injection

RANKS = "[...document.querySelectorAll('.rank')].map(one => one.dataset.mood).join()"


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    arguments = ("--tensor-parallel-size", "2", "--backend", "cpu", "--allow-faults", "--served-name", "tiny-chat")
    with served(tmp_path_factory.mktemp("serve"), *arguments) as serve:
        serve.ready()
        yield serve


async def test_a_real_hang_is_seen_and_its_phases_are_the_records(group: Served, tmp_path: Path) -> None:
    board, port = Board(), free_port()
    board.model(KEY, status_of(), {})
    poller = StatusPoller(lambda key, seconds: None, time.time, board.heard)
    status_port = int(group.status_url.rpartition(":")[2])
    poller.watch(KEY, {0: PollTarget("uid", "127.0.0.1", TOKEN, status_port)})
    runner = await serve(site(board, local=True), port=port, local=True)
    try:
        async with browsing() as browser, opened(browser, f"http://127.0.0.1:{port}") as watched:
            await watched.until(f"{RANKS} === 'ready,ready'")
            streams = start(group.api, "tiny-chat", 200, 60.0)
            inject(group, Injection.HANG, 1, phase=FaultPhase.DECODE, skip=40)
            await watched.until(f"{RANKS} === 'waiting,stopped'", 60)
            await watched.page.get_by_text("rank 1 stopped").first.wait_for()
            await watched.page.get_by_text("healed by Respawn").first.wait_for()
            await watched.until(f"{RANKS} === 'ready,mended'", 60)
            ended = await asyncio.to_thread(answers, streams)
            assert [answer.finish for answer in ended] == ["length"] * 2

            [record] = (await asyncio.to_thread(group.status)).faults
            shown = await watched.page.locator(".group .phases li").all_inner_texts()
            names = ["detect", "abort", "respawn", "rebuild", "verify", "first token"]
            assert [text.rpartition(" ")[0].rpartition(" ")[0] for text in shown] == names
            milliseconds = [float(text.split()[-2]) * (1000 if text.endswith(" s") else 1) for text in shown]
            recorded = [1000 * record.phases[name.replace("first token", "firstToken")] for name in names]
            assert milliseconds == pytest.approx(recorded, abs=5.01)  # seconds are shown to a hundredth
            assert watched.problems == []
    finally:
        await poller.close()
        await runner.cleanup()
