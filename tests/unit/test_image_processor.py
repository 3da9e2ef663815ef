"""What size an image gets, held against transformers' `smart_resize`, and what config files say of it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tests.support.vision import TowerShape
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from lockstep_runtime.sources.errors import ModelError
from lockstep_runtime.sources.image_processor import (
    ImageProcessor,
    ImageSizeError,
    image_processor,
    with_image_processor,
)

QWEN = TowerShape(patch=16, positions=2304)
BUDGET = 2304 * 16 * 16


def processor(**changes: Any) -> ImageProcessor:
    found = image_processor(QWEN.settings() | changes)
    assert found is not None
    return found


def side(drawn: random.Random) -> int:
    return int(2 ** drawn.uniform(0, 13.3))


def test_500_random_sizes_stay_within_the_position_embeddings_and_equal_transformers() -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    drawn, one = random.Random(seed), processor().limited(None, 256 * 256)
    taken = 0
    while taken < 500:
        height, width = side(drawn), side(drawn)
        if max(height, width) > 200 * min(height, width):
            with pytest.raises(ImageSizeError, match="200 times"):
                one.fit(height, width)
            continue
        fitted = one.fit(height, width)
        assert fitted == smart_resize(height, width, 32, 256 * 256, BUDGET), (height, width)
        assert fitted[0] % 32 == fitted[1] % 32 == 0
        assert fitted[0] * fitted[1] // 256 <= 2304
        taken += 1


def test_an_image_of_808_by_1600_fits() -> None:
    """Without the cap it would be 3960 patches or more."""
    height, width = processor().fit(1600, 808)
    assert (height, width) == (1056, 544)
    assert height * width // 256 == 2244


@pytest.mark.parametrize(("most", "least"), [(100_000, 1_000), (65_536, 65_536), (10**9, 10**9), (1, 1)])
def test_a_users_bounds_are_clamped(most: int, least: int) -> None:
    one = processor().limited(most, least)
    assert 32 * 32 <= one.most_pixels <= BUDGET
    assert one.least_pixels <= one.most_pixels
    drawn = random.Random(5)
    for _ in range(300):
        height, width = side(drawn), side(drawn)
        try:
            fitted = one.fit(height, width)
        except ImageSizeError:
            assert max(height, width) > 50 * min(height, width)
            continue
        assert fitted[0] * fitted[1] <= BUDGET


def test_what_rounding_up_would_take_beyond_the_embeddings_is_refused() -> None:
    small = processor(vision_config=QWEN.config() | {"num_position_embeddings": 16}).limited(None, None)
    assert small.most_pixels == 16 * 256
    with pytest.raises(ImageSizeError, match="positions for 16"):
        small.fit(100, 19_000)


def test_the_files_are_read(tmp_path: Path) -> None:
    settings = {name: value for name, value in QWEN.settings().items() if name != "image_processor"}
    assert image_processor(with_image_processor(tmp_path, settings)) is None
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": QWEN.processor()}))
    nested = image_processor(with_image_processor(tmp_path, settings))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(QWEN.processor() | {"image_mean": [0.1, 0.2, 0.3]}))
    own = image_processor(with_image_processor(tmp_path, settings))
    assert nested is not None
    assert own is not None
    assert (nested.mean, own.mean) == ((0.5, 0.45, 0.4), (0.1, 0.2, 0.3))
    assert with_image_processor(tmp_path, {"model_type": "qwen3"}) == {"model_type": "qwen3"}


def test_older_files_name_pixels() -> None:
    raw = {name: value for name, value in QWEN.processor().items() if name != "size"}
    older = processor(image_processor=raw | {"min_pixels": 5000, "max_pixels": 6000})
    assert (older.least_pixels, older.most_pixels) == (5000, 6000)
    bare = processor(image_processor=raw)
    assert (bare.least_pixels, bare.most_pixels) == (256 * 256, BUDGET)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_processor": QWEN.processor() | {"patch_size": 14}}, "patch_size 14, and config.json 16"),
        ({"image_processor": QWEN.processor() | {"image_mean": [1, 2]}}, "preprocessor_config.json"),
        ({"image_processor": QWEN.processor() | {"image_std": [0.5, 0, 0.5]}}, "out of range"),
        ({"image_processor": QWEN.processor() | {"resample": 9}}, "out of range"),
        ({"image_processor": QWEN.processor() | {"size": {"longest_edge": -1}}}, "out of range"),
        ({"image_token_id": None}, "image_token"),
        ({"vision_config": QWEN.config() | {"num_position_embeddings": 2300}}, "no square"),
        ({"vision_config": QWEN.config() | {"num_position_embeddings": "many"}}, "Expected `int`"),
        ({"vision_config": QWEN.config() | {"patch_size": [16, 16]}}, "patch_size"),
    ],
)
def test_files_that_make_no_sense_are_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        processor(**changes)
