"""A fault in the middle of a streamed call: the api outlives the ranks, so its parsers go on where they were."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.support.api_server import SERVED, serving
from tests.support.chat_model import HERMES, chat_tokenizer, write_chat_model
from tests.support.fake_ranks import FakeRank, Misdeed, next_token
from tests.support.http import async_http
from tests.support.live_engine import LiveEngine, live_engine
from tests.support.tool_texts import TOOLS

from lockstep_runtime.protocol import bus
from lockstep_runtime.protocol.status import Fault

TOKENIZER = chat_tokenizer()
START, END = (TOKENIZER.token_to_id(token) or 0 for token in ("<|im_start|>", "<|im_end|>"))
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich 🎉, or not", "many": [1, 2, 3]}}\n</tool_call>'
ANSWER = f"<think>\nHm, 🎉\n</think>\n\nI look.\n{CALL}\n{CALL}"


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False).ids


SCRIPT, HEADER = [*ids(ANSWER), END], ids("<|im_start|>assistant\n")


def scripted(context: Sequence[int]) -> int:
    """The answer, as far as the context goes; whatever else is asked for (the probe) is the toy model's."""
    if START not in context:
        return next_token(context)
    begun = len(context) - 1 - context[::-1].index(START) + len(HEADER)
    return SCRIPT[len(context) - begun] if len(context) - begun < len(SCRIPT) else END


def once(after: int, fault: Misdeed) -> Misdeed:
    """The step that takes so many tokens of the answer goes wrong."""

    def misdeed(self: FakeRank, step: bus.Step) -> bus.StepDone | bus.StepFailed | None:
        if not any(part.tokens == [SCRIPT[after - 1]] for part in step.sequences) or self.fed < after:
            return self.compute(step)
        self.misdeed = None
        return fault(self, step)

    return misdeed


def fails(self: FakeRank, step: bus.Step) -> bus.StepFailed:
    return bus.StepFailed(epoch=step.epoch, step=step.step, fault=Fault.STEP_FAILED, message="out of memory")


def dies(self: FakeRank, step: bus.Step) -> None:
    self.respawning = asyncio.create_task(self.respawn())


async def stream(url: str) -> tuple[dict[str, str], list[list[str]], str]:
    """Texts by their field, calls (id, name, arguments), and the finish reason."""
    body = {"model": SERVED, "messages": [{"role": "user", "content": "Hi"}], "tools": TOOLS.ALL, "stream": True}
    texts: dict[str, str] = {"content": "", "reasoning": ""}
    calls: list[list[str]] = []
    reason = ""
    async with async_http() as client:
        answer = (await client.post(f"{url}/v1/chat/completions", json=body)).text
    assert answer.endswith("data: [DONE]\n\n")
    for line in answer.splitlines():
        if not line.startswith("data: {"):
            continue
        [choice] = json.loads(line.removeprefix("data: "))["choices"]
        reason = choice["finish_reason"] or reason
        delta: dict[str, Any] = choice["delta"]
        for name in texts:
            texts[name] += delta.get(name) or ""
        for call in delta.get("tool_calls", []):
            if "id" in call:
                calls.append([call["id"], call["function"]["name"], ""])
            calls[call["index"]][2] += call["function"]["arguments"]
    return texts, calls, reason


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("fault", [fails, dies])
async def test_a_streamed_call_goes_on_after_a_fault(tmp_path: Path, rank: int, fault: Misdeed) -> None:
    model = write_chat_model(tmp_path, HERMES)
    moments = [SCRIPT.index(id) + 3 for id in (ids("<tool_call>")[0], ids("</think>")[0])]
    moments += [len(ids(ANSWER.partition(cut)[0])) for cut in ('"weather"', "rich", "2, 3", '\n{"name"')]
    async with live_engine(cache_blocks=512) as live, serving(live.engine, model=model) as url:
        for one in live.ranks:
            one.draw = scripted
        undisturbed = await stream(url)
        for moment in moments:
            await disturbed(live, url, rank, once(moment, fault), undisturbed)
    texts, calls, reason = undisturbed
    assert (texts, reason) == ({"content": "I look.", "reasoning": "Hm, 🎉"}, "tool_calls")
    arguments = '{"city": "Zürich 🎉, or not", "many": [1, 2, 3]}'
    assert [call[1:] for call in calls] == [["weather", arguments]] * 2


async def disturbed(live: LiveEngine, url: str, rank: int, misdeed: Misdeed, expected: Any) -> None:
    """The same answer, but for the calls' ids; each call has one."""
    faults = len(live.engine.status().faults)
    live.ranks[rank].fed = 0
    live.ranks[rank].misdeed = misdeed
    texts, calls, reason = await stream(url)
    assert (texts, [call[1:] for call in calls], reason) == (
        expected[0],
        [call[1:] for call in expected[1]],
        expected[2],
    )
    assert len(live.engine.status().faults) == faults + 1
    await live.ready()
