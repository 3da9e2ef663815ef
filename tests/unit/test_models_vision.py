"""Conversations with images on a small Qwen3.5, held against transformers' processor and model: whole, in chunks that
cut images, in company, after an epoch, and with what a rank must refuse."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from PIL import Image
from tests.support.ranks import Ranks, piece
from tests.support.vision import encoded, picture
from tests.support.vision_model import TOWER, Oracle, write_vision_model

from lockstep_runtime.api.images.picture import convert
from lockstep_runtime.api.images.placement import place_images
from lockstep_runtime.engine.client import GenerationRequest
from lockstep_runtime.engine.scheduler import Scheduler
from lockstep_runtime.engine.sequence import Sequence as Running
from lockstep_runtime.layers.placement import choose_placement
from lockstep_runtime.models.registry import build_model
from lockstep_runtime.protocol import bus
from lockstep_runtime.protocol.images import ImageSpan, Pixels
from lockstep_runtime.protocol.step import SamplingParams, StateSlots
from lockstep_runtime.sources.image_processor import image_processor
from lockstep_runtime.sources.model_folder import read_config
from lockstep_runtime.weights.sharding import RankInfo

TOKENS = 24
IMAGE = {"type": "image"}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], list[Image.Image]]] = {
    "text": ([{"role": "user", "content": "what is on it?"}], []),
    "one image": ([{"role": "user", "content": [text("look: "), IMAGE, text(" what is it?")]}], [picture(90, 60)]),
    "an image first, a wide one": ([{"role": "user", "content": [IMAGE, text("?")]}], [picture(20, 120, 1)]),
    "turns": (
        [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [text("a "), IMAGE, IMAGE]},
            {"role": "assistant", "content": "two cats"},
            {"role": "user", "content": [text("and now?"), IMAGE]},
        ],
        [picture(70, 70, 2), picture(33, 64, 3), picture(70, 70, 2)],
    ),
    "808 x 1600": ([{"role": "user", "content": [IMAGE, text("tall?")]}], [picture(1600, 808, 4)]),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vision_model(tmp_path_factory.mktemp("vision"))


@pytest.fixture(scope="module")
def oracle(model: Path) -> Oracle:
    return Oracle(model)


def request(oracle: Oracle, name: str) -> GenerationRequest:
    """As the api makes it."""
    messages, images = CONVERSATIONS[name]
    processor = image_processor(TOWER.settings() | {"image_token_id": oracle.model.config.image_token_id})
    assert processor is not None
    pixels = [convert(encoded(image), processor) for image in images]
    given = oracle.tokenizer.apply_chat_template(
        messages, chat_template=oracle.template, tokenize=False, add_generation_prompt=True
    )
    ids = oracle.tokenizer(given, add_special_tokens=False)["input_ids"]
    prompt, placed = place_images(ids, pixels, processor)
    return GenerationRequest(
        request_id=name, prompt=tuple(prompt), max_tokens=TOKENS, sampling=SamplingParams(temperature=0), images=placed
    )


def expected(oracle: Oracle, name: str) -> list[int]:
    return oracle.greedy(*CONVERSATIONS[name], TOKENS)[0]


def run(ranks: Ranks, requests: Sequence[GenerationRequest], *, budget: int, epochs: int = 0) -> list[list[int]]:
    """By the engine's own plan. `epochs`: after every so many steps the ranks have lost what they had encoded."""
    size = ranks.runners[0].room()
    plan = Scheduler(
        max_sequences=8, max_batch_tokens=budget, max_model_len=4096, blocks=62, block_size=32,
        state_slots=size.state_slots and size.state_slots - 2,
    )  # fmt: skip
    sequences = [Running(number, one) for number, one in enumerate(requests, 1)]
    for one in sequences:
        plan.add(one)
    sent: set[str] = set()
    steps = 0
    while slices := plan.plan():
        work, pixels = plan.images.work()
        for image in pixels:
            if image.digest not in sent - set(work.drop):
                ranks.send(image)
        sent = sent - set(work.drop) | {image.digest for image in pixels}
        output = ranks.step(*slices, images=work)
        plan.apply(slices, output.sampled)
        steps += 1
        if epochs and steps % epochs == 0:
            for runner in ranks.runners:
                runner.images.forget_tokens()
            plan.forget_images()
    return [one.tokens[len(one.request.prompt) :] for one in sequences]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_greedy_tokens_equal_transformers(model: Path, oracle: Oracle, size: int) -> None:
    with Ranks(model, size) as ranks:
        for name in CONVERSATIONS:
            assert run(ranks, [request(oracle, name)], budget=2048) == [expected(oracle, name)], name


