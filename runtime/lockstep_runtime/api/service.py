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
from typing import Annotated, TypeVar

from fastapi import Depends, FastAPI, Request

from lockstep_runtime.api.answers import ModelCard
from lockstep_runtime.api.blockers import Blockers
from lockstep_runtime.api.errors import unavailable, unknown_model
from lockstep_runtime.api.generation import Job
from lockstep_runtime.api.keys import ApiKeys
from lockstep_runtime.api.limits import Bodies, Limits, parse
from lockstep_runtime.api.loading import ModelLoader
from lockstep_runtime.api.metrics import Metrics
from lockstep_runtime.api.model import ServedModel
from lockstep_runtime.api.request_builder import RequestBuilder
from lockstep_runtime.api.response_format import ResponseFormat
from lockstep_runtime.api.schemas import ChatRequest, CompletionRequest, validate
from lockstep_runtime.api.stream import Answer, Services
from lockstep_runtime.api.tokenization import Detokenize, detokenize, parse_tokenize, tokenize
from lockstep_runtime.config import ServeConfig
from lockstep_runtime.engine.client import EngineClient, Readiness

T = TypeVar("T")
log = logging.getLogger(__name__)

_RETRY_LOADING = 5.0  # what clients are told to wait while the model is loaded


class Service:
    """One per application, at `app.state.service`."""

    def __init__(self, config: ServeConfig, engine: EngineClient, limits: Limits, keys: ApiKeys) -> None:
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
        self._created = int(time.time())
        # Where bodies are parsed, rendered and tokenized: a large one doesn't hold up the small ones.
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="lockstep-prompt")
        self._large = ThreadPoolExecutor(1, thread_name_prefix="lockstep-large-prompt")

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
            for threads in (self._threads, self._large):
                threads.shutdown(wait=False, cancel_futures=True)

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
        return await self._in_thread(request, self._tokenize)

    async def detokenize(self, request: Request) -> bytes:
        """
        Raises:
            ApiError: the request can't be served.
        """
        return await self._in_thread(request, self._detokenize)

    async def answer(self, kind: type[ChatRequest] | type[CompletionRequest], request: Request) -> Answer:
        """
        Raises:
            ApiError: the request can't be served.
        """
        arrived = time.monotonic()
        job, form, model = await self._in_thread(request, partial(self._prepare, kind))
        return Answer(job, form, model.tokenizer, self._services, arrived)

    def _prepare(
        self, kind: type[ChatRequest] | type[CompletionRequest], body: bytes
    ) -> tuple[Job, ResponseFormat, ServedModel]:
        asked = validate(kind, parse(body, self._limits))
        self._check_name(asked.model)
        preparation = self._preparation()
        job, form = preparation.chat(asked) if isinstance(asked, ChatRequest) else preparation.completion(asked)
        return job, form, preparation.model

    async def _in_thread(self, request: Request, use: Callable[[bytes], T]) -> T:
        """What is made of a request's body, where it doesn't hold up the others."""
        async with self._bodies.read(request) as body:
            threads = self._large if len(body) > self._limits.large_body_bytes else self._threads
            return await asyncio.get_running_loop().run_in_executor(threads, use, body)

    def _tokenize(self, body: bytes) -> bytes:
        asked = parse_tokenize(parse(body, self._limits))
        self._check_name(asked.model)
        preparation = self._preparation()
        return tokenize(preparation.model, asked, self._limits, preparation.max_model_len)

    def _detokenize(self, body: bytes) -> bytes:
        asked = validate(Detokenize, parse(body, self._limits))
        self._check_name(asked.model)
        return detokenize(self._preparation().model, asked)

    def _check_name(self, asked: str | None) -> None:
        if asked is not None and asked != self.served_name:
            raise unknown_model(asked[:200], self.served_name)

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
