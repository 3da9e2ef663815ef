"""The vision tower split over ranks, held against transformers' on the same random weights."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.support.vision import TowerShape, noise
from torch import Tensor
from transformers import Qwen3_5VisionConfig, Qwen3_5VisionModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from lockstep_runtime.config import ServeConfig
from lockstep_runtime.distributed.join import join, open_rendezvous
from lockstep_runtime.layers.image_patches import grid_of, normalised, patchify
from lockstep_runtime.layers.placement import Placement, choose_placement
from lockstep_runtime.layers.vision import VisionTower, read_vision_config
from lockstep_runtime.sources.errors import ModelError
from lockstep_runtime.sources.image_processor import ImageProcessor, image_processor
from lockstep_runtime.weights.load import load_weights
from lockstep_runtime.weights.sharding import RankInfo

CPU = torch.device("cpu")
PREFIX = "model.visual"
SIZES = [(16, 16), (8, 96), (48, 40), (96, 96)]


def processor_of(shape: TowerShape) -> ImageProcessor:
    found = image_processor(shape.settings())
    assert found is not None
    return found


def oracle_of(shape: TowerShape, directory: Path) -> Any:
    """With random weights, which `directory` gets too."""
    torch.manual_seed(1)
    oracle = Qwen3_5VisionModel(Qwen3_5VisionConfig(**shape.config())).eval()
    for parameter in oracle.parameters():
        parameter.data.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.3 if parameter.ndim == 1 else 0.2)
    tensors = {f"{PREFIX}.{name}": one.detach().contiguous() for name, one in oracle.state_dict().items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return oracle


def oracle_patches(shape: TowerShape, images: list[Tensor]) -> Any:
    settings = shape.processor() | {"size": {"shortest_edge": 1, "longest_edge": shape.positions * shape.patch**2}}
    pictures = [image.permute(2, 0, 1).numpy() for image in images]
    return Qwen2VLImageProcessorPil(**settings)(images=pictures, do_resize=False, return_tensors="pt")


def encode(shape: TowerShape, directory: Path, size: int, images: list[Tensor], placement: Placement) -> list[Tensor]:
    """By a tower that is split over so many ranks."""
    config = ServeConfig(
        model=str(directory), served_name="test", tensor_parallel_size=size, ranks_per_pod=size, backend="cpu"
    )

    def work(rank: int) -> list[Tensor]:
        with torch.inference_mode():
            tower = VisionTower(
                read_vision_config(shape.config()), PREFIX, processor_of(shape), RankInfo(rank, size), placement
            )
            load_weights(directory, tower.weights(), lambda done, total: None)
            group = join(config, rank, 1, meeting.address, timeout=60, cancelled=lambda: False)
            try:
                return [tower.encode(image, group) for image in images]
            finally:
                group.close()

    meeting = open_rendezvous(config, 1)
    try:
        with ThreadPoolExecutor(size) as pool:
            results = list(pool.map(work, range(size)))
    finally:
        meeting.close()
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))
    return results[0]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(
    "shape",
    [
        TowerShape(),
        TowerShape(heads=2, intermediate=37, positions=400, depth=2),
        TowerShape(hidden=24, heads=3, intermediate=30, out=20, depth=1, positions=576),
    ],
    ids=["small", "fewer heads than ranks, uneven mlp", "odd heads"],
)
def test_image_tokens_equal_transformers(tmp_path: Path, shape: TowerShape, size: int) -> None:
    oracle = oracle_of(shape, tmp_path)
    limit = shape.positions * shape.patch**2
    images = [noise(*one, seed) for seed, one in enumerate(SIZES) if one[0] * one[1] <= limit]
    assert len(images) >= 2
    given = oracle_patches(shape, images)
    with torch.inference_mode():
        expected = oracle(given["pixel_values"], grid_thw=given["image_grid_thw"]).pooler_output
    mine = torch.cat(encode(shape, tmp_path, size, images, choose_placement(CPU, torch.float32)))
    torch.testing.assert_close(mine, expected, atol=1e-4, rtol=1e-4)


def test_in_bfloat16_it_is_as_close_to_float32_as_transformers(tmp_path: Path) -> None:
    shape = TowerShape(hidden=64, depth=2)
    oracle = oracle_of(shape, tmp_path).bfloat16()
    images = [noise(48, 40)]
    given = oracle_patches(shape, images)
    with torch.inference_mode():
        theirs = oracle(given["pixel_values"], grid_thw=given["image_grid_thw"]).pooler_output.float()
        exact = oracle.float()(given["pixel_values"], grid_thw=given["image_grid_thw"]).pooler_output
    mine = encode(shape, tmp_path, 2, images, choose_placement(CPU, torch.bfloat16))[0].float()
    assert (mine - exact).abs().mean() <= 1.5 * (theirs - exact).abs().mean()


def test_patches_of_random_images_equal_the_processors() -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    drawn, shape = random.Random(seed), TowerShape(positions=10_000)
    processor = processor_of(shape)
    for _ in range(25):
        image = noise(8 * drawn.randint(1, 40), 8 * drawn.randint(1, 40), drawn.randrange(1000))
        expected = oracle_patches(shape, [image])
        grid = grid_of(image.shape[0], image.shape[1], processor)
        assert [1, grid.rows, grid.columns] == expected["image_grid_thw"][0].tolist()
        assert torch.equal(patchify(image, grid, normalised(processor), processor), expected["pixel_values"])


@pytest.mark.parametrize("size", [(12, 16), (16, 100), (104, 96), (0, 8)])
def test_an_image_of_the_wrong_size_is_refused_before_any_collective(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="an image of"):
        grid_of(*size, processor_of(TowerShape()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_act": "relu"}, "hidden_act is relu"),
        ({"deepstack_visual_indexes": [1]}, "feeds several layers"),
        ({"num_heads": 5}, "can't be 5 heads"),
        ({"depth": "many"}, "depth"),
    ],
)
def test_a_tower_that_is_not_supported_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        read_vision_config(TowerShape().config() | change)