def test_with_experts(tmp_path: Path) -> None:
    oracle = Oracle(write_vision_model(tmp_path, experts=True), experts=True)
    with Ranks(tmp_path, 2) as ranks:
        names = ["turns", "one image"]
        found = run(ranks, [request(oracle, name) for name in names], budget=64)
        assert found == [expected(oracle, name) for name in names]


@pytest.mark.parametrize("budget", [7, 33])
def test_chunks_cut_images_and_change_nothing(model: Path, oracle: Oracle, budget: int) -> None:
    with Ranks(model, 2) as ranks:
        for name in ("one image", "turns"):
            assert run(ranks, [request(oracle, name)], budget=budget) == [expected(oracle, name)], name


def test_company_and_lost_encodings_change_nothing(model: Path, oracle: Oracle) -> None:
    names = ["turns", "text", "one image", "an image first, a wide one"]
    with Ranks(model, 2) as ranks:
        for epochs in (0, 1, 3):
            found = run(ranks, [request(oracle, name) for name in names], budget=40, epochs=epochs)
            assert found == [expected(oracle, name) for name in names]


def test_a_prompt_has_as_many_tokens_as_transformers_gives_it(oracle: Oracle) -> None:
    for name, conversation in CONVERSATIONS.items():
        assert len(request(oracle, name).prompt) == oracle.inputs(*conversation)["input_ids"].shape[1]


def part_of(image: Pixels, *, data: bytes | None = None, offset: int = 0) -> bus.ImagePart:
    content = image.data if data is None else data
    return bus.ImagePart(digest=image.digest, height=image.height, width=image.width, offset=offset, data=content)


def test_what_is_not_there_is_refused_before_any_collective(model: Path, oracle: Oracle) -> None:
    """Alone, so that a collective that is entered would not fail."""
    with Ranks(model, 1) as ranks:
        [runner] = ranks.runners
        image = request(oracle, "one image").images[0].pixels
        rows, columns = image.height // 16, image.width // 16
        span = ImageSpan(digest=image.digest, start=0, rows=rows, columns=columns)
        tokens = [7] * (rows * columns)

        def step(*drop: str, wanted: ImageSpan = span, encode: Sequence[str] = (image.digest,)) -> None:
            part = piece(1, 0, tokens, [0])
            given = {"images": [wanted], "state": StateSlots(read=0, write=1)}
            work = bus.ImageWork(encode=list(encode), drop=list(drop))
            ranks.step(msgspec.structs.replace(part, **given), images=work)

        with pytest.raises(ValueError, match="pixels are not here"):
            step()
        runner.images.take(part_of(image, data=image.data[:-1]))
        with pytest.raises(ValueError, match="pixels are not here"):
            step()
        runner.images.take(part_of(image, data=image.data[:-1] + bytes([image.data[-1] ^ 1])))
        with pytest.raises(ValueError, match="are not those that were sent"):
            step()
        runner.images.take(part_of(image))
        with pytest.raises(ValueError, match="it is not encoded"):
            step(encode=())
        with pytest.raises(ValueError, match=f"it has {rows * columns} tokens"):
            step(wanted=ImageSpan(digest=image.digest, start=0, rows=rows, columns=columns + 1))
        step()
        step(encode=())
        with pytest.raises(ValueError, match="it is not encoded"):
            step(image.digest, encode=())


def test_an_image_step_that_is_cut_off_at_any_collective_is_repeated_to_the_same_tokens(
    model: Path, oracle: Oracle
) -> None:
    """A respawned rank has lost its tokens of the image, and after a rebuild the others forget theirs, too."""
    one = request(oracle, "one image")
    [image] = one.images
    work = bus.ImageWork(encode=[image.pixels.digest])
    whole = msgspec.structs.replace(
        piece(1, 0, list(one.prompt), [3, 4, 5, 6], SamplingParams(temperature=0, logprobs=5)),
        images=[image.span], state=StateSlots(read=0, write=1),
    )  # fmt: skip
    with Ranks(model, 2) as ranks:
        ranks.send(image.pixels)
        expected = ranks.step(whole, images=work)
        collectives = ranks.cut_off(whole, rank=0, at=10**6, after=False, images=work)
        assert collectives > 2 * TOWER.depth, "the tower takes part"
        for rank, at in itertools.product(range(2), range(collectives)):
            ranks.cut_off(whole, rank=rank, at=at, after=bool(at % 2), images=work)
            for runner in ranks.runners:
                runner.images.forget_tokens()
            again = ranks.step(whole, images=work)
            assert (again.sampled, again.fingerprint) == (expected.sampled, expected.fingerprint), (rank, at)


def test_without_the_processors_settings_there_is_no_tower(model: Path) -> None:
    built = build_model(read_config(model), RankInfo(0, 1), choose_placement(torch.device("cpu"), torch.float32))
    assert built.vision is None
