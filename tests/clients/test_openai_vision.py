"""Images through the `openai` client: what transformers' processor and model say of them."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import openai
import pytest
from openai.types.chat import ChatCompletionContentPartImageParam
from tests.clients.conftest import ARGUMENTS
from tests.support.image_chat import check_seen
from tests.support.serve import served
from tests.support.vision import picture
from tests.support.vision_model import write_vision_model

MODEL: Final = "vision"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vision_model(tmp_path_factory.mktemp("images") / MODEL)


@pytest.fixture(scope="module")
def client(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    with served(tmp_path_factory.mktemp("served"), *ARGUMENTS, model=folder) as serve:
        serve.ready()
        with openai.OpenAI(base_url=f"{serve.api}/v1", api_key="none", max_retries=0, timeout=120) as client:
            yield client


@pytest.mark.parametrize("sizes", [[(64, 48)], [(40, 100), (33, 33)]])
def test_an_image_is_seen_as_transformers_sees_it(
    client: openai.OpenAI, folder: Path, sizes: list[tuple[int, int]]
) -> None:
    check_seen(client, MODEL, folder, [picture(*size, seed) for seed, size in enumerate(sizes)])


def test_what_is_no_image_is_a_bad_request(client: openai.OpenAI) -> None:
    broken: ChatCompletionContentPartImageParam = {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{base64.b64encode(b'no image').decode()}"},
    }
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": [broken, {"type": "text", "text": "?"}]}]
        )
