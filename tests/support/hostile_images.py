"""What somebody may send as an image and should not: each by its URL, with a word of the answer that it gets."""

from __future__ import annotations

import functools
import random
import struct
import zlib
from collections.abc import Iterator

from PIL import Image, PngImagePlugin
from tests.support.vision import data_uri, encoded, picture

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64"><rect width="64" height="64"/></svg>'


def png(width: int, height: int, data: bytes = b"", *, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG file that says it has this size, whatever its data."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return PNG_SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(data)) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _jpeg_of_size(width: int, height: int) -> bytes:
    whole = encoded(picture(64, 64), "JPEG")
    at = whole.index(b"\xff\xc0") + 5
    return whole[:at] + struct.pack(">HH", height, width) + whole[at + 4 :]


def _text_bomb() -> bytes:
    info = PngImagePlugin.PngInfo()
    for number in range(3):
        info.add_text(f"bomb{number}", "\0" * (30 << 20), zip=True)
    return encoded(picture(64, 64), pnginfo=info)


def _webp_of_size(width: int, height: int) -> bytes:
    """An extended header, and nothing of what it announces."""
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + size
    return b"RIFF" + struct.pack("<I", len(body)) + body


@functools.cache
def hostile_images() -> dict[str, tuple[str, str]]:
    """More than 40: name -> URL, and what the error must say."""
    return {**dict(_urls()), **dict(_files())}


def _urls() -> Iterator[tuple[str, tuple[str, str]]]:
    good = data_uri(encoded(picture(64, 64)))
    yield "no data", ("data:image/png;base64,", "empty")
    yield "no comma", ("data:image/png;base64" + "A" * 100, "no comma")
    yield "no base64", ("data:image/png,%89PNG", "not in base64")
    yield "wrong characters", (good[:60] + "!*" + good[62:], "not valid base64")
    yield "no padding", ("data:image/png;base64,iVBORw0KGg", "not valid base64")
    yield "padding within", (good[:62] + "==" + good[64:], "not valid base64")
    yield "url-safe base64", ("data:image/png;base64,-_-_" + good[22:], "not valid base64")
    yield "letters of no ASCII", (good[:60] + "é" + good[61:], "not valid base64")
    yield "an SVG", (data_uri(SVG, "image/svg+xml"), "media type")
    yield "HTML", (data_uri(b"<html></html>", "text/html"), "media type")
    yield "anything", (data_uri(encoded(picture(64, 64)), "application/octet-stream"), "media type")
    yield "no media type", (data_uri(encoded(picture(64, 64)), ""), "media type")
    yield "a video", (data_uri(b"\0\0\0\x18ftypmp42", "video/mp4"), "media type")
    yield "another host", ("https://example.com/cat.png", "not allowed")
    yield "metadata of a cloud", ("http://169.254.169.254/latest/meta-data", "not allowed")
    yield "itself", ("http://localhost:8000/metrics", "not allowed")
    yield "a user", ("https://user:secret@example.com/", "no user")
    yield "no host", ("http:///cat.png", "needs a host")
    yield "a port that is none", ("http://example.com:port/", "malformed")
    yield "a line feed", ("http://example.com/\r\nX: y", "malformed")
    yield "a file", ("file:///etc/passwd", "neither a data URI")
    yield "ftp", ("ftp://example.com/cat.png", "neither a data URI")
    yield "a script", ("javascript:alert(1)", "neither a data URI")
    yield "a blob", ("blob:https://example.com/1", "neither a data URI")
    yield "a path", ("../../etc/passwd", "neither a data URI")


def _files() -> Iterator[tuple[str, tuple[str, str]]]:
    small = picture(64, 64)
    whole, jpeg, gif, webp = (encoded(small, form) for form in ("PNG", "JPEG", "GIF", "WEBP"))
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    header = bytearray(whole)
    header[20] ^= 255
    drawn = random.Random(0)
    files: dict[str, tuple[bytes, str]] = {
        "an SVG called PNG": (SVG, "no PNG"),
        "HTML called PNG": (b"<html><img src=x></html>", "no PNG"),
        "random bytes": (drawn.randbytes(4096), "no PNG"),
        "zeros": (bytes(4096), "no PNG"),
        "a signature": (PNG_SIGNATURE, "no PNG"),
        "a PNG without data": (whole[:33], "An image"),
        "half a PNG": (whole[: len(whole) // 2], "can't be decoded"),
        "a PNG with a flipped byte": (bytes(flipped), "can't be decoded"),
        "a PNG with a wrong header": (bytes(header), "no PNG"),
        "a PNG of no width": (png(0, 64), "no PNG"),
        "a bomb of 10,000 x 10,000": (png(10_000, 10_000, bytes(30_001 * 10_000)), "million"),
        "a bomb of 60,000 x 60,000": (png(60_000, 60_000), "million"),
        "the largest PNG": (png(2**31 - 1, 2**31 - 1), "million"),
        "a bomb of text": (_text_bomb(), "can't be decoded"),
        "1 x 10,000": (encoded(Image.new("RGB", (1, 10_000))), "200 times"),
        "10,000 x 1": (encoded(Image.new("RGB", (10_000, 1))), "200 times"),
        "half a JPEG": (jpeg[: len(jpeg) // 2], "can't be decoded"),
        "the start of a JPEG": (b"\xff\xd8\xff", "no PNG"),
        "the largest JPEG": (_jpeg_of_size(65_500, 65_500), "million"),
        "half a GIF": (gif[: len(gif) // 2], "can't be decoded"),
        "the header of a GIF": (gif[:13], "no PNG"),
        "the largest GIF": (b"GIF89a\xff\xff\xff\xff" + gif[10:], "million"),
        "half a WebP": (webp[: len(webp) // 2], "can't be decoded"),
        "the header of a WebP": (webp[:12], "no PNG"),
        "a WebP that announces 16,000 x 16,000": (_webp_of_size(16_000, 16_000), "million"),
        "a PDF": (encoded(small, "PDF"), "no PNG"),
        "a ZIP": (b"PK\x03\x04" + bytes(200), "no PNG"),
        "PostScript": (encoded(small, "EPS"), "no PNG"),
    }
    for form in ("BMP", "TIFF", "ICO", "PPM", "TGA", "JPEG2000", "AVIF"):
        files[f"a {form}"] = (encoded(small, form), "no PNG")
    for name, (content, words) in files.items():
        yield name, (data_uri(content), words)
