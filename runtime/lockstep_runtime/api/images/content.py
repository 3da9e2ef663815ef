"""A message's content: text, or parts of text and images. What an image's URL says, not yet what it leads to."""

from __future__ import annotations

import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from lockstep_runtime.api.errors import ApiError, invalid, unsupported

MEDIA_TYPES: Final = ("image/png", "image/jpeg", "image/webp", "image/gif")
_ALIASES: Final = {"image/jpg": "image/jpeg", "image/pjpeg": "image/jpeg", "image/x-png": "image/png"}
_TAKEN: Final = "PNG, JPEG, WebP and GIF images are taken"
_AT_ONCE: Final = 1 << 18  # characters of base64 that one call decodes: it holds up every stream meanwhile
_LONGEST_URL: Final = 8192  # of a remote image
_LONGEST_HEADER: Final = 256  # of a data URI, before its comma
_PARAM: Final = "messages"


@dataclass(frozen=True, slots=True)
class ImageUrl:
    """A part of type `image_url`."""

    url: str


Part = str | ImageUrl
Content = str | tuple[Part, ...]  # a string where there is no image


@dataclass(frozen=True, slots=True)
class RemoteImage:
    """An image at another host."""

    url: str
    scheme: str
    host: str  # in lower case
    port: int


def content_of(content: object) -> Content:
    """A string, nothing, or a list of parts. Parts of text alone are lines of one string.

    Raises:
        ValueError: none of these.
        ApiError: 400, a part of another type.
    """
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise ValueError("Input should be a string or a list of parts")
    parts = tuple(map(_part, content))
    texts = [part for part in parts if isinstance(part, str)]
    return "\n".join(texts) if len(texts) == len(parts) else parts


def images_of(content: Content) -> list[ImageUrl]:
    return [] if isinstance(content, str) else [part for part in content if isinstance(part, ImageUrl)]


def text_of(content: Content) -> str:
    return content if isinstance(content, str) else "".join(part for part in content if isinstance(part, str))


def for_template(content: Content) -> str | list[dict[str, str]]:
    """As chat templates know it: an image is a place for one, whatever its URL."""
    if isinstance(content, str):
        return content
    return [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in content]


def _part(part: object) -> Part:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or not isinstance(kind, str):
        raise ValueError("A part should be an object with a `type`")
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise ValueError("A part of type text should have a string `text`")
        return str(part["text"])
    if kind == "image_url":
        return _image_url(part.get("image_url"))
    raise unsupported(f"content part {kind[:40]}", "parts of type text and image_url are taken")


def _image_url(given: object) -> ImageUrl:
    url = given.get("url") if isinstance(given, Mapping) else given
    if not isinstance(url, str) or not url:
        raise ValueError("A part of type image_url should have an `image_url` with a `url`")
    return ImageUrl(url)


def locate(url: str) -> bytes | RemoteImage:
    """The bytes that a data URI holds (RFC 2397), or where else the image is.

    Raises:
        ApiError: 400, it is neither a data URI of an image in base64 nor an http(s) URL.
    """
    if url[:5].lower() == "data:":
        return _decode(url)
    scheme = url.partition(":")[0].lower()
    if scheme not in ("http", "https"):
        raise invalid("An image's URL is neither a data URI (data:image/png;base64,...) nor http(s)", _PARAM)
    if len(url) > _LONGEST_URL or not url.isascii() or any(character <= " " for character in url):
        raise invalid("An image's URL is malformed: it is too long, or holds characters that no URL has", _PARAM)
    try:
        parts = urlsplit(url)
        host, port, names_user = (parts.hostname or "").lower(), parts.port, "@" in parts.netloc
    except ValueError:
        raise invalid("An image's URL is malformed", _PARAM) from None
    if not host or names_user:
        raise invalid("An image's URL needs a host, and no user", _PARAM)
    return RemoteImage(url, scheme, host.rstrip("."), port or (443 if scheme == "https" else 80))


def _decode(url: str) -> bytes:
    comma = url.find(",", 5, _LONGEST_HEADER)
    if comma < 0:
        raise invalid("An image's data URI has no comma after its media type: data:image/png;base64,...", _PARAM)
    media_type, *parameters = [part.strip().lower() for part in url[5:comma].split(";")]
    if _ALIASES.get(media_type, media_type) not in MEDIA_TYPES:
        raise invalid(f"An image's data URI has the media type {media_type[:80]!r}; {_TAKEN}", _PARAM)
    if "base64" not in parameters:
        raise invalid("An image's data URI is not in base64: data:image/png;base64,...", _PARAM)
    if comma + 1 == len(url):
        raise invalid("An image's data URI is empty", _PARAM)
    return _from_base64(url, comma + 1)


def _from_base64(text: str, start: int) -> bytes:
    """Strictly, but for white space (RFC 2045 writes lines of it); piece by piece, between which others may run."""
    pieces: list[bytes] = []
    rest = ""
    try:
        for first in range(start, len(text), _AT_ONCE):
            piece = rest + text[first : first + _AT_ONCE]
            if any(space in piece for space in "\n\r\t "):
                piece = "".join(piece.split())
            is_last = first + _AT_ONCE >= len(text)
            whole = len(piece) if is_last else len(piece) // 4 * 4
            if "=" in piece and not is_last:
                raise _not_base64()
            pieces.append(binascii.a2b_base64(piece[:whole].encode("ascii"), strict_mode=True))
            rest = piece[whole:]
    except (binascii.Error, UnicodeEncodeError):
        raise _not_base64() from None
    return b"".join(pieces)


def _not_base64() -> ApiError:
    return invalid("An image's data URI is not valid base64", _PARAM)
