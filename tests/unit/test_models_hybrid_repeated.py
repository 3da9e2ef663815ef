"""A step of a hybrid model that is cut off anywhere, on any rank, and repeated, as if it had not been cut off."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.agreement import GREEDY, Text
from tests.support.architectures import write_random
from tests.support.ranks import Ranks
from tests.unit.test_models_hybrid import SMALL
from torch import Tensor
from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

from lockstep_runtime.layers.cache import StateCache
from lockstep_runtime.protocol.step import SequenceSlice

SIZE = 2
NEVER = 10**6  # collectives
TOKENS = list(range(3, 93))
SCHEDULE: tuple[tuple[tuple[int, int], ...], ...] = (  # (text, tokens) of each step
    ((1, 40),), ((1, 30), (2, 5)), ((1, 1), (2, 1)), ((2, 1), (1, 19)), ((2, 1),), ((1, 1), (2, 1)),
)  # fmt: skip


class Group:
    """Ranks that take the schedule's steps."""

    def __init__(self, path: Path) -> None:
        self.ranks = Ranks(path, SIZE, dtype="float32")
        self.begin()

    def begin(self) -> None:
        self.texts = {1: Text(1, [*TOKENS, 7], [5, 6, 7]), 2: Text(2, TOKENS[::-1], [9, 3])}

    def pieces(self, step: int) -> list[SequenceSlice]:
        return [self.texts[number].piece(count, sample=GREEDY) for number, count in SCHEDULE[step]]

    def take(self, step: int) -> tuple[int, list[int]]:
        """A whole step, booked: its fingerprint and tokens."""
        pieces = self.pieces(step)
        output = self.ranks.step(*pieces)
        for (number, _), piece in zip(SCHEDULE[step], pieces, strict=True):
            self.texts[number].book(piece)
        return output.fingerprint, [sampled.token for sampled in output.sampled]

    def spoil(self, slots: list[int]) -> None:
        with torch.inference_mode():
            for part in self.states():
                part[slots] = torch.nan

    def states(self) -> list[Tensor]:
        """Every part of every layer's states on every rank, each [slots, ...]."""
        caches = [runner.cache for runner in self.ranks.runners]
        return [
            part
            for cache in caches
            if cache is not None
            for layer in cache.layers
            if isinstance(layer, StateCache)
            for part in layer.parts.values()
        ]


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Group, Group]]:
    """One to disturb, and one that is not."""
    path = write_random(
        tmp_path_factory.mktemp("model"), Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig(**SMALL), dtype="float32"
    )
    one, other = Group(path), Group(path)
    with one.ranks, other.ranks:
        yield one, other


def written(pieces: list[SequenceSlice]) -> list[int]:
    return [piece.state.write for piece in pieces]


def read(pieces: list[SequenceSlice]) -> list[int]:
    return [piece.state.read for piece in pieces]


def test_a_step_cut_off_at_any_collective_of_any_rank_is_repeated_to_the_bit(groups: tuple[Group, Group]) -> None:
    disturbed, quiet = groups
    disturbed.begin()
    quiet.begin()
    for step in range(len(SCHEDULE)):
        pieces = disturbed.pieces(step)
        before = [part[read(pieces)].clone() for part in disturbed.states()]
        collectives = disturbed.ranks.cut_off(*pieces, rank=0, at=NEVER, after=False)
        assert collectives == 2 + 2 * SMALL["num_hidden_layers"]
        for rank, at, after in itertools.product(range(SIZE), range(collectives), (False, True)):
            disturbed.spoil(written(pieces))  # what is not written harms
            assert disturbed.ranks.cut_off(*pieces, rank=rank, at=at, after=after) == at
            for part, was in zip(disturbed.states(), before, strict=True):
                assert torch.equal(part[read(pieces)], was), f"step {step} changed what it read"
        assert disturbed.take(step) == quiet.take(step), f"step {step} was not the same"
        for mine, theirs in zip(disturbed.states(), quiet.states(), strict=True):
            assert torch.equal(mine[written(pieces)], theirs[written(pieces)]), f"step {step} left another state"


FAULTS = st.lists(
    st.tuples(st.integers(0, SIZE - 1), st.integers(0, 9), st.booleans()), max_size=3
)  # rank, collective, after it


@given(faults=st.lists(FAULTS, min_size=len(SCHEDULE), max_size=len(SCHEDULE)))
@settings(deadline=None, max_examples=15)
def test_faults_in_any_steps_change_nothing(
    groups: tuple[Group, Group], faults: list[list[tuple[int, int, bool]]]
) -> None:
    """The slots of one life are full of what the lives before it left there."""
    disturbed, quiet = groups
    disturbed.begin()
    quiet.begin()
    for step, cuts in enumerate(faults):
        for rank, at, after in cuts:
            disturbed.ranks.cut_off(*disturbed.pieces(step), rank=rank, at=at, after=after)
        assert disturbed.take(step) == quiet.take(step)
