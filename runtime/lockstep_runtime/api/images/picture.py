"""From an image file's bytes to the pixels that a model is given. Blocking: run it in a thread.

Pillow lets other threads run while it decodes, converts and resizes, and holds them up where it composes: that is done
strip by strip.
"""

from __future__ import annotations

import io
from threading import BoundedSemaphore
from typing import Final

from PIL import Image, ImageOps, UnidentifiedImageError

from lockstep_runtime.api.errors import ApiError, invalid
from lockstep_runtime.protocol.images import Pixels, digest_of
from lockstep_runtime.sources.image_processor import ImageProcessor, ImageSizeError

FORMATS: Final = ("PNG", "JPEG", "WEBP", "GIF")  # OpenAI's; every further decoder is another way in
MOST_PIXELS: Final = 50_000_000  # of a file: what a phone's camera makes; decoded they take 200 MB
LARGE_PIXELS: Final = 16_000_000  # above it files are decoded one at a time
_STRIP_PIXELS: Final = 1 << 17  # composed in a few milliseconds
_SIXTEEN_BIT: Final = ("I;16", "I;16B", "I;16L", "I;16N")
_WHITE: Final = (255, 255, 255, 255)
_ORIENTATION: Final = 0x0112  # EXIF's tag
_PARAM: Final = "messages"
_large: Final = BoundedSemaphore()


def convert(data: bytes, processor: ImageProcessor) -> Pixels:
    """The first frame, resized for the model, turned as its EXIF says, on white where it is transparent.

    Raises:
        ApiError: 400, it is no image that is taken; with the reason.
    """
    if not data:
        raise invalid("An image has no bytes", _PARAM)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise invalid(
            f"An image has more than {MOST_PIXELS // 10**6} million pixels; send it smaller", _PARAM
        ) from None
    except UnidentifiedImageError:
        raise invalid("An image is no PNG, JPEG, WebP or GIF file", _PARAM) from None
    except Exception as error:  # whatever a decoder raises of foreign data
        raise _broken(error) from None
    with image:
        return _convert(image, processor)


def _convert(image: Image.Image, processor: ImageProcessor) -> Pixels:
    if image.width * image.height > MOST_PIXELS:
        message = (
            f"An image has {image.width} x {image.height} pixels; at most {MOST_PIXELS // 10**6} million are taken"
        )
        raise invalid(message, _PARAM)
    try:
        processor.fit(image.height, image.width)  # before anything is decoded
    except ImageSizeError as error:
        raise invalid(f"An image can't be taken: {error}", _PARAM) from None
    try:
        if image.width * image.height <= LARGE_PIXELS:
            return _resized(image, processor)
        with _large:
            return _resized(image, processor)
    except Exception as error:  # as above
        raise _broken(error) from None


def _resized(image: Image.Image, processor: ImageProcessor) -> Pixels:
    image.load()
    turned = ImageOps.exif_transpose(image) if image.getexif().get(_ORIENTATION, 1) != 1 else image
    colours = to_rgb(turned)
    height, width = processor.fit(colours.height, colours.width)
    pixels = colours.resize((width, height), Image.Resampling(processor.filter)).tobytes()
    return Pixels(height=height, width=width, data=pixels, digest=digest_of(height, width, pixels))


def to_rgb(image: Image.Image) -> Image.Image:
    """As transformers' processors convert it, but for 16 bits, of which they take the lower eight as white."""
    if image.mode in _SIXTEEN_BIT:
        image = image.point(lambda value: value / 256)
    transparent = "A" in image.getbands() or "a" in image.getbands() or image.info.get("transparency") is not None
    return _on_white(image) if transparent else image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    result = Image.new("RGB", image.size, None)
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(top + rows, image.height))
        strip = image.crop(box).convert("RGBA")
        result.paste(Image.alpha_composite(Image.new("RGBA", strip.size, _WHITE), strip).convert("RGB"), box)
    return result


def _broken(error: Exception) -> ApiError:
    reason = f"{type(error).__name__}: {error}"[:200]
    return invalid(f"An image can't be decoded: {reason}", _PARAM)
