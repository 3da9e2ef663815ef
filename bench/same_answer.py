"""How often a draw is another one because its logits were rounded otherwise: after a repair, and in other company.

A sequence is decoded token by token. The same tokens are then fed again in two ways that round otherwise: the context
computed again in one chunk before every 32 tokens, as after a fault that spoils the KV cache; and the tokens decoded in
a batch of eight. Both give other logits for the same next token, and the odds that these change it are computed, not
counted, from each pair of distributions over the vocabulary (tests/support/odds.py). The peer is a draw that looks a
uniform number up in the cumulated probabilities. Greedy choices that differ are counted.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import torch
from bench.ranks import model_directory
from bench.report import Row, report
from tests.support.odds import of_gumbel_draws, of_lookups
from tests.support.ranks import piece
from torch import Tensor

from lockstep_runtime.distributed.join import SingleCommunicator
from lockstep_runtime.layers.batch import build_batch
from lockstep_runtime.layers.cache import BLOCK_SIZE, CacheSize, KVCache
from lockstep_runtime.layers.placement import choose_placement
from lockstep_runtime.models.registry import build_model
from lockstep_runtime.protocol.step import SamplingParams, SequenceSlice
from lockstep_runtime.sources.model_folder import read_config
from lockstep_runtime.weights.load import load_weights
from lockstep_runtime.weights.sharding import RankInfo
from lockstep_runtime.worker.sampler import Draw, sample

CPU: Final = torch.device("cpu")
TINY_CHAT: Final = Path(__file__).parents[1] / "examples" / "tiny-chat"
PROMPT: Final = 64  # tokens
COMPANY: Final = 8  # sequences in the other batch
TEMPERATURES: Final = (0.6, 1.0, 1.5)
RECOMPUTED_EVERY: Final = 32  # tokens
PEER: Final = "cumulated probabilities"
Odds = Callable[[Tensor, Tensor, float], float]


class Model:
    """One rank that has the whole model, with a KV cache for a few sequences."""

    def __init__(self, directory: Path, dtype: torch.dtype, tokens: int) -> None:
        settings, placement = read_config(directory), choose_placement(CPU, dtype)
        self._model = build_model(settings, RankInfo(0, 1), placement)
        load_weights(directory, self._model.weights(), lambda done, total: None)
        self._model.loaded()
        self.vocabulary = self._model.vocabulary
        self._blocks = -(-(PROMPT + tokens) // BLOCK_SIZE)
        self._cache = KVCache(self._model.cache_shape, CacheSize(blocks=COMPANY * self._blocks), placement)

    def slice_of(self, sequence: int, position: int, tokens: Sequence[int]) -> SequenceSlice:
        first = sequence * self._blocks
        return piece(sequence, position, list(tokens), list(range(first, first + self._blocks)))

    def logits(self, *sequences: SequenceSlice) -> Tensor:
        """Of the first sequence's last token: [vocabulary], float32."""
        batch = build_batch(list(sequences), CPU)
        states = self._model.forward(batch, self._cache, SingleCommunicator())[batch.last]
        logits = self._model.logits(states, SingleCommunicator())
        assert logits is not None
        return logits[0]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--tokens", type=int, default=256, help="that are drawn")
    arguments.add_argument("--threads", type=int, default=2)
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    models = {"tiny-chat, 2,048 words": TINY_CHAT, "0.6B shape, 151,936 words": model_directory()}
    rows: list[Row] = []
    for name, directory in models.items():
        for dtype in (torch.float32, torch.bfloat16):
            with torch.inference_mode():
                model = Model(directory, dtype, options.tokens)
                rows += measure(f"{name}, {str(dtype).removeprefix('torch.')}", model, options.tokens)
            print(f"measured: {name}, {dtype}", flush=True)
    report("same_answer", rows)


def measure(case: str, model: Model, tokens: int) -> list[Row]:
    prompts = [prompt_of(model.vocabulary, seed) for seed in range(COMPANY)]
    drawn, first = decode(model, prompts[0], tokens)
    others = {
        "context computed again": again(model, prompts[0], drawn),
        f"in a batch of {COMPANY}": in_company(model, prompts, drawn),
    }
    return [row for cause, logits in others.items() for row in compare(f"{case}, {cause}", first, logits)]


def prompt_of(vocabulary: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    found: list[int] = torch.randint(0, vocabulary, (PROMPT,), generator=generator).tolist()
    return found


def decode(model: Model, prompt: list[int], tokens: int) -> tuple[list[int], list[Tensor]]:
    """Draw at temperature 1; returns the tokens and the logits that each was drawn from."""
    drawn: list[int] = []
    logits = [model.logits(model.slice_of(0, 0, prompt))]
    for count in range(tokens):
        (token,) = sample(logits[-1][None], [Draw(0, count, SamplingParams(seed=1))])
        drawn.append(token.token)
        if count < tokens - 1:
            logits.append(model.logits(model.slice_of(0, PROMPT + count, drawn[-1:])))
    return drawn, logits


def again(model: Model, prompt: list[int], drawn: list[int]) -> list[Tensor]:
    """The same tokens' logits, with the context computed in one chunk before every so many."""
    logits = []
    for count in range(len(drawn)):
        fed = [*prompt, *drawn[:count]] if count % RECOMPUTED_EVERY == 0 else drawn[count - 1 : count]
        logits.append(model.logits(model.slice_of(0, PROMPT + count - len(fed), fed)))
    return logits


def in_company(model: Model, prompts: list[list[int]], drawn: list[int]) -> list[Tensor]:
    """The same tokens' logits when other sequences are decoded with them."""
    logits = [model.logits(*(model.slice_of(row, 0, prompt) for row, prompt in enumerate(prompts)))]
    for count, token in enumerate(drawn[:-1]):
        fed = [token, *(1 + row for row in range(1, COMPANY))]
        logits.append(model.logits(*(model.slice_of(row, PROMPT + count, [one]) for row, one in enumerate(fed))))
    return logits


def compare(case: str, first: list[Tensor], second: list[Tensor]) -> list[Row]:
    pairs = list(zip(first, second, strict=True))[
        RECOMPUTED_EVERY:
    ]  # before, nothing that was decoded is computed again
    apart = max(float((one - other).abs().max()) for one, other in pairs)
    greedy = sum(int(one.argmax() != other.argmax()) for one, other in pairs) / len(pairs)
    return [
        Row(case=case, metric="logits differ by", value=apart, unit="at most"),
        Row(case=case, metric="greedy", value=1000 * greedy, unit="of 1,000 tokens"),
        *(
            Row(
                case=case,
                metric=f"temperature {temperature}",
                value=1000 * mean(of_gumbel_draws, pairs, temperature),
                unit="of 1,000 tokens",
                peer=PEER,
                peer_value=1000 * mean(of_lookups, pairs, temperature),
            )
            for temperature in TEMPERATURES
        ),
    ]


def mean(odds: Odds, pairs: list[tuple[Tensor, Tensor]], temperature: float) -> float:
    return statistics.fmean(odds(one, other, temperature) for one, other in pairs)


if __name__ == "__main__":
    main()
