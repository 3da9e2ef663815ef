"""The picture of the live page, docs/live.png: the demo's model served on this machine and polled as the operator polls
it, at the moment when a rank of it hangs. `python -m dev.live_picture`."""

from __future__ import annotations

import asyncio
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import httpx
from dev.browser import TARGET
from playwright.async_api import Page, ViewportSize, async_playwright

from lockstep_operator.groups.status_poller import PollTarget, StatusPoller
from lockstep_operator.live.board import Board
from lockstep_operator.live.site import serve, site
from lockstep_operator.types.model_status import Condition, GroupSummary, ModelStatus
from lockstep_operator.types.names import ModelKey

ROOT: Final = Path(__file__).resolve().parents[1]
PICTURE: Final = ROOT / "docs" / "live.png"
MODEL: Final = ROOT / "examples" / "tiny-chat"
KEY: Final = ModelKey("default", "tiny-chat")
API, BUS, STATUS, LIVE = 21800, 21740, 21741, 21781  # ports
SIZE: Final = ViewportSize(width=1240, height=310)
SECONDS: Final = 120.0
UNFOLDED_SECONDS: Final = 1.4  # for the phases to come into view, while the rank is still shown as stopped
ASKED: Final = {"model": "tiny-chat", "prompt": "Tell me everything about exceptions.", "max_tokens": 300}


def main() -> int:
    token = secrets.token_hex()
    with model(token):
        asyncio.run(picture(token))
    print(f"{PICTURE.relative_to(ROOT)}: {PICTURE.stat().st_size / 1024:.0f} KiB")
    return 0


@contextmanager
def model(token: str) -> Iterator[None]:
    words = [sys.executable, "-m", "lockstep_runtime", "serve", str(MODEL), "--tensor-parallel-size", "2"]
    ports = ["--port", str(API), "--bus-port", str(BUS), "--status-port", str(STATUS)]
    environment = os.environ | {"LOCKSTEP_TOKEN": token, "LOCKSTEP_ALLOW_FAULTS": "true", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*words, *ports, "--backend", "cpu"], env=environment)
    try:
        deadline = time.monotonic() + SECONDS
        while not answers():
            if time.monotonic() > deadline or process.poll() is not None:
                raise SystemExit("the model doesn't serve; its log is above")
            time.sleep(0.5)
        yield
    finally:
        process.terminate()
        process.wait(SECONDS)


def answers() -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{API}/ready").status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


async def picture(token: str) -> None:
    board = Board()
    poller = StatusPoller(lambda key, seconds: None, time.time, board.heard)
    ready = Condition(type="Ready", status="True", reason="Ready", message="", last_transition_time=0.0)
    groups = (GroupSummary(group=0, ready=True, state="Ready"),)
    board.model(KEY, ModelStatus(conditions=(ready,), ranks="2/2", ready_replicas=1, groups=groups))
    poller.watch(KEY, {0: PollTarget("first", "127.0.0.1", token, STATUS)})
    runner = await serve(site(board, local=True), port=LIVE, local=True)
    try:
        async with async_playwright() as playwright, httpx.AsyncClient(timeout=SECONDS) as client:
            flags = ["--no-sandbox"] if os.geteuid() == 0 else []
            browser = await playwright.chromium.launch(executable_path=TARGET, args=flags)
            page = await browser.new_page(viewport=SIZE, color_scheme="light")
            await page.goto(f"http://127.0.0.1:{LIVE}")
            await page.locator(".rank").nth(1).wait_for()
            asked = asyncio.create_task(client.post(f"http://127.0.0.1:{API}/v1/completions", json=ASKED))
            await hang(page, token)
            await page.screenshot(path=PICTURE)
            (await asked).raise_for_status()
            await browser.close()
    finally:
        await poller.close()
        await runner.cleanup()


async def hang(page: Page, token: str) -> None:
    words = ["inject", "hang", "--rank=1", "--phase=decode", "--skip=60", "--url", f"http://127.0.0.1:{STATUS}"]
    environment = os.environ | {"LOCKSTEP_TOKEN": token}
    command = await asyncio.create_subprocess_exec(sys.executable, "-m", "lockstep_runtime", *words, env=environment)
    if await command.wait() != 0:
        raise SystemExit("the fault was not taken; the words are above")
    await page.locator(".group .phases li").nth(4).wait_for(timeout=SECONDS * 1000)
    await asyncio.sleep(UNFOLDED_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
