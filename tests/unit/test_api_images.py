"""Images of requests: what is taken becomes the pixels that transformers makes of it, the rest a clear 400."""

from __future__ import annotations

import functools
import io
import random
from typing import Any

import pytest
import torch
from PIL import Image, ImageOps
from tests.support.hostile_images import hostile_images, png
from tests.support.vision import TowerShape, data_uri, encoded, noise, picture
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from lockstep_runtime.api.errors import ApiError
from lockstep_runtime.api.images.content import RemoteImage, content_of, for_template, images_of, locate
from lockstep_runtime.api.images.picture import convert
from lockstep_runtime.layers.image_patches import grid_of, normalised, patchify
from lockstep_runtime.protocol.images import Pixels
from lockstep_runtime.sources.image_processor import ImageProcessor, image_processor

SHAPE = TowerShape(patch=16, positions=2304)


@pytest.fixture(scope="module")
def processor() -> ImageProcessor:
    found = image_processor(SHAPE.settings())
    assert found is not None
    return found.limited(None, 256 * 256)


@pytest.fixture(scope="module")
def oracle(processor: ImageProcessor) -> Any:
    size = {"shortest_edge": processor.least_pixels, "longest_edge": processor.most_pixels}
    return Qwen2VLImageProcessorPil(**SHAPE.processor() | {"size": size})


def located(url: str) -> bytes:
    found = locate(url)
    assert isinstance(found, bytes)
    return found


def check_equal(found: Pixels, given: Any, processor: ImageProcessor) -> None:
    """Every patch is the oracle's, to the bit."""
    pixels = torch.frombuffer(bytearray(found.data), dtype=torch.uint8).view(found.height, found.width, 3)
    grid = grid_of(found.height, found.width, processor)
    assert given["image_grid_thw"].tolist() == [[1, grid.rows, grid.columns]]
    assert torch.equal(patchify(pixels, grid, normalised(processor), processor), given["pixel_values"])


@functools.cache
def taken_images() -> dict[str, bytes]:
    base = picture(300, 400)
    soft = Image.linear_gradient("L").resize((400, 300))
    transparent = base.copy()
    transparent.putalpha(soft)
    palette = base.quantize(64)
    frames = [picture(96, 120, seed) for seed in range(3)]
    found = {
        "RGB": encoded(base),
        "grey": encoded(base.convert("L")),
        "black and white": encoded(base.convert("1")),
        "palette": encoded(palette),
        "palette with a transparent colour": encoded(palette, transparency=3),
        "a transparent colour": encoded(base, transparency=base.getpixel((0, 0))),
        "RGBA": encoded(transparent),
        "grey and alpha": encoded(transparent.convert("LA")),
        "all transparent": encoded(Image.new("RGBA", (200, 100), (10, 200, 30, 0))),
        "16 bits of RGB": png(
            64, 48, b"".join(b"\0" + random.Random(row).randbytes(384) for row in range(48)), depth=16
        ),
        "JPEG": encoded(base, "JPEG", quality=70),
        "progressive JPEG": encoded(base, "JPEG", progressive=True),
        "grey JPEG": encoded(base.convert("L"), "JPEG"),
        "CMYK JPEG": encoded(base.convert("CMYK"), "JPEG"),
        "WebP": encoded(base, "WEBP", method=0),
        "transparent WebP": encoded(transparent, "WEBP", method=0, lossless=True),
        "GIF": encoded(palette, "GIF"),
        "transparent GIF": encoded(palette, "GIF", transparency=5),
        "animated GIF": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "animated WebP": encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], method=0),
        "animated PNG": encoded(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        "one pixel": encoded(picture(1, 1)),
        "3 x 600": encoded(picture(3, 600)),
        "808 x 1600": encoded(picture(1600, 808), "JPEG"),
        "4,000 x 3,000": encoded(Image.radial_gradient("L").resize((4000, 3000)), "JPEG"),
    }
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        found[f"turned, {orientation}"] = encoded(base.crop((0, 0, 200, 300)), "JPEG", exif=exif)
    return found


@pytest.mark.parametrize("name", taken_images())
def test_pixels_equal_the_processors(name: str, processor: ImageProcessor, oracle: Any) -> None:
    content = taken_images()[name]
    with Image.open(io.BytesIO(content)) as opened:
        given = oracle(images=[ImageOps.exif_transpose(opened)], return_tensors="pt")
    check_equal(convert(content, processor), given, processor)


