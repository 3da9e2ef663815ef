"""Qwen3-Next and Qwen3.5 behind a prompt's beginning whose state was kept, held against transformers'.

The scheduler plans the steps and real ranks take them, so what is shared is what is served.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.support.agreement import Oracle
from tests.support.architectures import write_random
from tests.support.ranks import Ranks
from tests.unit.test_models_hybrid import SMALL
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig, Qwen3NextConfig, Qwen3NextForCausalLM

from lockstep_runtime.engine.client import GenerationRequest
from lockstep_runtime.engine.scheduler import Scheduler
from lockstep_runtime.engine.sequence import Sequence
from lockstep_runtime.layers.cache import BLOCK_SIZE
from lockstep_runtime.protocol.step import PROBE_STATE_SLOTS, SamplingParams

KINDS = {
    "qwen3_next": (Qwen3NextForCausalLM, Qwen3NextConfig),
    "qwen3_5": (Qwen3_5ForCausalLM, Qwen3_5TextConfig),
}
ANSWER = 12  # tokens
TURN = 50


class Serving:
    """A scheduler over ranks, and what transformers answers."""

    def __init__(self, ranks: Ranks, oracle: Oracle, *, blocks: int = 64, state_slots: int = 24) -> None:
        self.ranks, self._oracle = ranks, oracle
        self.scheduler = Scheduler(
            max_sequences=4, max_batch_tokens=300, max_model_len=2048, blocks=blocks, block_size=BLOCK_SIZE,
            state_slots=state_slots,
        )  # fmt: skip
        self._sequences: dict[int, Sequence] = {}
        self.answers: dict[int, list[int]] = {}

    def ask(self, tokens: list[int], count: int = ANSWER) -> Sequence:
        number = len(self._sequences) + 1
        request = GenerationRequest(
            request_id=str(number), prompt=tuple(tokens), max_tokens=count, sampling=SamplingParams(temperature=0)
        )
        sequence = self._sequences[number] = Sequence(number, request)
        self.answers[number] = []
        self.scheduler.add(sequence)
        return sequence

    @property
    def asked(self) -> list[Sequence]:
        return list(self._sequences.values())

    def step(self, *, twice: bool = False) -> None:
        """Planned, taken and booked; `twice`: as after a fault that came before it was booked."""
        slices = self.scheduler.plan()
        if twice:
            self.ranks.step(*slices)
            assert self.scheduler.plan() == slices
        output = self.ranks.step(*slices)
        for drawn in self.scheduler.apply(slices, output.sampled):
            self.answers[drawn.sequence_id].append(drawn.token.token)

    def finish(self) -> None:
        while self.scheduler.running or self.scheduler.waiting:
            self.step()

    def answer(self, tokens: list[int]) -> tuple[list[int], int]:
        """And how many tokens of the prompt were not computed."""
        sequence = self.ask(tokens)
        self.finish()
        return self.answers[sequence.id], sequence.cached or 0

    def check(self) -> None:
        """Every token of every answer is the one that transformers thinks the likeliest after those before it."""
        for number, answer in self.answers.items():
            sequence = self._sequences[number]
            start = len(sequence.request.prompt) - 1
            likeliest = self._oracle.logprobs([*sequence.request.prompt, *answer])[start:-1].argmax(-1).tolist()
            assert answer == likeliest, f"the answer to {start + 1} tokens, {sequence.cached} of them cached"


@pytest.fixture(scope="module")
def oracles(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @functools.cache
    def make(name: str) -> Oracle:
        kind, config = KINDS[name]
        return Oracle(write_random(tmp_path_factory.mktemp("model"), kind, config(**SMALL)), kind)

    return make


@pytest.fixture(scope="module", params=[1, 2])
def ranks_of(request: pytest.FixtureRequest, oracles: Any) -> Iterator[Any]:
    open_ones: list[Ranks] = []

    @functools.cache
    def make(name: str) -> tuple[Ranks, Oracle]:
        open_ones.append(Ranks(oracles(name).path, request.param, dtype="float32").__enter__())
        return open_ones[-1], oracles(name)

    yield make
    for ranks in open_ones:
        ranks.__exit__(None, None, None)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("length", [128, 129, 160, 161, 511])
def test_a_prompt_behind_its_own_beginning_is_answered_like_transformers(ranks_of: Any, name: str, length: int) -> None:
    serving = Serving(*ranks_of(name))
    prompt = ranks_of(name)[1].prompt(length, length)
    cold, nothing = serving.answer(prompt)
    warm, cached = serving.answer(prompt)
    further, found = serving.answer([*prompt, *cold, 5, 6])
    whole = (length - 1) // BLOCK_SIZE * BLOCK_SIZE
    assert (nothing, cached) == (0, whole if whole >= 4 * BLOCK_SIZE else 0)
    assert found == (length + ANSWER - 1) // BLOCK_SIZE * BLOCK_SIZE
    assert warm == cold
    assert further
    serving.check()


@pytest.mark.parametrize("name", KINDS)
def test_where_two_prompts_part_a_third_goes_on_as_transformers_does(ranks_of: Any, name: str) -> None:
    serving = Serving(*ranks_of(name))
    shared, rest = ranks_of(name)[1].prompt(205, 1), ranks_of(name)[1].prompt(90, 2)
    found = [serving.answer([*shared, *rest[at : at + 30]])[1] for at in (0, 30, 60)]
    assert found == [0, 0, 192]
    serving.check()


@pytest.mark.parametrize(("seed", "name"), tuple(enumerate(KINDS)))
def test_random_conversations_on_few_blocks_and_slots_are_transformers(ranks_of: Any, seed: int, name: str) -> None:
    """With sequences that give their blocks up, steps that are repeated, and garbage wherever nothing was written."""
    print(f"seed {seed}")
    ranks, oracle = ranks_of(name)
    chance = random.Random(seed)
    spoil(ranks)
    serving = Serving(ranks, oracle, blocks=14, state_slots=chance.choice([5, 9, 24]))
    system = oracle.prompt(140, seed)
    for turn in range(12):
        earlier = [[*one.request.prompt, *serving.answers[one.id]] for one in serving.asked if one.drawn == TURN]
        begun = chance.choice([system, *[one for one in earlier if len(one) < 250]])
        serving.ask([*begun, *oracle.prompt(chance.randint(1, 60), 100 * seed + turn)], TURN)
        for _ in range(chance.randint(0, 40)):
            if serving.scheduler.running or serving.scheduler.waiting:
                serving.step(twice=chance.random() < 0.2)
    serving.finish()
    assert serving.scheduler.preemptions
    assert serving.scheduler.cached_tokens
    serving.check()


def spoil(ranks: Ranks) -> None:
    """Every slot of recurrent state but that of zeros."""
    with torch.inference_mode():
        for runner in ranks.runners:
            assert runner.cache is not None
            assert runner.cache.size.state_slots > 24 + PROBE_STATE_SLOTS
            for layer in runner.cache.states:
                for part in layer.parts.values():
                    part[1:] = torch.nan
