"""Log probabilities of tokens that are known: a prompt's own. On rank 0; every rank takes part in the head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

import torch
from torch import Tensor

from lockstep_runtime.layers.batch import Batch
from lockstep_runtime.protocol.step import SampledToken, Scoring, SequenceSlice
from lockstep_runtime.worker.likeliest import check_finite

ROWS: Final = 64  # whose logits are held at once: with 150,000 words 40 MB

Head = Callable[[Tensor], Tensor | None]  # [n, hidden] -> logits [n, vocabulary] in float32; None on other ranks


def check_scoring(sequences: Sequence[SequenceSlice], vocabulary: int) -> None:
    """
    Raises:
        ValueError: more targets than tokens, or one beyond the vocabulary.
    """
    for sequence in sequences:
        scoring = sequence.scoring
        if scoring is None:
            continue
        if scoring.first < 0 or scoring.first + len(scoring.targets) > len(sequence.tokens):
            raise ValueError(f"sequence {sequence.sequence_id}: {len(scoring.targets)} targets from {scoring.first} on")
        if not all(0 <= target < vocabulary for target in scoring.targets):
            raise ValueError(f"sequence {sequence.sequence_id}: a target beyond the vocabulary's {vocabulary}")


def score(sequences: Sequence[SequenceSlice], batch: Batch, states: Tensor, head: Head) -> list[SampledToken]:
    """states: [tokens, hidden], of the whole batch. All targets' log probabilities, in order; none on other ranks.

    Raises:
        NonFiniteError: NaN or infinity in the logits.
    """
    scored: list[SampledToken] = []
    for sequence, segment in zip(sequences, batch.segments, strict=True):
        if sequence.scoring is None:
            continue
        for first, targets in _pieces(sequence.scoring):
            start = segment.start + first
            logits = head(states[start : start + len(targets)])
            if logits is not None:
                check_finite(logits)
                scored += _describe(logits, targets, sequence.sequence_id, sequence.scoring.logprobs)
    return scored


def _pieces(scoring: Scoring) -> Iterator[tuple[int, list[int]]]:
    for start in range(0, len(scoring.targets), ROWS):
        yield scoring.first + start, scoring.targets[start : start + ROWS]


def _describe(logits: Tensor, targets: list[int], sequence_id: int, most: int) -> list[SampledToken]:
    """logits: [targets, vocabulary]."""
    logprobs = logits.log_softmax(dim=1)
    own = logprobs.gather(1, torch.tensor(targets, device=logits.device)[:, None])[:, 0].tolist()
    best = logprobs.topk(min(most, logprobs.shape[1]), dim=1)
    rows = zip(targets, own, best.indices.tolist(), best.values.tolist(), strict=True)
    return [
        SampledToken(sequence_id=sequence_id, token=token, logprob=value, top=_with(token, value, ids, values))
        for token, value, ids, values in rows
    ]


def _with(token: int, logprob: float, ids: list[int], values: list[float]) -> list[tuple[int, float]]:
    """The likeliest, and after them the token itself if it is none of them."""
    top = list(zip(ids, values, strict=True))
    return [*top, (token, logprob)] if ids and token not in ids else top
