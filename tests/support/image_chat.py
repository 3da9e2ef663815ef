"""An image conversation by the `openai` client, held against transformers' processor and model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import openai
import torch
from openai.types.chat import ChatCompletionContentPartImageParam, ChatCompletionMessageParam
from PIL import Image
from tests.support.vision import data_uri, encoded
from tests.support.vision_model import Oracle, tokenizer

TOKENS: Final = 12
QUESTION: Final = "What is this?"
# GPT-2's way to write bytes as letters: those that print as they are, the others from 256 on.
_PRINTED: Final = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS: Final = [byte for byte in range(256) if byte not in _PRINTED]
_SPELLED: Final = {chr(byte): byte for byte in _PRINTED} | {chr(256 + n): byte for n, byte in enumerate(_OTHERS)}


def part(image: Image.Image) -> ChatCompletionContentPartImageParam:
    return {"type": "image_url", "image_url": {"url": data_uri(encoded(image))}}


def ask(client: openai.OpenAI, model: str, images: list[Image.Image], **options: Any) -> Any:
    messages: list[ChatCompletionMessageParam] = [
        {"role": "user", "content": [*map(part, images), {"type": "text", "text": QUESTION}]}
    ]
    return client.chat.completions.create(
        model=model, messages=messages, max_tokens=TOKENS, temperature=0, extra_body={"ignore_eos": True}, **options
    )


def check_seen(client: openai.OpenAI, model: str, folder: Path, images: list[Image.Image]) -> None:
    """The prompt is as long as transformers', and each token is its own; a stream joins to the same text."""
    content: list[dict[str, Any]] = [{"type": "image"} for _ in images] + [{"type": "text", "text": QUESTION}]
    torch.set_num_threads(1)
    tokens, length = Oracle(folder).greedy([{"role": "user", "content": content}], images, TOKENS)
    answer = ask(client, model, images, logprobs=True)
    assert answer.usage.prompt_tokens == length
    assert [bytes(entry.bytes) for entry in answer.choices[0].logprobs.content] == list(map(_written, tokens))
    chunks = ask(client, model, images, stream=True)
    streamed = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert streamed == answer.choices[0].message.content


def _written(token: int) -> bytes:
    """What it stands for: a vocabulary of bytes knows nothing else but its markers."""
    text = tokenizer().id_to_token(token) or ""
    return text.encode() if len(text) > 1 else bytes([_SPELLED[text]])
