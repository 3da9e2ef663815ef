"""Positions of three kinds, and rotary embeddings of them, held against transformers'."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import Qwen3_5Config, Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5Model, Qwen3_5TextRotaryEmbedding, apply_rotary_pos_emb

from lockstep_runtime.layers.rotary import build_rotary, rotate_
from lockstep_runtime.protocol.images import ImageSpan, rotary_positions, shift_before
from lockstep_runtime.sources.errors import ModelError

SECTIONS = [[11, 11, 10], [24, 20, 20], [1, 1, 0], [2, 3, 3]]


def conversation(drawn: random.Random) -> tuple[list[int], list[ImageSpan]]:
    """Token types (1: an image's) and where the images are."""
    kinds: list[int] = []
    spans = []
    for number in range(drawn.randint(0, 4)):
        kinds += [0] * drawn.randint(1, 9)
        span = ImageSpan(
            digest=str(number), start=len(kinds), rows=drawn.randint(1, 9), columns=drawn.randint(1, 9)
        )  # fmt: skip
        kinds += [1] * (span.stop - span.start)
        spans.append(span)
    return kinds + [0] * drawn.randint(1, 9), spans


def test_positions_equal_transformers_whatever_the_chunks() -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    drawn = random.Random(seed)
    config = Qwen3_5Config(
        text_config=Qwen3_5TextConfig(hidden_size=8, num_hidden_layers=0, vocab_size=8).to_dict(),
        vision_config={"depth": 0, "hidden_size": 8, "num_heads": 1, "out_hidden_size": 8, "intermediate_size": 8},
    )
    oracle = Qwen3_5Model(config)
    for _ in range(100):
        kinds, spans = conversation(drawn)
        grids = torch.tensor([[1, 2 * span.rows, 2 * span.columns] for span in spans]) if spans else None
        ids = torch.zeros(1, len(kinds), dtype=torch.int64)
        expected, delta = oracle.get_rope_index(ids, torch.tensor([kinds]), image_grid_thw=grids)
        found: list[tuple[int, int, int]] = []
        while len(found) < len(kinds):
            start, stop = len(found), min(len(kinds), len(found) + drawn.randint(1, 40))
            reaching = [span for span in spans if span.stop > start and span.start < stop]
            found += rotary_positions(start, stop, reaching, shift_before(spans, start))
        assert torch.tensor(found).T.tolist() == expected[:, 0].tolist()
        assert shift_before(spans, len(kinds)) == int(delta)


@pytest.mark.parametrize("sections", SECTIONS)
def test_interleaved_rotary_equals_transformers(sections: list[int]) -> None:
    width = 2 * sum(sections)
    rope = {"rope_type": "default", "rope_theta": 10_000_000.0, "mrope_section": sections, "mrope_interleaved": True}
    config = Qwen3_5TextConfig(head_dim=width, rope_parameters=rope | {"partial_rotary_factor": 1.0})
    oracle = Qwen3_5TextRotaryEmbedding(config)
    generator = torch.Generator().manual_seed(sum(sections))
    positions = torch.randint(0, 5000, (3, 33), generator=generator)
    queries = torch.randn(33, 4, width, generator=generator)
    cos, sin = oracle(queries, positions[:, None])
    expected, _ = apply_rotary_pos_emb(queries.transpose(0, 1)[None], queries.transpose(0, 1)[None], cos, sin)
    rotary = build_rotary(width, rope, 32768).interleaved(sections)
    mine = rotate_(queries.clone(), *rotary.table(positions, torch.float32))
    torch.testing.assert_close(mine, expected[0].transpose(0, 1), atol=1e-5, rtol=1e-5)


def test_text_alone_has_one_kind_of_positions() -> None:
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    plain = build_rotary(16, rope, 512)
    interleaved = plain.interleaved([3, 3, 2])
    positions = torch.arange(40)
    for mine, expected in zip(
        interleaved.on(torch.device("cpu")).table(positions.expand(3, -1), torch.float32),
        plain.table(positions, torch.float32),
        strict=True,
    ):
        assert torch.equal(mine, expected)
    assert all(
        map(torch.equal, interleaved.table(positions, torch.float32), plain.table(positions, torch.float32))
    )  # fmt: skip


@pytest.mark.parametrize("sections", [[8], [3, 3, 3], [9, -1, 0]])
def test_sections_that_do_not_fit_are_refused(sections: list[int]) -> None:
    with pytest.raises(ModelError, match="mrope_section"):
        build_rotary(16, {"rope_type": "default", "rope_theta": 10_000.0}, 512).interleaved(sections)
