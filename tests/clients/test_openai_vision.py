"""Images through the `openai` client: what transformers' processor and model say of them."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import openai
import pytest
import torch
from openai.types.chat import ChatCompletionContentPartImageParam, ChatCompletionMessageParam
from PIL import Image
from tests.clients.conftest import ARGUMENTS
from tests.support.serve import served
from tests.support.vision_model import Oracle, tokenizer, write_vision_model

MODEL: Final = "vision"
TOKENS: Final = 12
# GPT-2's way to write bytes as letters: those that print as they are, the others from 256 on.
PRINTED: Final = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS: Final = [byte for byte in range(256) if byte not in PRINTED]
SPELLED: Final = {chr(byte): byte for byte in PRINTED} | {chr(256 + n): byte for n, byte in enumerate(OTHERS)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vision_model(tmp_path_factory.mktemp("images") / MODEL)


@pytest.fixture(scope="module")
def client(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    with served(tmp_path_factory.mktemp("served"), *ARGUMENTS, model=folder) as serve:
        serve.ready()
        with openai.OpenAI(base_url=f"{serve.api}/v1", api_key="none", max_retries=0, timeout=120) as client:
            yield client


def picture(seed: int, width: int, height: int) -> Image.Image:
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def part(image: Image.Image) -> ChatCompletionContentPartImageParam:
    file = io.BytesIO()
    image.save(file, "PNG")
    return {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"},
    }


def ask(client: openai.OpenAI, images: list[Image.Image], **options: Any) -> Any:
    messages: list[ChatCompletionMessageParam] = [
        {"role": "user", "content": [*map(part, images), {"type": "text", "text": "What is this?"}]}
    ]
    return client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=TOKENS, temperature=0, extra_body={"ignore_eos": True}, **options
    )


@pytest.mark.parametrize("sizes", [[(64, 48)], [(40, 100), (33, 33)]])
def test_an_image_is_seen_as_transformers_sees_it(
    client: openai.OpenAI, folder: Path, sizes: list[tuple[int, int]]
) -> None:
    images = [picture(seed, *size) for seed, size in enumerate(sizes)]
    content: list[dict[str, Any]] = [{"type": "image"} for _ in images] + [{"type": "text", "text": "What is this?"}]
    torch.set_num_threads(1)
    tokens, length = Oracle(folder).greedy([{"role": "user", "content": content}], images, TOKENS)
    answer = ask(client, images, logprobs=True)
    assert answer.usage.prompt_tokens == length
    assert [bytes(entry.bytes) for entry in answer.choices[0].logprobs.content] == list(map(written, tokens))
    chunks = ask(client, images, stream=True)
    streamed = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert streamed == answer.choices[0].message.content


def written(token: int) -> bytes:
    """What it stands for: a vocabulary of bytes knows nothing else but its markers."""
    text = tokenizer().id_to_token(token) or ""
    return text.encode() if len(text) > 1 else bytes([SPELLED[text]])


def test_what_is_no_image_is_a_bad_request(client: openai.OpenAI) -> None:
    broken: ChatCompletionContentPartImageParam = {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{base64.b64encode(b'no image').decode()}"},
    }
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": [broken, {"type": "text", "text": "?"}]}]
        )
