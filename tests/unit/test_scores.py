"""The log probabilities of a prompt's own tokens, held against transformers'."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.support.models import ModelShape, write_model
from tests.support.ranks import Ranks, piece
from transformers import Qwen3ForCausalLM

from lockstep_runtime.protocol.step import SampledToken, SamplingParams, Scoring, SequenceSlice
from lockstep_runtime.worker.scores import ROWS

GREEDY = SamplingParams(temperature=0)
VOCABULARY = 257


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), ModelShape(vocabulary=VOCABULARY))


def prompt_of(length: int) -> list[int]:
    drawn: list[int] = torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(3)).tolist()
    return drawn


def scored_piece(id: int, prompt: list[int], start: int, end: int, blocks: list[int], most: int) -> SequenceSlice:
    """A chunk of a prompt with everything in it to be scored."""
    scoring = Scoring(first=0, targets=prompt[start + 1 : end + 1], logprobs=most)
    return SequenceSlice(
        sequence_id=id,
        position=start,
        tokens=prompt[start:end],
        blocks=blocks,
        sample=GREEDY if end == len(prompt) else None,
        scoring=scoring,
    )


def holds(scored: list[SampledToken], prompt: list[int], model: Path, most: int) -> None:
    oracle = Qwen3ForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.inference_mode():
        logprobs = oracle(torch.tensor([prompt])).logits[0].log_softmax(-1)
    assert [one.token for one in scored] == prompt[1:]
    for row, one in enumerate(scored):
        assert one.logprob == pytest.approx(float(logprobs[row, one.token]), abs=1e-4)
        best = dict(one.top)
        assert len(best) in (most, most + (most > 0))
        if most:
            assert best[one.token] == one.logprob
            assert max(best.values()) == pytest.approx(float(logprobs[row].max()), abs=1e-4)
            assert max(best.values()) == one.top[0][1]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("most", [0, 1, 5])
def test_a_prompt_in_one_piece_or_in_chunks_is_scored_as_transformers_does(model: Path, ranks: int, most: int) -> None:
    prompt = prompt_of(2 * ROWS + 22)
    blocks = list(range(5))
    with Ranks(model, ranks, blocks=16) as group:
        whole = group.step(scored_piece(1, prompt, 0, len(prompt), blocks, most))
        assert [one.sequence_id for one in whole.sampled] == [1]
        chunks: list[SampledToken] = []
        for start, end in ((0, 1), (1, 40), (40, 41), (41, 130), (130, len(prompt))):
            chunks += group.step(scored_piece(2, prompt, start, end, [5, 6, 7, 8, 9], most)).scored
    holds(whole.scored, prompt, model, most)
    holds(chunks, prompt, model, most)


def test_beside_others_and_from_the_middle_on(model: Path) -> None:
    prompt = prompt_of(30)
    part = SequenceSlice(
        sequence_id=2,
        position=0,
        tokens=prompt,
        blocks=[1],
        sample=GREEDY,
        scoring=Scoring(first=10, targets=prompt[11:], logprobs=1),
    )
    with Ranks(model, 2, blocks=8) as group:
        alone = group.step(scored_piece(2, prompt, 0, 30, [1], 1)).scored
        output = group.step(piece(1, 0, [5, 6], [0], GREEDY), part, piece(3, 0, [7], [2]))
    assert [one.sequence_id for one in output.sampled] == [1, 2]
    assert [(one.token, one.sequence_id) for one in output.scored] == [(token, 2) for token in prompt[11:]]
    for one, other in zip(output.scored, alone[10:], strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-5)


@pytest.mark.parametrize(("first", "targets"), [(1, [1, 2]), (-1, [1]), (0, [VOCABULARY]), (0, [-1])])
def test_what_can_not_be_scored_is_refused_before_any_collective(model: Path, first: int, targets: list[int]) -> None:
    bad = SequenceSlice(
        sequence_id=1, position=0, tokens=[5, 6], blocks=[0], scoring=Scoring(first=first, targets=targets, logprobs=0)
    )
    with Ranks(model, 1, blocks=4) as group:
        with pytest.raises(ValueError, match="sequence 1"):
            group.step(bad)
        assert group.step(piece(2, 0, [5], [0], GREEDY)).scored == []
