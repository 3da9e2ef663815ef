"""Errors in OpenAI's form: `{"error": {"message", "type", "param", "code"}}`.

Source: https://platform.openai.com/docs/guides/error-codes and what the `openai` client makes of them.
"""

from __future__ import annotations

import math
from typing import Final

import msgspec
from starlette.responses import Response

MAX_MESSAGE: Final = 2000  # characters: a template may put a whole conversation into its own


class ApiError(Exception):
    """The error body for the client, and its HTTP status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message if len(message) <= MAX_MESSAGE else f"{message[:MAX_MESSAGE]} …"
        self.kind = kind
        self.param = None if param is None else param[:MAX_MESSAGE]
        self.code = code
        self.retry_after = retry_after

    def body(self) -> bytes:
        return msgspec.json.encode(
            {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}
        )

    def response(self, headers: dict[str, str] | None = None) -> Response:
        everything = dict(headers or {})
        if self.retry_after is not None:
            everything["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
        if self.status == 401:
            everything["WWW-Authenticate"] = "Bearer"
        return Response(self.body(), self.status, everything, media_type="application/json")


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def unsupported(param: str, why: str) -> ApiError:
    return invalid(f"`{param}` is not supported: {why}", param, "unsupported_parameter")


def too_long(message: str, param: str | None = None) -> ApiError:
    return invalid(message, param, "context_length_exceeded")


def unknown_model(asked: str, served: str) -> ApiError:
    message = f"The model `{asked}` does not exist; this server serves `{served}`"
    return ApiError(404, message, param="model", code="model_not_found")


def unavailable(message: str, retry_after: float, code: str = "unavailable") -> ApiError:
    """503: nothing can be queued now."""
    return ApiError(503, message, kind="service_unavailable_error", code=code, retry_after=retry_after)


def failed(message: str) -> ApiError:
    return ApiError(500, message, kind="server_error", code="generation_failed")
