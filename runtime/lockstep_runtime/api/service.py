"""What the endpoints share: the model's text side, the engine, and where a request's body becomes a job."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import Annotated, Any, Protocol, TypeVar

from fastapi import Depends, FastAPI, Request

from lockstep_runtime.api.answers import ModelCard
from lockstep_runtime.api.blockers import Blockers
from lockstep_runtime.api.errors import ApiError, unavailable, unknown_model
from lockstep_runtime.api.grammars import GrammarChecks
from lockstep_runtime.api.images.fetch import ImageFetcher
from lockstep_runtime.api.images.loader import ImageLoader
from lockstep_runtime.api.images.placement import processor_for
from lockstep_runtime.api.keys import ApiKeys
from lockstep_runtime.api.limits import Bodies, Limits, parse
from lockstep_runtime.api.loading import ModelLoader
from lockstep_runtime.api.metrics import Metrics
from lockstep_runtime.api.model import ServedModel
from lockstep_runtime.api.request_builder import RequestBuilder
from lockstep_runtime.api.schemas import ChatRequest, CompletionRequest, Conversation, validate
from lockstep_runtime.api.stream import Answer, Services
from lockstep_runtime.api.telemetry import request_trace
from lockstep_runtime.api.tokenization import Detokenize, detokenize, parse_tokenize, tokenize
from lockstep_runtime.config import ServeConfig
from lockstep_runtime.engine.client import EngineClient, Readiness
from lockstep_runtime.protocol.images import Pixels
from lockstep_runtime.tracing.request import RequestTrace
from lockstep_runtime.tracing.traces import Traces


class Asked(Protocol):
    """The body of any request."""

    @property
    def model(self) -> str | None: ...


AskedT = TypeVar("AskedT", bound=Asked)
log = logging.getLogger(__name__)

_RETRY_LOADING = 5.0  # what clients are told to wait while the model is loaded


class Service:
    """One per application, at `app.state.service`."""

    def __init__(
        self, config: ServeConfig, engine: EngineClient, limits: Limits, keys: ApiKeys, traces: Traces | None
    ) -> None:
        self.served_name = config.served_name
        self.metrics = Metrics(config.served_name, engine.stats)
        self._config = config
        self._engine = engine
        self._limits = limits
        self._bodies = Bodies(limits)
        self._services = Services(engine, self.metrics, limits)
        self._model: ServedModel | None = None
        self._blockers = Blockers(engine)
        self._loader = ModelLoader(config, self._blockers)
        self._keys = keys
        self._traces = traces
        self._created = int(time.time())
        # Where bodies are parsed, rendered and tokenized: a large one doesn't hold up the small ones.
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="lockstep-prompt")
        hosts = frozenset(host.lower() for host in config.vision.image_hosts)
        self._images = ImageLoader(ImageFetcher(hosts, limits.image_seconds, limits.max_image_bytes))
        self._large = ThreadPoolExecutor(1, thread_name_prefix="lockstep-large-prompt")
        self._grammar_checks = GrammarChecks()

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(self._load()), asyncio.create_task(self._keys.watch(self._blockers))]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            gc.unfreeze()
            self._images.close()
            for threads in (self._threads, self._large):
                threads.shutdown(wait=False, cancel_futures=True)
            self._grammar_checks.close()

    def readiness(self) -> Readiness:
        """Whether a request sent now would make progress."""
        readiness = self._engine.readiness()
        if readiness.ready and (why_not := self._blockers.all.reason):
            return Readiness(False, why_not, readiness.draining)
        if readiness.ready and self._model is None:
            return Readiness(False, self._loader.why_not, readiness.draining)
        return readiness

    def card(self) -> ModelCard:
        """
        Raises:
            ApiError: 503, the model is still being loaded.
        """
        return ModelCard(
            id=self.served_name,
            object="model",
            created=self._created,
            owned_by="lockstep",
            max_model_len=self._preparation().max_model_len,
        )

    async def tokenize(self, request: Request) -> bytes:
        """
        Raises:
            ApiError: the request can't be served.
        """
        async with self._read(request, parse_tokenize) as (asked, images, threads):
            preparation = self._preparation()
            use = partial(tokenize, preparation.model, asked, self._limits, preparation.max_model_len, images)
            return await asyncio.get_running_loop().run_in_executor(threads, use)

    async def detokenize(self, request: Request) -> bytes:
        """
        Raises:
            ApiError: the request can't be served.
        """
        async with self._read(request, partial(validate, Detokenize)) as (asked, _, threads):
            use = partial(detokenize, self._preparation().model, asked)
            return await asyncio.get_running_loop().run_in_executor(threads, use)

    async def answer(self, kind: type[ChatRequest] | type[CompletionRequest], request: Request) -> Answer:
        """
        Raises:
            ApiError: the request can't be served.
        """
        arrived = time.monotonic()
        if self._traces is None:
            return await self._answer(kind, request, arrived, None)
        trace = request_trace(
            self._traces,
            "chat" if kind is ChatRequest else "text_completion",
            self.served_name,
            request.headers,
            arrived,
        )
        try:
            return await self._answer(kind, request, arrived, trace)
        except Exception as error:
            trace.failed(str(error.status) if isinstance(error, ApiError) else type(error).__name__)
            trace.end({}, time.monotonic())
            raise

    async def _answer(
        self,
        kind: type[ChatRequest] | type[CompletionRequest],
        request: Request,
        arrived: float,
        trace: RequestTrace | None,
    ) -> Answer:
        read: Callable[[dict[str, Any]], ChatRequest | CompletionRequest] = partial(validate, kind)
        async with self._read(request, read) as (asked, images, threads):
            preparation = self._preparation()
            job, form = await asyncio.get_running_loop().run_in_executor(threads, preparation.build, asked, images)
        await self._grammar_checks.check(job)
        return Answer(job, form, preparation.model.tokenizer, self._services, arrived, trace)

    @asynccontextmanager
    async def _read(
        self, request: Request, read: Callable[[dict[str, Any]], AskedT]
    ) -> AsyncIterator[tuple[AskedT, list[Pixels], ThreadPoolExecutor]]:
        """What a request asks for, its images, and the threads in which the rest may be done without holding up others.
        Its body counts as held until the context is left."""
        model = self._model
        takes_images = model is not None and model.images is not None
        most = self._limits.max_image_body_bytes if takes_images else self._limits.max_body_bytes
        async with self._bodies.read(request, most) as body:
            threads = self._large if len(body) > self._limits.large_body_bytes else self._threads
            asked = await asyncio.get_running_loop().run_in_executor(threads, self._validate, read, body)
            urls: list[str] = asked.image_urls() if isinstance(asked, Conversation) else []
            yield asked, await self._pixels(urls), threads

    async def _pixels(self, urls: list[str]) -> list[Pixels]:
        if not urls:
            return []
        processor = processor_for(self._preparation().model, len(urls), self._limits.max_images)
        return await self._images.load(urls, processor)

    def _validate(self, read: Callable[[dict[str, Any]], AskedT], body: bytearray) -> AskedT:
        asked = read(parse(body, self._limits))
        if asked.model is not None and asked.model != self.served_name:
            raise unknown_model(asked.model[:200], self.served_name)
        return asked

    def _preparation(self) -> RequestBuilder:
        """
        Raises:
            ApiError: 503, the model is still being loaded.
        """
        model, max_model_len = self._model, self._engine.max_model_len
        if model is None or max_model_len is None:
            why = self._loader.why_not if model is None else self._engine.readiness().reason
            raise unavailable(f"The model is not loaded yet: {why}", _RETRY_LOADING, "loading")
        return RequestBuilder(model, self.served_name, max_model_len, self._limits)

    async def _load(self) -> None:
        self._model = await self._loader.run()
        gc.freeze()  # what stays for ever need not be looked through each time that garbage is looked for


async def _service(request: Request) -> Service:  # async: FastAPI gives others a thread each time
    service: Service = request.app.state.service
    return service


TheService = Annotated[Service, Depends(_service)]
