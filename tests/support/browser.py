"""A headless Chromium for tests of the live page: the one that `python3 -m dev.browser` has found or installed."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from dev.browser import TARGET
from playwright.async_api import Browser, Page, async_playwright

PAGE_SECONDS = 20.0  # for anything to appear


@asynccontextmanager
async def browsing() -> AsyncIterator[Browser]:
    """Chromium's own sandbox needs namespaces that root in a container doesn't get; the page is our own."""
    assert TARGET.exists(), "there is no browser: run `python3 -m dev.browser`"
    async with async_playwright() as playwright:
        flags = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = await playwright.chromium.launch(executable_path=TARGET, args=flags)
        try:
            yield browser
        finally:
            await browser.close()


class Watched:
    """An open page, and everything that went wrong in it."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.problems: list[str] = []
        page.set_default_timeout(PAGE_SECONDS * 1000)
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("console", lambda said: self.problems.append(said.text) if said.type == "error" else None)
        page.on("dialog", lambda dialog: self.problems.append(f"dialog: {dialog.message}"))

    async def text(self, selector: str) -> str:
        return await self.page.locator(selector).first.inner_text()

    async def until(self, script: str, seconds: float = PAGE_SECONDS) -> None:
        """Until this expression is true in the page. Playwright's own waiting evaluates strings there, which the page's
        Content-Security-Policy forbids."""
        deadline = time.monotonic() + seconds
        while not await self.page.evaluate(script):
            assert time.monotonic() < deadline, f"not within {seconds:g} s: {script}\n{await self.text('body')}"
            await asyncio.sleep(0.05)


@asynccontextmanager
async def opened(browser: Browser, url: str, *, dark: bool = False, width: int = 1280) -> AsyncIterator[Watched]:
    context = await browser.new_context(
        color_scheme="dark" if dark else "light", viewport={"width": width, "height": 800}
    )
    try:
        watched = Watched(await context.new_page())
        await watched.page.goto(url)
        yield watched
    finally:
        await context.close()
