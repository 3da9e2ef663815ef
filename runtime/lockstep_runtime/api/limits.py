"""Bounds on what a client may send, checked before anything is made of it.

Whatever is one call into C holds up every stream while it lasts: decoding a million empty lists takes 0.3 s, a text of
the same size 2 ms. So a body's structure is bounded, not only its size.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import msgspec
from starlette.requests import ClientDisconnect, Request

from lockstep_runtime.api.errors import ApiError, invalid, unavailable

_BACKSLASH: Final = ord("\\")
_AT_ONCE: Final = 1 << 20  # bytes that one call looks through


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    max_body_bytes: int = 4 * 1024 * 1024
    max_image_body_bytes: int = 24 * 1024 * 1024  # where the model takes images
    max_images: int = 128  # of one request
    max_image_bytes: int = 16 * 1024 * 1024  # of a remote image's file
    image_seconds: float = 10.0  # for a remote image to arrive
    max_bodies_bytes: int = 256 * 1024 * 1024  # of all bodies that are read or worked on at once
    max_json_depth: int = 32
    max_json_containers: int = 20_000  # lists and objects
    max_json_strings: int = 100_000  # keys included
    max_json_items: int = 300_000  # of all lists and objects together
    max_logprobs: int = 2_000_000  # that one answer may hold of the memory: about 100 bytes each
    large_body_bytes: int = 64 * 1024  # above it a body has a thread to itself
    body_seconds: float = 30.0  # for the whole body to arrive
    write_seconds: float = 60.0  # for a client to take what was sent before its connection is given up
    keep_alive_seconds: float = 5.0  # of silence in a stream before a comment is sent
    headers_seconds: float = 1.0  # how long a stream's headers wait for the engine's first word, which may be a refusal
    render_seconds: float = 5.0  # for the chat template
    max_prompt_chars: int = 8 * 1024 * 1024  # of a rendered chat template


class Bodies:
    """Reads bodies, and counts what all of them hold of the memory together."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._held = 0

    @asynccontextmanager
    async def read(self, request: Request, most: int | None = None) -> AsyncIterator[bytearray]:
        """The body, of at most so many bytes, held until the context is left.

        Raises:
            ApiError: 408 too slow; 413 too large; 415 another content type; 503 too many large ones at once.
        """
        most = self._limits.max_body_bytes if most is None else most
        _check_headers(request, most)
        body = bytearray()
        try:
            await self._fill(body, request, most)
            yield body  # no copy of it: a large one would hold up every stream
        finally:
            self._held -= len(body)

    async def _fill(self, body: bytearray, request: Request, most: int) -> None:
        limits = self._limits
        try:
            async with asyncio.timeout(limits.body_seconds):
                async for chunk in request.stream():
                    body += chunk
                    self._held += len(chunk)
                    if len(body) > most:
                        raise _too_large(most)
                    if self._held > limits.max_bodies_bytes:
                        raise unavailable("Too many large bodies are under way; try again", 1, "too_many_requests")
        except TimeoutError:
            raise ApiError(408, f"The body did not arrive within {limits.body_seconds:g} s") from None
        except ClientDisconnect:
            raise ApiError(400, "The client went away while it sent the body") from None


def parse(body: bytes | bytearray, limits: Limits) -> dict[str, Any]:
    """Strict JSON (RFC 8259: no NaN, no lone surrogates, UTF-8): an object, within the limits' depth and structure.

    Raises:
        ApiError: 400 it is not; 413 it has too many parts.
    """
    max_depth = limits.max_json_depth
    _check_structure(body, limits)
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


def _check_headers(request: Request, most: int) -> None:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise ApiError(415, "The Content-Type must be application/json")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "A compressed body is not supported: send it without a Content-Encoding")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and len(length) < 20 and int(length) > most:
        raise _too_large(most)


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


def _check_structure(body: bytes | bytearray, limits: Limits) -> None:
    # Of what stands within strings, too: an upper bound, and all that most bodies cost.
    containers, items = _count(body, 0, len(body))
    quotes = _occurrences(body, b'"', 0, len(body)) - _occurrences(body, b'\\"', 0, len(body))
    if _is_within(limits, containers, quotes, items):
        return
    containers = strings = items = position = 0
    while _is_within(limits, containers, strings, items):
        opening = body.find(b'"', position)
        end = len(body) if opening < 0 else opening
        more_containers, more_items = _count(body, position, end)
        containers, items = containers + more_containers, items + more_items
        if opening < 0:
            break
        strings += 1
        position = _end_of_string(body, opening + 1)
    if not _is_within(limits, containers, strings, items):
        most = f"{limits.max_json_containers} lists and objects, {limits.max_json_strings} strings"
        message = f"The body has too many parts: at most {most} and {limits.max_json_items} items are taken"
        raise ApiError(413, message, code="body_too_large")


def _is_within(limits: Limits, containers: int, strings: int, items: int) -> bool:
    return (
        containers <= limits.max_json_containers
        and strings <= limits.max_json_strings
        and items <= limits.max_json_items
    )


def _count(body: bytes | bytearray, start: int, end: int) -> tuple[int, int]:
    """Lists and objects, and the commas between what they hold."""
    containers = _occurrences(body, b"[", start, end) + _occurrences(body, b"{", start, end)
    return containers, _occurrences(body, b",", start, end)


def _occurrences(body: bytes | bytearray, what: bytes, start: int, end: int) -> int:
    """In pieces, between which others may run; what lies across an edge is not counted."""
    return sum(body.count(what, first, min(first + _AT_ONCE, end)) for first in range(start, end, _AT_ONCE))


def _end_of_string(body: bytes | bytearray, start: int) -> int:
    """The position after its closing quotation mark, one that an even number of backslashes stands before."""
    position = start
    while (quote := body.find(b'"', position)) >= 0:
        before = quote - 1
        while body[before] == _BACKSLASH:  # an opening quotation mark is before them
            before -= 1
        position = quote + 1
        if (quote - before) % 2:
            return position
    return len(body)


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"The body is larger than {limit} bytes", code="body_too_large")


def _too_deep(limit: int) -> ApiError:
    return invalid(f"The body is nested deeper than {limit} levels", code="invalid_json")
