"""Images through a real `lockstep serve` of two ranks: the answers are transformers', also where a rank is killed while
an image is encoded, between its chunks and afterwards; hostile images reach no rank."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
from openai import OpenAI
from PIL import Image
from tests.support.faults import inject
from tests.support.hostile_images import hostile_images
from tests.support.http import HTTP
from tests.support.serve import Served, served
from tests.support.vision import data_uri, encoded, picture
from tests.support.vision_model import Oracle, write_vision_model

from lockstep_runtime.protocol.chaos import FaultPhase, Injection
from lockstep_runtime.protocol.status import GroupState

NAME: Final = "small-vision"
TOKENS: Final = 32
LOOK: Final = ("look: ", picture(90, 60), " and ", picture(64, 100, 1), " what?")
TALL: Final = (picture(1600, 808, 4), "tall?")
TWICE: Final = (picture(90, 60), "or ", picture(90, 60), "?")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vision_model(tmp_path_factory.mktemp("model") / NAME)


@pytest.fixture(scope="module")
def oracle(model: Path) -> Oracle:
    return Oracle(model)


@pytest.fixture(scope="module")
def group(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Its prefill chunks are so small that they cut images."""
    arguments = ("--tensor-parallel-size", "2", "--max-batch-tokens", "16", "--backend", "cpu", "--allow-faults")
    with served(tmp_path_factory.mktemp("serve"), *arguments, model=model) as serve:
        serve.ready()
        yield serve


Parts = tuple[str | Image.Image, ...]


def body(parts: Parts, **more: Any) -> dict[str, Any]:
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": data_uri(encoded(part)), "detail": "auto"}}
        for part in parts
    ]
    asked = {"model": NAME, "temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, "skip_special_tokens": False}
    return asked | {"messages": [{"role": "user", "content": content}]} | more


def ask(serve: Served, parts: Parts) -> dict[str, Any]:
    answer = HTTP.post(f"{serve.api}/v1/chat/completions", json=body(parts), timeout=170)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def expected(oracle: Oracle, parts: Parts) -> tuple[str, int]:
    """The answer's text, and how many tokens the prompt has."""
    content = [{"type": "text", "text": one} if isinstance(one, str) else {"type": "image"} for one in parts]
    images = [one for one in parts if not isinstance(one, str)]
    drawn, length = oracle.greedy([{"role": "user", "content": content}], images, TOKENS)
    return oracle.tokenizer.decode(drawn), length


def check(oracle: Oracle, parts: Parts, answer: dict[str, Any]) -> None:
    text, length = expected(oracle, parts)
    assert answer["choices"][0]["message"]["content"] == text
    assert answer["usage"] == answer["usage"] | {"prompt_tokens": length, "completion_tokens": TOKENS}


@pytest.mark.parametrize("parts", [LOOK, TALL, TWICE, ("no image",)], ids=["two", "808 x 1600", "equal", "none"])
def test_answers_equal_transformers(group: Served, oracle: Oracle, parts: Parts) -> None:
    check(oracle, parts, ask(group, parts))


def test_openais_client_streams_an_answer(group: Served, oracle: Oracle) -> None:
    asked = body(LOOK)
    extra = {name: asked.pop(name) for name in ("ignore_eos", "skip_special_tokens")}
    usage = {"include_usage": True}
    with OpenAI(base_url=f"{group.api}/v1", api_key="none") as client:
        create: Any = client.chat.completions.create
        chunks = list(create(**asked, extra_body=extra, stream=True, stream_options=usage, timeout=170))
    text, length = expected(oracle, LOOK)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert chunks[-1].usage.prompt_tokens == length


FAULTS: Final[dict[str, dict[str, Any]]] = {
    "while an image is encoded": {"phase": FaultPhase.PREFILL, "place": "visual.blocks.1.mlp"},
    "between chunks of an image": {"phase": FaultPhase.PREFILL, "place": "layers.1", "skip": 2},
    "while tokens are drawn": {"phase": FaultPhase.DECODE, "skip": 4},
}


@pytest.mark.parametrize("kind", [Injection.SIGKILL, Injection.RAISE])
@pytest.mark.parametrize("moment", FAULTS)
def test_answers_outlive_a_rank(group: Served, oracle: Oracle, moment: str, kind: Injection) -> None:
    """Of two requests at once, with an image that no other test sends: it can't be on the ranks already."""
    before = group.status()
    ours = (picture(80, 90, 100 + list(FAULTS).index(moment) + 10 * (kind is Injection.RAISE)), *LOOK)
    inject(group, kind, 1, **FAULTS[moment])
    with ThreadPoolExecutor(2) as pool:
        for parts, answer in zip((ours, TALL), pool.map(lambda one: ask(group, one), (ours, TALL)), strict=True):
            check(oracle, parts, answer)
    after = group.status()
    assert after.recoveries == before.recoveries + 1
    assert after.faults[-1].rank == 1
    assert (after.ranks[1].incarnation != before.ranks[1].incarnation) is (kind is Injection.SIGKILL)


def test_hostile_images_get_a_sentence_and_reach_no_rank(group: Served) -> None:
    before, recoveries = steps(group), group.status().recoveries
    for name, (url, words) in hostile_images().items():
        asked = body(("what is it?",))
        asked["messages"][0]["content"].append({"type": "image_url", "image_url": {"url": url}})
        answer = HTTP.post(f"{group.api}/v1/chat/completions", json=asked, timeout=60)
        assert answer.status_code == httpx.codes.BAD_REQUEST, name
        error = answer.json()["error"]
        assert words in error["message"], name
        assert error["param"] == "messages"
    assert steps(group) == before
    assert (group.status().state, group.status().recoveries) == (GroupState.READY, recoveries)


def steps(group: Served) -> int:
    """That the engine has run so far: the status would tell it seconds later."""
    lines = HTTP.get(f"{group.api}/metrics", timeout=60).text.splitlines()
    return int(float(next(line.split()[1] for line in lines if line.startswith("lockstep_steps_total"))))


def test_a_prompt_with_images_is_counted(group: Served, oracle: Oracle) -> None:
    messages = body(LOOK)["messages"]
    answer = HTTP.post(f"{group.api}/tokenize", json={"messages": messages}, timeout=60)
    assert answer.json()["count"] == expected(oracle, LOOK)[1]


def test_limits_of_images(group: Served) -> None:
    many: Parts = (*[picture(8, 8)] * 129, "?")
    answer = HTTP.post(f"{group.api}/v1/chat/completions", json=body(many), timeout=60)
    assert "129 images; at most 128" in answer.json()["error"]["message"]
    answer = HTTP.post(f"{group.api}/v1/chat/completions", json=body((picture(90, 60), "x" * 4100)), timeout=60)
    assert answer.json()["error"]["code"] == "context_length_exceeded"
