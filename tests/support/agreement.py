"""A model that is split over ranks, held against transformers', in every way in which its tokens may come to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from tests.support.ranks import Ranks
from torch import Tensor

from lockstep_runtime.protocol.step import SampledToken, SamplingParams, Scoring, SequenceSlice, StateSlots

TOLERANCE: Final = 1e-4  # of a log probability, in float32
ROUNDING: Final = 1.25  # times transformers' own: partial sums of several ranks are rounded, too
GREEDY: Final = SamplingParams(temperature=0)
STEPS: Final = 200  # of a greedy answer
PROMPT: Final = 21  # tokens of the prompt before it


class Oracle:
    """transformers' model of the checkpoint in `path`, computing in `dtype`."""

    def __init__(self, path: Path, kind: Any, dtype: torch.dtype = torch.float32) -> None:
        self.path = path
        # its default for experts refuses odd sizes
        self._model = kind.from_pretrained(path, dtype=dtype, experts_implementation="eager").eval()
        self.vocabulary: int = self._model.config.get_text_config().vocab_size

    def logprobs(self, tokens: list[int]) -> Tensor:
        """[tokens, vocabulary], float32."""
        with torch.inference_mode():
            logits: Tensor = self._model(torch.tensor([tokens])).logits[0]
            return logits.float().log_softmax(-1)

    @cached_property
    def answer(self) -> list[int]:
        """Greedy, to `prompt(PROMPT)`, step by step."""
        tokens, kept, drawn = torch.tensor([self.prompt(PROMPT)]), None, []
        with torch.inference_mode():
            for _ in range(STEPS):
                out = self._model(tokens, past_key_values=kept, use_cache=True)
                kept, tokens = out.past_key_values, out.logits[:, -1:].argmax(-1)
                drawn.append(int(tokens))
        return drawn

    def prompt(self, length: int, seed: int = 0) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        drawn: list[int] = torch.randint(0, self.vocabulary, (length,), generator=generator).tolist()
        return drawn


class Text:
    """One sequence on the ranks: its tokens, its blocks, its slots of recurrent state, and how far it has come."""

    def __init__(self, number: int, tokens: list[int], blocks: list[int]) -> None:
        self.number, self.tokens = number, tokens
        self.begin(blocks, number)

    def begin(self, blocks: list[int], pair: int) -> None:
        """Anew, as one that was preempted: it is computed again from its tokens, elsewhere."""
        self.position, self.blocks = 0, blocks
        self._written, self._other = 2 * pair - 1, 2 * pair
        self._read = 0

    def piece(self, count: int, vocabulary: int = 0, sample: SamplingParams | None = None) -> SequenceSlice:
        """The next tokens; with a vocabulary, all log probabilities after each of them."""
        tokens = self.tokens[self.position : self.position + count]
        scoring = Scoring(first=0, targets=[0] * len(tokens), logprobs=vocabulary) if vocabulary else None
        return SequenceSlice(
            sequence_id=self.number, position=self.position, tokens=tokens, blocks=self.blocks, sample=sample,
            scoring=scoring, state=StateSlots(self._read, self._written),
        )  # fmt: skip

    def book(self, piece: SequenceSlice) -> None:
        """The piece's step is done."""
        self.position += len(piece.tokens)
        self._read, self._written, self._other = self._written, self._other, self._written


class Comparison:
    """Feeds texts to the ranks and compares every token's distribution with the oracle's."""

    def __init__(self, ranks: Ranks, oracle: Oracle) -> None:
        self.ranks, self.oracle = ranks, oracle
        self._expected: dict[int, Tensor] = {}  # by text: [tokens, vocabulary]

    def text(self, number: int, length: int, blocks: list[int]) -> Text:
        return Text(number, self.oracle.prompt(length, number), blocks)

    def feed(self, *parts: tuple[Text, int]) -> None:
        """One step of so many tokens of each text."""
        pieces = [text.piece(count, self.oracle.vocabulary) for text, count in parts]
        found = self._found(pieces)
        for (text, _), piece in zip(parts, pieces, strict=True):
            text.book(piece)
            if text.number not in self._expected:
                self._expected[text.number] = self.oracle.logprobs(text.tokens)
            expected = self._expected[text.number][piece.position : text.position]
            torch.testing.assert_close(found[text.number], expected, atol=TOLERANCE, rtol=0)

    def repeat(self, *parts: tuple[Text, int]) -> None:
        """The same step twice, as after a fault: the same bits; then as `feed`."""
        pieces = [text.piece(count, self.oracle.vocabulary) for text, count in parts]
        first, second = self._found(pieces), self._found(pieces)
        assert all(torch.equal(first[number], second[number]) for number in first), "a repeated step gave other bits"
        self.feed(*parts)

    def _found(self, pieces: list[SequenceSlice]) -> dict[int, Tensor]:
        """By sequence: [tokens, vocabulary]."""
        rows: dict[int, list[Tensor]] = {}
        for scored in self.ranks.step(*pieces).scored:
            rows.setdefault(scored.sequence_id, []).append(dense(scored, self.oracle.vocabulary))
        return {number: torch.stack(found) for number, found in rows.items()}

    def greedy(self, steps: int, blocks: list[int]) -> list[int]:
        """The answer to the oracle's prompt, token by token."""
        text = Text(1, self.oracle.prompt(PROMPT), blocks)
        for _ in range(steps):
            piece = text.piece(len(text.tokens) - text.position, sample=GREEDY)
            output = self.ranks.step(piece)
            text.book(piece)
            text.tokens = [*text.tokens, output.sampled[0].token]
        return text.tokens[PROMPT:]


