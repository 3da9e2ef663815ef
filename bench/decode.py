"""Decoding a Qwen3-0.6B shape in bfloat16 on CPUs: two ranks of one thread, beside transformers with two threads.

Ours is the workers' real step path, `Runner.step` over shared memory in one process per rank, fed by a loop that does
what an engine must: it waits for rank 0's tokens before it sends the next step. transformers runs `generate`. Both get
the same prompts, and decode greedily or with Qwen3's own defaults. The two take turns, so that a busy machine slows
both, and medians are reported. A decode rate leaves out the first token, whose time stands apart.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import torch
from bench.ranks import GREEDY, Child, Ranks, answer_orders, config, done, model_directory, start
from bench.report import Row, report

from lockstep_runtime.config import ServeConfig
from lockstep_runtime.protocol import bus
from lockstep_runtime.protocol.step import SamplingParams

PROMPT = 128
SEQUENCES = 16  # at once
PEER = "transformers generate, 2 threads"
SAMPLING: Final = {
    "greedy": GREEDY,
    "sampled": SamplingParams(temperature=0.6, top_k=20, top_p=0.95),
}  # Qwen3's defaults


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--batches", type=int, nargs="+", default=[1, 8, 16])
    arguments.add_argument("--tokens", type=int, default=32, help="decoded per run, after the first")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--sampling", choices=SAMPLING, nargs="+", default=list(SAMPLING))
    options = arguments.parse_args()
    model = model_directory()
    with closing(Ranks(serve_rank, config(model))) as ours, closing(Child(serve_transformers, model)) as theirs:
        theirs.receive()
        rows = [
            row
            for sampling in options.sampling
            for batch in options.batches
            for row in compare(ours, theirs, batch, options.tokens, options.rounds, sampling)
        ]
    report("decode", rows)


def compare(ours: Ranks, theirs: Child, batch: int, tokens: int, rounds: int, sampling: str = "greedy") -> list[Row]:
    prompts = torch.randint(0, 150_000, (batch, PROMPT), generator=torch.Generator().manual_seed(batch)).tolist()
    mine: list[tuple[float, float]] = []
    other: list[tuple[float, float]] = []
    for _ in range(rounds):
        mine.append(run_ranks(ours, prompts, tokens, SAMPLING[sampling]))
        other.append(run_transformers(theirs, prompts, tokens, SAMPLING[sampling]))
        print(
            f"{sampling}, batch {batch}: {batch * tokens / mine[-1][1]:.1f} tok/s, "
            f"{PEER} {batch * tokens / other[-1][1]:.1f} tok/s",
            flush=True,
        )
    first, rest = (statistics.median(run[part] for run in mine) for part in (0, 1))
    their_first, their_rest = (statistics.median(run[part] for run in other) for part in (0, 1))
    case = f"{sampling}, batch {batch}"
    rate, their_rate = batch * tokens / rest, batch * tokens / their_rest
    return [
        Row(case=case, metric="decode", value=rate, unit="tok/s", peer=PEER, peer_value=their_rate),
        Row(case=case, metric="first token", value=first, unit="s", peer=PEER, peer_value=their_first),
    ]


def run_ranks(ranks: Ranks, prompts: list[list[int]], tokens: int, params: SamplingParams) -> tuple[float, float]:
    """Seconds to the first token of every prompt, and for `tokens` more of each."""
    started = time.perf_counter()
    last = ranks.take(ranks.next_step(prompts, 0, params=params))
    first = time.perf_counter()
    for count in range(tokens):
        last = ranks.take(ranks.next_step([[token] for token in last], PROMPT + count, params=params))
    return first - started, time.perf_counter() - first


def serve_rank(pipe: Connection, config: ServeConfig, rank: int, address: str) -> None:
    runner, _, group = start(config, rank, address, SEQUENCES)
    answer_orders(pipe, bus.Step, lambda step: done(step, runner.step(step, group)))


def run_transformers(
    child: Child, prompts: list[list[int]], tokens: int, params: SamplingParams
) -> tuple[float, float]:
    """The same of `generate`."""
    child.pipe.send((prompts, tokens, options_of(params)))
    first, rest = child.receive()
    return first, rest


def serve_transformers(pipe: Connection, model: Path, kind: str = "Qwen3ForCausalLM") -> None:
    """With its own defaults: SDPA attention, a dynamic cache."""
    import transformers

    torch.set_num_threads(2)
    oracle = getattr(transformers, kind).from_pretrained(model, dtype=torch.bfloat16)
    pipe.send("ready")
    while True:
        try:
            prompts, tokens, options = pipe.recv()
        except EOFError:
            return
        pipe.send(_timed_generate(oracle, torch.tensor(prompts), 1 + tokens, options))


def options_of(params: SamplingParams) -> dict[str, Any]:
    """What `generate` is asked for."""
    if params.temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": params.temperature, "top_k": params.top_k, "top_p": params.top_p}


def _timed_generate(oracle: Any, inputs: torch.Tensor, tokens: int, options: dict[str, Any]) -> tuple[float, float]:
    """Seconds to the first token and for the others."""
    mask, times = torch.ones_like(inputs), Times()
    started = time.perf_counter()
    with torch.inference_mode():
        oracle.generate(
            inputs,
            attention_mask=mask,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            streamer=times,
            **options,
        )
    _, first, *_, last = times.put_at  # the prompt is put, too
    return first - started, last - first


class Times:
    """A streamer, as `generate` calls it: when each token was put."""

    def __init__(self) -> None:
        self.put_at: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.put_at.append(time.perf_counter())

    def end(self) -> None: ...


if __name__ == "__main__":
    main()
