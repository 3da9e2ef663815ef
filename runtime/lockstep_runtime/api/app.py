"""The HTTP application. It knows requests, text and token ids; of ranks it knows nothing.

Run it by uvicorn on the engine's own event loop, with `lifespan="on"`: the lifespan loads the tokenizer.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from lockstep_runtime.api import model as models
from lockstep_runtime.api.errors import ApiError, failed, unavailable, unknown_model
from lockstep_runtime.api.guard import Guard
from lockstep_runtime.api.keys import ApiKeys
from lockstep_runtime.api.limits import Limits, read_json
from lockstep_runtime.api.metrics import CONTENT_TYPE, Metrics
from lockstep_runtime.api.model import ModelUnavailableError, ServedModel
from lockstep_runtime.api.prepare import Preparation
from lockstep_runtime.api.schemas import ChatRequest, CompletionRequest, RequestT, validate
from lockstep_runtime.api.stream import Answer, Services, refuse
from lockstep_runtime.config import ServeConfig
from lockstep_runtime.engine.interface import EngineClient

log = logging.getLogger(__name__)

_RETRY_LOAD_SECONDS = 2.0
_RETRY_LOADING = 5.0  # what clients are told to wait while the model is loaded

ResultT = TypeVar("ResultT")


class Api:
    """The endpoints and what they share."""

    def __init__(self, config: ServeConfig, engine: EngineClient, limits: Limits) -> None:
        self._config = config
        self._engine = engine
        self._limits = limits
        self.metrics = Metrics(config.served_name, engine.stats)
        self._services = Services(engine, self.metrics, limits)
        self._model: ServedModel | None = None
        self._why_not = "the tokenizer is being loaded"
        self._created = int(time.time())
        # Rendering and tokenizing: two, so that one long prompt doesn't hold up the short ones.
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="lockstep-prompt")

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(self._load())
        try:
            yield
        finally:
            loading.cancel()
            await asyncio.wait((loading,))
            self._threads.shutdown(wait=False, cancel_futures=True)

    async def health(self) -> Response:
        """The process answers, no more."""
        return JSONResponse({"status": "ok"})

    async def ready(self) -> Response:
        """Whether a request sent now would make progress."""
        readiness = self._engine.readiness()
        if not readiness.ready:
            return JSONResponse({"ready": False, "reason": readiness.reason}, 503)
        if self._model is None:
            return JSONResponse({"ready": False, "reason": self._why_not}, 503)
        return JSONResponse({"ready": True, "reason": readiness.reason})

    async def metrics_page(self) -> Response:
        return Response(self.metrics.render(), media_type=CONTENT_TYPE)

    async def models(self) -> Response:
        self._preparation()
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, name: str) -> Response:
        self._preparation()
        if name != self._config.served_name:
            raise unknown_model(name, self._config.served_name)
        return JSONResponse(self._card())

    async def chat(self, request: Request) -> Response:
        arrived = time.monotonic()
        asked, preparation = await self._asked(ChatRequest, request)
        job, form = await self._in_thread(lambda: preparation.chat(asked))
        return Answer(job, form, preparation.model.tokenizer, self._services, arrived)

    async def completion(self, request: Request) -> Response:
        arrived = time.monotonic()
        asked, preparation = await self._asked(CompletionRequest, request)
        job, form = await self._in_thread(lambda: preparation.completion(asked))
        return Answer(job, form, preparation.model.tokenizer, self._services, arrived)

    def draining(self) -> bool:
        return self._engine.readiness().draining

    async def _asked(self, kind: type[RequestT], request: Request) -> tuple[RequestT, Preparation]:
        body = await read_json(request, self._limits)
        asked = validate(kind, body)
        if asked.model != self._config.served_name:
            raise unknown_model(asked.model[:200], self._config.served_name)
        return asked, self._preparation()

    def _preparation(self) -> Preparation:
        """
        Raises:
            ApiError: 503, the model is still being loaded.
        """
        max_model_len = self._engine.max_model_len
        if self._model is None or max_model_len is None:
            why = self._why_not if self._model is None else self._engine.readiness().reason
            raise unavailable(f"The model is not loaded yet: {why}", _RETRY_LOADING, "loading")
        return Preparation(self._model, self._config.served_name, max_model_len, self._limits)

    def _card(self) -> dict[str, Any]:
        """As OpenAI's model object, with vLLM's `max_model_len`."""
        return {
            "id": self._config.served_name,
            "object": "model",
            "created": self._created,
            "owned_by": "lockstep",
            "max_model_len": self._engine.max_model_len,
        }

    async def _in_thread(self, work: Callable[[], ResultT]) -> ResultT:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def _load(self) -> None:
        """Until it succeeds: a path that is wrong now may be mended, a hub that is away comes back."""
        while self._model is None:
            try:
                self._model = await asyncio.to_thread(models.load, self._config)
            except ModelUnavailableError as error:
                if self._why_not != str(error):
                    log.warning("the tokenizer can't be loaded: %s", error)
                self._why_not = str(error)
                await asyncio.sleep(_RETRY_LOAD_SECONDS)
        self._engine.set_serving_blocker("")
        log.info("the tokenizer is loaded")


def create_app(config: ServeConfig, engine: EngineClient, keys: ApiKeys, limits: Limits | None = None) -> FastAPI:
    """
    Args:
        keys: of which clients of /v1 must send one as a bearer token.
    """
    api = Api(config, engine, limits or Limits())
    # No docs endpoints: bodies are read by hand, so a generated schema would say nothing.
    app = FastAPI(
        lifespan=api.lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    for path, endpoint, method in (
        ("/health", api.health, "GET"),
        ("/ready", api.ready, "GET"),
        ("/metrics", api.metrics_page, "GET"),
        ("/v1/models", api.models, "GET"),
        ("/v1/models/{name:path}", api.model, "GET"),
        ("/v1/chat/completions", api.chat, "POST"),
        ("/v1/completions", api.completion, "POST"),
    ):
        app.add_api_route(path, endpoint, methods=[method], response_model=None)
    app.add_middleware(
        Guard,
        keys=keys,
        max_requests=config.limits.max_sequences + config.limits.max_waiting,
        draining=api.draining,
        refused=lambda error: refuse(error, api.metrics),
    )
    _handle_errors(app, api.metrics)
    return app


def _handle_errors(app: FastAPI, metrics: Metrics) -> None:
    async def api_error(_: Request, error: Exception) -> Response:
        return refuse(error, metrics).response()

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)  # noqa: S101 - narrows: registered for nothing else
        message = f"{request.method} {request.url.path}: {error.detail}"
        return ApiError(error.status_code, message).response(dict(error.headers or {}))

    async def unexpected(_: Request, __: Exception) -> Response:
        return failed("The request failed by an internal error").response()  # the server logs the exception itself

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, unexpected)