def dense(scored: SampledToken, vocabulary: int) -> Tensor:
    """Its log probabilities by token."""
    tokens, values = zip(*scored.top, strict=True)
    out = torch.full((vocabulary,), float("nan"))
    out[list(tokens)] = torch.tensor(values)
    return out


def whole(compare: Comparison) -> None:
    compare.feed((compare.text(1, 75, [5, 6, 7]), 75))


def chunked(compare: Comparison) -> None:
    text = compare.text(2, 90, [9, 3, 17])
    for count in (33, 1, 40, 16):
        compare.feed((text, count))


def batched(compare: Comparison) -> None:
    """Prompts, chunks and single tokens mixed, in any order."""
    one, two, three = (
        compare.text(3, 60, [1, 2]), compare.text(4, 45, [20, 8]), compare.text(5, 9, [11])
    )  # fmt: skip
    compare.feed((one, 30))
    compare.feed((two, 40), (one, 1))
    compare.feed((one, 28), (three, 5), (two, 1))
    compare.feed((three, 1), (two, 1), (one, 1))


def step_by_step(compare: Comparison) -> None:
    text = compare.text(6, 12, [4])
    for _ in text.tokens:
        compare.feed((text, 1))


def preempted(compare: Comparison) -> None:
    """Computed again from its tokens, after another sequence has written where its context was."""
    text, other = compare.text(7, 80, [12, 13, 14]), compare.text(8, 70, [13, 12, 14])
    for count in (60, 1, 1):
        compare.feed((text, count))
    other.begin(other.blocks, text.number)
    compare.feed((other, 70))
    text.begin([15, 14, 2], other.number)
    for count in (40, 22, 1, 1):
        compare.feed((text, count))


def repeated(compare: Comparison) -> None:
    text, other = compare.text(9, 50, [16, 18]), compare.text(10, 8, [19])
    compare.repeat((text, 40))
    compare.repeat((text, 1), (other, 5))
    compare.repeat((other, 1), (text, 2))


def greedy(compare: Comparison) -> None:
    assert compare.greedy(STEPS, list(range(21, 29))) == compare.oracle.answer


WAYS: Final[Mapping[str, Callable[[Comparison], None]]] = {
    way.__name__: way for way in (whole, chunked, batched, step_by_step, preempted, repeated, greedy)
}


def agree(oracle: Oracle, size: int) -> None:
    """In every way, split over `size` ranks.

    Raises:
        AssertionError: they don't; it names the way.
    """
    with Ranks(oracle.path, size, dtype="float32") as ranks:
        for name, way in WAYS.items():
            try:
                way(Comparison(ranks, oracle))
            except AssertionError as error:
                raise AssertionError(f"{name}, {size} ranks: {error}") from error


def agree_in_bfloat16(path: Path, kind: Any, size: int) -> None:
    """What is computed with weights in bfloat16 is as near to what they give in float32 as transformers' own is."""
    error, theirs = (_rms(errors) for errors in errors_in_bfloat16(path, kind, size))
    print(f"root mean square of the error: {error:.2g}, transformers' {theirs:.2g}")
    assert error < ROUNDING * theirs


def errors_in_bfloat16(path: Path, kind: Any, size: int) -> tuple[Tensor, Tensor]:
    """Ours and transformers': of every token's log probabilities, [tokens, vocabulary]."""
    exact, rounded = Oracle(path, kind), Oracle(path, kind, torch.bfloat16)
    tokens = exact.prompt(75)
    expected = exact.logprobs(tokens)
    with Ranks(path, size, dtype="bfloat16") as ranks:
        scored = ranks.step(Text(1, tokens, [5, 6, 7]).piece(len(tokens), exact.vocabulary)).scored
    mine = torch.stack([dense(one, exact.vocabulary) for one in scored])
    return mine - expected, rounded.logprobs(tokens) - expected


def _rms(errors: Tensor) -> float:
    return float(errors.square().mean().sqrt())
