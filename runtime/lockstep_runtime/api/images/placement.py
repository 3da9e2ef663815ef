"""Images' places in a prompt: the one token that a template writes for each becomes as many as the image has."""

from __future__ import annotations

from collections.abc import Sequence

from lockstep_runtime.api.errors import invalid
from lockstep_runtime.api.model import ServedModel
from lockstep_runtime.engine.client import PromptImage
from lockstep_runtime.protocol.images import ImageSpan, Pixels
from lockstep_runtime.sources.image_processor import ImageProcessor


def processor_for(model: ServedModel, images: int, most: int) -> ImageProcessor:
    """How a request's images are prepared.

    Raises:
        ApiError: 400, the model takes none, or not so many at once.
    """
    if model.images is None:
        message = f"This model takes text only, {model.why_no_images}: send no parts of type image_url"
        raise invalid(message, "messages", "images_not_supported")
    if images > most:
        raise invalid(f"The messages have {images} images; at most {most} are taken at once", "messages")
    return model.images


def place_images(
    ids: Sequence[int], images: Sequence[Pixels], processor: ImageProcessor | None
) -> tuple[list[int], tuple[PromptImage, ...]]:
    """
    Raises:
        ApiError: 400, the template has not written one place for each image.
    """
    if processor is None:
        raise ValueError("images for a model that takes none")
    places = [index for index, token in enumerate(ids) if token == processor.image_token]
    if len(places) != len(images):
        message = f"The chat template makes {len(places)} places for the {len(images)} images of the messages"
        raise invalid(message, "messages")
    placed: list[PromptImage] = []
    prompt: list[int] = []
    done = 0
    for place, pixels in zip(places, images, strict=True):
        prompt += ids[done:place]
        rows, columns = pixels.height // processor.factor, pixels.width // processor.factor
        span = ImageSpan(digest=pixels.digest, start=len(prompt), rows=rows, columns=columns)
        placed.append(PromptImage(span, pixels))
        prompt += [processor.image_token] * span.tokens
        done = place + 1
    return [*prompt, *ids[done:]], tuple(placed)