def test_16_bits_of_grey_are_scaled(processor: ImageProcessor, oracle: Any) -> None:
    """transformers takes all above 255 as white."""
    grey = picture(80, 80).convert("L")
    deep = Image.frombytes("I;16", (80, 80), b"".join(bytes((0, value)) for value in grey.tobytes()))
    given = oracle(images=[grey], return_tensors="pt")
    check_equal(convert(encoded(deep), processor), given, processor)


def test_a_large_transparent_image_is_composed_in_strips(processor: ImageProcessor, oracle: Any) -> None:
    big = Image.merge("RGBA", [Image.radial_gradient("L").resize((1800, 1500))] * 4)
    given = oracle(images=[big], return_tensors="pt")
    check_equal(convert(encoded(big, compress_level=1), processor), given, processor)


def test_equal_pixels_have_equal_digests(processor: ImageProcessor) -> None:
    lossless = [convert(encoded(picture(90, 90), form, **more), processor) for form, more in
                (("PNG", {}), ("WEBP", {"lossless": True}))]  # fmt: skip
    assert lossless[0] == lossless[1]
    assert lossless[0].digest != convert(encoded(picture(90, 90, 1)), processor).digest


def test_there_are_forty_hostile_images() -> None:
    assert len(hostile_images()) > 40


@pytest.mark.parametrize("name", hostile_images())
def test_a_hostile_image_is_refused(name: str, processor: ImageProcessor) -> None:
    url, words = hostile_images()[name]
    if name in ("another host", "metadata of a cloud", "itself"):
        assert isinstance(locate(url), RemoteImage)  # which hosts are allowed is another's question
        return
    with pytest.raises(ApiError, match=words) as refusal:
        convert(located(url), processor)
    assert refusal.value.status == 400
    assert refusal.value.param == "messages"


def test_bytes_cut_anywhere_are_an_image_or_a_refusal(processor: ImageProcessor) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    drawn = random.Random(seed)
    for form in ("PNG", "JPEG", "WEBP", "GIF"):
        whole = encoded(picture(70, 50), form)
        for _ in range(60):
            damaged = bytearray(whole[: drawn.randint(0, len(whole))])
            for _ in range(drawn.randint(0, 3)):
                if damaged:
                    damaged[drawn.randrange(len(damaged))] = drawn.randrange(256)
            found = status_or_pixels(bytes(damaged), processor)
            assert found == 400 if isinstance(found, int) else len(found.data) == found.height * found.width * 3


def status_or_pixels(content: bytes, processor: ImageProcessor) -> int | Pixels:
    try:
        return convert(content, processor)
    except ApiError as refusal:
        return refusal.status


def test_base64_may_have_line_breaks_and_a_type_in_capitals() -> None:
    content = random.Random(1).randbytes(1 << 20)
    plain = data_uri(content)
    lines = "\n".join(plain[start : start + 76] for start in range(22, len(plain), 76))
    assert locate(plain) == content
    assert locate(f"DATA:IMAGE/JPG;charset=x;BASE64,{lines}") == content


def test_where_a_remote_image_is() -> None:
    assert locate("HTTPS://Example.COM./a?b#c") == RemoteImage(
        "HTTPS://Example.COM./a?b#c", "https", "example.com", 443
    )
    assert locate("http://[2001:db8::1]:81/a") == RemoteImage("http://[2001:db8::1]:81/a", "http", "2001:db8::1", 81)


def test_parts() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:1", "detail": "low"}}
    text = {"type": "text", "text": "what is it?"}
    assert content_of(None) == "" == content_of([])
    assert content_of([text, text]) == "what is it?\nwhat is it?"
    mixed = content_of([image, text, {"type": "image_url", "image_url": "data:2"}])
    assert [one.url for one in images_of(mixed)] == ["data:1", "data:2"]
    assert for_template(mixed) == [{"type": "image"}, text, {"type": "image"}]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url"}, {"type": "image_url", "image_url": {}}, {"type": "image_url", "image_url": {"url": ""}},
        {"type": "image_url", "image_url": {"url": 7}}, {"type": "text"}, {"text": "x"}, "x", None,
    ],
)  # fmt: skip
def test_a_malformed_part_is_refused(part: object) -> None:
    with pytest.raises(ValueError, match="should"):
        content_of([part])


def test_other_parts_are_refused() -> None:
    with pytest.raises(ApiError, match="input_audio"):
        content_of([{"type": "input_audio", "input_audio": {}}])


def test_noise_is_a_picture() -> None:
    assert picture(5, 7, 2).tobytes() == noise(5, 7, 2).numpy().tobytes()
