"""From the images' URLs in a request to pixels, in threads of their own."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

from lockstep_runtime.api.errors import ApiError
from lockstep_runtime.api.images.content import locate
from lockstep_runtime.api.images.fetch import ImageFetcher
from lockstep_runtime.api.images.picture import convert
from lockstep_runtime.protocol.images import Pixels
from lockstep_runtime.sources.image_processor import ImageProcessor

THREADS: Final = 2


@dataclass(frozen=True)
class ImageLoader:
    fetcher: ImageFetcher
    threads: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(THREADS, thread_name_prefix="lockstep-image")
    )

    async def load(self, urls: Sequence[str], processor: ImageProcessor) -> list[Pixels]:
        """In order, one after the other.

        Raises:
            ApiError: 400 that says which image can't be taken, and why.
        """
        found: list[Pixels] = []
        for number, url in enumerate(urls, 1):
            try:
                found.append(await self._one(url, processor))
            except ApiError as error:
                if len(urls) == 1:
                    raise
                message = f"Image {number} of {len(urls)}: {error.message}"
                raise ApiError(error.status, message, param=error.param) from None
        return found

    async def _one(self, url: str, processor: ImageProcessor) -> Pixels:
        loop = asyncio.get_running_loop()
        content = await loop.run_in_executor(self.threads, locate, url)
        if not isinstance(content, bytes):
            content = await self.fetcher.fetch(content)
        return await loop.run_in_executor(self.threads, convert, content, processor)

    def close(self) -> None:
        self.threads.shutdown(wait=False, cancel_futures=True)
