"""Bounds on what a client may send, checked before anything is made of it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import ClientDisconnect, Request

from lockstep_runtime.api.errors import ApiError, invalid


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    max_body_bytes: int = 4 * 1024 * 1024
    max_json_depth: int = 32
    body_seconds: float = 30.0  # for the whole body to arrive
    write_seconds: float = 60.0  # for a client to take what was sent before its connection is given up
    keep_alive_seconds: float = 5.0  # of silence in a stream before a comment is sent
    headers_seconds: float = 1.0  # how long a stream's headers wait for the engine's first word, which may be a refusal
    render_seconds: float = 5.0  # for the chat template
    max_prompt_chars: int = 8 * 1024 * 1024  # of a rendered chat template


async def read_json(request: Request, limits: Limits) -> dict[str, Any]:
    """The body as a JSON object.

    Raises:
        ApiError: 400 not JSON or nested too deep; 408 too slow; 413 too large; 415 another content type.
    """
    _check_headers(request, limits)
    try:
        async with asyncio.timeout(limits.body_seconds):
            body = await _read(request, limits.max_body_bytes)
    except TimeoutError:
        raise ApiError(408, f"The body did not arrive within {limits.body_seconds:g} s") from None
    except ClientDisconnect:
        raise ApiError(400, "The client went away while it sent the body") from None
    return parse(body, limits.max_json_depth)


def parse(body: bytes, max_depth: int) -> dict[str, Any]:
    """Strict JSON (RFC 8259: no NaN, no lone surrogates, UTF-8), an object, at most `max_depth` levels deep."""
    try:
        value = msgspec.json.decode(body)
    except RecursionError:
        raise _too_deep(max_depth) from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise invalid(f"The body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise invalid("The body must be a JSON object", code="invalid_json")
    _check_depth(value, max_depth)
    return value


def _check_headers(request: Request, limits: Limits) -> None:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise ApiError(415, "The Content-Type must be application/json")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "A compressed body is not supported: send it without a Content-Encoding")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and len(length) < 20 and int(length) > limits.max_body_bytes:
        raise _too_large(limits.max_body_bytes)


async def _read(request: Request, limit: int) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise _too_large(limit)
    return bytes(body)


def _check_depth(value: dict[str, Any], limit: int) -> None:
    level: list[Any] = [value]
    for _ in range(limit):
        # Exact types: the decoder makes no subclasses, and a list may hold a million numbers.
        level = [
            child
            for parent in level
            for child in (parent.values() if type(parent) is dict else parent)
            if type(child) is dict or type(child) is list
        ]
        if not level:
            return
    raise _too_deep(limit)


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"The body is larger than {limit} bytes", code="body_too_large")


def _too_deep(limit: int) -> ApiError:
    return invalid(f"The body is nested deeper than {limit} levels", code="invalid_json")
