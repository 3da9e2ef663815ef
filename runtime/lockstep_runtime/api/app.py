"""The HTTP application. It knows requests, text and token ids; of ranks it knows nothing.

Run it by uvicorn on the engine's own event loop, with `lifespan="on"`: the lifespan loads the tokenizer.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from lockstep_runtime.api.errors import ApiError, failed
from lockstep_runtime.api.keys import ApiKeys
from lockstep_runtime.api.limits import Limits
from lockstep_runtime.api.metrics import Metrics
from lockstep_runtime.api.middleware import Guard, HeadAsGet
from lockstep_runtime.api.routes import describe, router
from lockstep_runtime.api.service import Service
from lockstep_runtime.api.stream import refuse
from lockstep_runtime.config import ServeConfig
from lockstep_runtime.engine.client import EngineClient
from lockstep_runtime.tracing.traces import Traces


def create_app(
    config: ServeConfig,
    engine: EngineClient,
    keys: ApiKeys,
    limits: Limits | None = None,
    traces: Traces | None = None,
) -> FastAPI:
    """
    Args:
        keys: of which clients of /v1 must send one as a bearer token.
        traces: None: requests are not traced.
    """
    service = Service(config, engine, limits or Limits(), keys, traces)

    class Application(FastAPI):
        def openapi(self) -> dict[str, Any]:
            self.openapi_schema = self.openapi_schema or describe(self, service.served_name, with_key=keys.asked_for)
            return self.openapi_schema

    app = Application(
        lifespan=service.lifespan,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
        redirect_slashes=False,
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    app.state.service = service
    app.include_router(router)
    app.add_middleware(
        Guard,
        keys=keys,
        max_requests=config.limits.max_sequences + config.limits.max_waiting,
        draining=lambda: engine.readiness().draining,
        refused=lambda error: refuse(error, service.metrics),
    )
    app.add_middleware(HeadAsGet)
    if config.cors_allow_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_allow_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
        )
    _handle_errors(app, service.metrics)
    return app


def _handle_errors(app: FastAPI, metrics: Metrics) -> None:
    async def api_error(_: Request, error: Exception) -> Response:
        return refuse(error, metrics).response()

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)  # noqa: S101 - narrows: registered for nothing else
        message = f"{request.method} {request.url.path}: {error.detail}"
        headers = dict(error.headers or {})
        if headers.get("Allow") == "GET":
            headers["Allow"] = "GET, HEAD"
        return ApiError(error.status_code, message).response(headers)

    async def unexpected(_: Request, __: Exception) -> Response:
        return failed("The request failed by an internal error").response()  # the server logs the exception itself

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, unexpected)
