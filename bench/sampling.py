"""Sampling one token of each sequence from a vocabulary of 151,936 words, as rank 0 does after every step.

The peer draws the same tokens row by row. Both get logits that stand in memory, as the head leaves them, on one thread;
they take turns, and medians of the thread's CPU time are reported. That both draw the same tokens is checked.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Final

import torch
from bench.report import Row, report
from torch import Tensor

from lockstep_runtime.protocol.step import SampledToken, SamplingParams
from lockstep_runtime.worker.sampler import Draw, sample

VOCABULARY: Final = 151_936  # Qwen3's
PEER: Final = "row by row"
CASES: Final = {
    "thinking defaults: T 0.6, top_k 20, top_p 0.95": [SamplingParams(temperature=0.6, top_k=20, top_p=0.95)],
    "other defaults: T 0.7, top_k 20, top_p 0.8": [SamplingParams(temperature=0.7, top_k=20, top_p=0.8)],
    "greedy, those defaults, top_p alone, top_k 50": [
        SamplingParams(temperature=0),
        SamplingParams(temperature=0.6, top_k=20, top_p=0.95),
        SamplingParams(temperature=0.6, top_p=0.9),
        SamplingParams(top_k=50),
    ],
    "top_p alone: T 0.6, top_p 0.9": [SamplingParams(temperature=0.6, top_p=0.9)],
    "the whole vocabulary: T 1": [SamplingParams()],
    "thinking defaults, 5 log probabilities": [SamplingParams(temperature=0.6, top_k=20, top_p=0.95, logprobs=5)],
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    arguments.add_argument("--rounds", type=int, default=9)
    options = arguments.parse_args()
    torch.set_num_threads(1)
    with torch.inference_mode():
        rows = [
            row
            for batch in options.batches
            for case, kinds in CASES.items()
            for row in compare(case, kinds, batch, options.rounds)
        ]
    report("sampling", rows)


def compare(case: str, kinds: list[SamplingParams], batch: int, rounds: int) -> list[Row]:
    logits = logits_like_a_models(batch)
    draws = [Draw(row, 100 + row, kinds[row % len(kinds)]) for row in range(batch)]
    together, alone = [], []
    for _ in range(rounds):
        seconds, tokens = timed(lambda: sample(logits, draws))
        together.append(seconds)
        seconds, others = timed(lambda: one_by_one(logits, draws))
        alone.append(seconds)
        if [one.token for one in tokens] != [one.token for one in others]:
            raise RuntimeError("a row's draw depends on its company")
    value, peer_value = (1000 * statistics.median(times) for times in (together, alone))
    case = f"batch {batch}, {case}"
    return [Row(case=case, metric="CPU time of a step", value=value, unit="ms", peer=PEER, peer_value=peer_value)]


def logits_like_a_models(batch: int) -> Tensor:
    """Of different sharpness: from 50 tokens that stand out to one that leads."""
    generator = torch.Generator().manual_seed(batch)
    logits = torch.randn(batch, VOCABULARY, generator=generator) * 2.5
    logits[:, :50] += torch.rand(batch, 50, generator=generator) * torch.linspace(4, 30, batch)[:, None]
    return logits


def one_by_one(logits: Tensor, draws: list[Draw]) -> list[SampledToken]:
    return [token for row, draw in enumerate(draws) for token in sample(logits[row : row + 1], [draw])]


def timed(work: Callable[[], list[SampledToken]]) -> tuple[float, list[SampledToken]]:
    began = time.thread_time()
    found = work()
    return time.thread_time() - began, found


if __name__ == "__main__":
    main()
