"""Prompts as long as the model's context, with images, among short chats, under a memory limit that the cache fills."""

from __future__ import annotations

import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import pytest
from tests.support import memory_cgroup
from tests.support.serve import Served, served
from tests.support.stream import ChatStream, answers
from tests.support.vision import data_uri, encoded, picture
from tests.support.vision_model import write_vision_model

MIB: Final = 1024 * 1024
LIMIT: Final = 800 * MIB  # two ranks, their engine and their zygotes take 600 of it before there is a cache
LENGTH: Final = 4096  # of the model's context, in tokens
ANSWER: Final = 8  # of the long ones
CHATS: Final = 4
LONG: Final = 3
SECONDS: Final = 300.0


def chats(serve: Served) -> list[ChatStream]:
    messages = [{"role": "user", "content": "What is a module?"}]
    body = {"model": "eyes", "messages": messages, "temperature": 0, "max_tokens": 150}
    return [ChatStream(serve.api, body, SECONDS) for _ in range(CHATS)]


def long_prompt(number: int) -> dict[str, Any]:
    """A token for each byte, two pictures of 63 tokens, and what the template adds."""
    images = [
        {"type": "image_url", "image_url": {"url": data_uri(encoded(picture(126, 112, seed)))}} for seed in (1, 2)
    ]
    text = f"{number} ".ljust(LENGTH - ANSWER - 2 * 66 - 40, "x")
    content = [*images, {"type": "text", "text": text}]
    return {"model": "eyes", "messages": [{"role": "user", "content": content}], "max_tokens": ANSWER, "temperature": 0}


def gap(streams: list[ChatStream]) -> float:
    """The median time between two pieces, in seconds."""
    return statistics.median(after - before for one in streams for before, after in pairwise(one.times))


@pytest.mark.skipif(bool(memory_cgroup.why_not()), reason=f"this machine {memory_cgroup.why_not()}")
def test_long_prompts_with_images_leave_memory_and_turns_to_short_chats(tmp_path: Path) -> None:
    model = write_vision_model(tmp_path / "eyes")
    arguments = ("--tensor-parallel-size", "2", "--threads-per-rank", "1", "--max-model-len", str(LENGTH))
    with (
        memory_cgroup.memory_group(LIMIT) as group,
        served(tmp_path, *arguments, before=group.before, model=model) as serve,
    ):
        serve.ready()
        alone = chats(serve)
        undisturbed = answers(alone)
        assert all(one.finish == "length" and not one.error for one in undisturbed), undisturbed
        crowd = [ChatStream(serve.api, long_prompt(number), SECONDS) for number in range(LONG)]
        among = chats(serve)
        assert answers(among) == undisturbed, serve.log.read_text()
        assert all(one.finish == "length" and not one.error for one in answers(crowd)), serve.log.read_text()
        status = serve.status()
        assert (status.faults, status.pod_problems) == ([], []), serve.log.read_text()
        print(f"{group.used() / MIB:.0f} of {LIMIT // MIB} MiB are used")
        print(f"from a chat's token to the next: {gap(among) / gap(alone):.2f} times as long as without the crowd")
