"""How a model's images are sized and normalised: config.json's vision part and preprocessor_config.json. Pure.

Source: transformers' `Qwen2VLImageProcessorPil`, which Qwen3-VL and Qwen3.5 use as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from lockstep_runtime.protocol.bus import LoadFailure
from lockstep_runtime.sources.errors import ModelError
from lockstep_runtime.sources.files import read_object

SETTINGS_KEY: Final = "image_processor"  # where a model's settings carry what these files say
MOST_ELONGATED: Final = 200  # times as long as wide; transformers takes nothing beyond
BICUBIC: Final = 3  # as Pillow numbers its filters
_HALF: Final = (0.5, 0.5, 0.5)
_SHORTEST: Final = 256 * 256
_MEASURES: Final = (("patch_size", "patch"), ("temporal_patch_size", "frames"), ("merge_size", "merge"))


class ImageSizeError(ValueError):
    """An image's shape can't be taken. The message has the numbers."""


class ImageProcessor(msgspec.Struct, frozen=True, kw_only=True):
    """An image becomes patches of `patch` by `patch` pixels; `merge` by `merge` of them are one token."""

    image_token: int
    patch: int = 16
    merge: int = 2
    frames: int = 2  # a patch's, of which a still image's are equal
    mean: tuple[float, float, float] = _HALF
    deviation: tuple[float, float, float] = _HALF
    rescale: float = 1 / 255
    filter: int = BICUBIC
    least_pixels: int = _SHORTEST
    most_pixels: int
    most_patches: int  # the tower's position embeddings

    @property
    def factor(self) -> int:
        """Pixels of a token's side."""
        return self.patch * self.merge

    def limited(self, most_pixels: int | None, least_pixels: int | None) -> ImageProcessor:
        """With a user's bounds, clamped to what the tower has position embeddings for."""
        most = min(most_pixels or self.most_pixels, self.most_patches * self.patch**2)
        most = max(most, self.factor**2)
        return msgspec.structs.replace(
            self, most_pixels=most, least_pixels=min(least_pixels or self.least_pixels, most)
        )

    def fit(self, height: int, width: int) -> tuple[int, int]:
        """The height and width, in pixels, that an image of this size is resized to.

        Raises:
            ImageSizeError: it is too elongated.
        """
        if max(height, width) > MOST_ELONGATED * min(height, width):
            raise ImageSizeError(
                f"it has {width} x {height} pixels, and may be at most {MOST_ELONGATED} times as long as wide"
            )
        fitted = smart_resize(height, width, self.factor, self.least_pixels, self.most_pixels)
        if self._patches(fitted) > self.most_patches:  # least and most are too close for whole tokens: most counts
            fitted = _shrunk(height, width, self.factor, self.most_patches * self.patch**2)
        if (patches := self._patches(fitted)) > self.most_patches:
            raise ImageSizeError(
                f"of {width} x {height} pixels it would be {patches} patches, and the model has positions for "
                f"{self.most_patches}: send it less elongated"
            )
        return fitted

    def _patches(self, size: tuple[int, int]) -> int:
        return size[0] * size[1] // self.patch**2


def smart_resize(height: int, width: int, factor: int, least: int, most: int) -> tuple[int, int]:
    """The multiples of `factor` nearest to the image's proportions, with `least` to `most` pixels."""
    rows, columns = (round(side / factor) for side in (height, width))
    if rows * columns * factor**2 > most:
        return _shrunk(height, width, factor, most)
    if rows * columns * factor**2 < least:
        grow = math.sqrt(least / (height * width))
        rows, columns = (math.ceil(side * grow / factor) for side in (height, width))
    return rows * factor, columns * factor


def _shrunk(height: int, width: int, factor: int, most: int) -> tuple[int, int]:
    shrink = math.sqrt(height * width / most)
    rows, columns = (max(1, math.floor(side / shrink / factor)) for side in (height, width))
    return rows * factor, columns * factor


def read_image_processor(directory: Path) -> Mapping[str, Any] | None:
    """What the model's folder says of it; None: it has no such file.

    Raises:
        ModelError: a file can't be read.
    """
    found = read_object(directory / "preprocessor_config.json")
    if found is None:
        found = (read_object(directory / "processor_config.json") or {}).get("image_processor")
    return found if isinstance(found, Mapping) else None


def with_image_processor(directory: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A model's settings, with what its other files say of images."""
    found = read_image_processor(directory) if isinstance(config.get("vision_config"), Mapping) else None
    return config if found is None else {**config, SETTINGS_KEY: dict(found)}


def image_processor(settings: Mapping[str, Any]) -> ImageProcessor | None:
    """Of settings as `with_image_processor` gives them; None: the model takes text only.

    Raises:
        ModelError: the two files contradict each other, or a value is none that can be used.
    """
    vision, raw = settings.get("vision_config"), settings.get(SETTINGS_KEY)
    if not isinstance(vision, Mapping) or not isinstance(raw, Mapping):
        return None
    given: dict[str, Any] = {
        name: vision.get("spatial_merge_size" if key == "merge_size" else key, 16 if key == "patch_size" else 2)
        for key, name in _MEASURES
    }
    for key, name in _MEASURES:
        if raw.get(key, given[name]) != given[name]:
            raise _wrong(f"preprocessor_config.json gives {key} {raw[key]!r}, and config.json {given[name]!r}")
    for key, name in (("image_mean", "mean"), ("image_std", "deviation"), ("rescale_factor", "rescale"),
                      ("resample", "filter")):  # fmt: skip
        if raw.get(key) is not None:
            given[name] = raw[key]
    patches, (least, most) = vision.get("num_position_embeddings", 2304), _pixels(raw)
    try:
        found = msgspec.convert(
            {
                **given, "image_token": settings.get("image_token_id"), "most_patches": patches,
                "least_pixels": least or _SHORTEST, "most_pixels": most or patches * given["patch"] ** 2,
            },
            ImageProcessor,
        )  # fmt: skip
    except (msgspec.ValidationError, TypeError) as error:
        raise _wrong(f"config.json and preprocessor_config.json: {error}") from None
    _check(found)
    return found.limited(None, None)


def _pixels(raw: Mapping[str, Any]) -> tuple[Any, Any]:
    """Least and most, under their newer names (which are no edges) or the older ones."""
    size = raw.get("size")
    size = size if isinstance(size, Mapping) else {}
    return size.get("shortest_edge", raw.get("min_pixels")), size.get("longest_edge", raw.get("max_pixels"))


def _check(found: ImageProcessor) -> None:
    whole = (found.patch, found.merge, found.frames, found.least_pixels, found.most_pixels, found.most_patches)
    if min(whole) < 1 or min(found.deviation) <= 0 or not 0 <= found.filter <= 5:
        raise _wrong("config.json and preprocessor_config.json: a size, a deviation or the filter is out of range")
    if math.isqrt(found.most_patches) ** 2 != found.most_patches or found.most_patches < found.merge**2:
        raise _wrong(f"config.json: {found.most_patches} position embeddings of the vision tower are no square")


def _wrong(message: str) -> ModelError:
    return ModelError(message, kind=LoadFailure.PERMANENT)
