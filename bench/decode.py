"""Decoding a Qwen3-0.6B shape in bfloat16 on CPUs: two ranks of one thread, beside transformers with two threads.

Ours is the workers' real step path, `Runner.step` over shared memory in one process per rank, fed by a loop that does
what an engine must: it waits for rank 0's tokens before it sends the next step. transformers runs `generate`. Both get
the same prompts and decode greedily. The two take turns, so that a busy machine slows both, and medians are reported. A
decode rate leaves out the first token, whose time stands apart.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
import torch
from bench.report import OUTPUT, Row, report
from tests.support.models import QWEN3_0_6B, write_model

from lockstep_runtime import wire
from lockstep_runtime.config import EngineLimits, ServeConfig
from lockstep_runtime.parallel.group import join, open_rendezvous
from lockstep_runtime.worker.runner import Runner

RANKS = 2
PROMPT = 128
PEER = "transformers generate, 2 threads"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--batches", type=int, nargs="+", default=[1, 8, 16])
    arguments.add_argument("--tokens", type=int, default=32, help="decoded per run, after the first")
    arguments.add_argument("--rounds", type=int, default=3)
    options = arguments.parse_args()
    model = model_directory()
    ours, theirs = Lockstep(model), Transformers(model)
    try:
        rows = [
            row for batch in options.batches for row in compare(ours, theirs, batch, options.tokens, options.rounds)
        ]
    finally:
        ours.close()
        theirs.close()
    report("decode", rows)


def compare(ours: Lockstep, theirs: Transformers, batch: int, tokens: int, rounds: int) -> list[Row]:
    prompts = torch.randint(0, 150_000, (batch, PROMPT), generator=torch.Generator().manual_seed(batch)).tolist()
    mine: list[tuple[float, float]] = []
    other: list[tuple[float, float]] = []
    for _ in range(rounds):
        mine.append(ours.run(prompts, tokens))
        other.append(theirs.run(prompts, tokens))
        print(
            f"batch {batch}: {batch * tokens / mine[-1][1]:.1f} tok/s, "
            f"{PEER} {batch * tokens / other[-1][1]:.1f} tok/s",
            flush=True,
        )
    first, rest = (statistics.median(run[part] for run in mine) for part in (0, 1))
    their_first, their_rest = (statistics.median(run[part] for run in other) for part in (0, 1))
    case = f"batch {batch}"
    rate, their_rate = batch * tokens / rest, batch * tokens / their_rest
    return [
        Row(case=case, metric="decode", value=rate, unit="tok/s", peer=PEER, peer_value=their_rate),
        Row(case=case, metric="first token", value=first, unit="s", peer=PEER, peer_value=their_first),
    ]


def model_directory() -> Path:
    """The generated checkpoint, made once and kept."""
    directory = OUTPUT / "models" / "qwen3-0.6b"
    if not (directory / "model.safetensors").exists():
        write_model(directory, QWEN3_0_6B)
    return directory


class Child:
    """A process that answers calls, one at a time."""

    def __init__(self, serve: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, end = context.Pipe()
        self.process = context.Process(target=serve, args=(end, *arguments), daemon=True)
        self.process.start()
        end.close()

    def receive(self, timeout: float = 600.0) -> Any:
        if not self.pipe.poll(timeout):
            raise TimeoutError(f"no answer in {timeout} s")
        return self.pipe.recv()

    def close(self) -> None:
        self.pipe.close()
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()


class Lockstep:
    """Two ranks, and the least of an engine."""

    def __init__(self, model: Path) -> None:
        config = ServeConfig(
            model=str(model), served_name="bench", tensor_parallel_size=RANKS, ranks_per_pod=RANKS, backend="gloo",
            threads_per_rank=1, limits=EngineLimits(kv_cache_bytes=1 << 30),
        )  # fmt: skip
        self._meeting = open_rendezvous(config, 1)
        self._ranks = [Child(serve_rank, config, rank, self._meeting.address) for rank in range(RANKS)]
        for rank in self._ranks:
            rank.receive()
        self._steps = 0

    def run(self, prompts: list[list[int]], tokens: int) -> tuple[float, float]:
        """Seconds to the first token of every prompt, and for `tokens` more of each."""
        started = time.perf_counter()
        last = self._step(prompts, 0)
        first = time.perf_counter()
        for done in range(tokens):
            last = self._step([[token] for token in last], PROMPT + done)
        return first - started, time.perf_counter() - first

    def close(self) -> None:
        for rank in self._ranks:
            rank.close()
        self._meeting.close()

    def _step(self, tokens: list[list[int]], position: int) -> list[int]:
        step = wire.Step(
            epoch=1,
            step=self._steps,
            sequences=[
                wire.SequenceSlice(
                    sequence_id=index, position=position, tokens=feed, sample=wire.SamplingParams(temperature=0),
                    blocks=list(range(index * BLOCKS_EACH, (index + 1) * BLOCKS_EACH)),
                )
                for index, feed in enumerate(tokens)
            ],
        )  # fmt: skip
        self._steps += 1
        frame = msgspec.msgpack.encode(step)
        for rank in self._ranks:
            rank.pipe.send_bytes(frame)
        answers = [msgspec.msgpack.decode(rank.pipe.recv_bytes(), type=wire.StepDone) for rank in self._ranks]
        if len({answer.fingerprint for answer in answers}) != 1:
            raise RuntimeError("the ranks' hidden states differ")
        return [sampled.token for sampled in answers[0].sampled]


BLOCKS_EACH = 16  # per sequence: prompt and what is decoded


def serve_rank(pipe: Connection, config: ServeConfig, rank: int, address: str) -> None:
    runner = Runner(config, rank)
    runner.load(lambda done, total: None)
    runner.allocate(BLOCKS_EACH * 16)
    group = join(config, rank, 1, address, timeout=300)
    pipe.send("ready")
    while True:
        try:
            step = msgspec.msgpack.decode(pipe.recv_bytes(), type=wire.Step)
        except EOFError:
            return
        started = time.perf_counter()
        output = runner.step(step, group)
        seconds = time.perf_counter() - started
        pipe.send_bytes(
            msgspec.msgpack.encode(
                wire.StepDone(
                    epoch=1, step=step.step, seconds=seconds, fingerprint=output.fingerprint, sampled=output.sampled
                )
            )
        )


class Transformers:
    """`generate` with its own defaults (SDPA attention, a dynamic cache) in bfloat16."""

    def __init__(self, model: Path) -> None:
        self._child = Child(serve_transformers, model)
        self._child.receive()

    def run(self, prompts: list[list[int]], tokens: int) -> tuple[float, float]:
        self._child.pipe.send((prompts, tokens))
        first, both = self._child.receive()
        return first, both - first

    def close(self) -> None:
        self._child.close()


def serve_transformers(pipe: Connection, model: Path) -> None:
    from transformers import Qwen3ForCausalLM

    torch.set_num_threads(2)
    oracle = Qwen3ForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    pipe.send("ready")
    while True:
        try:
            prompts, tokens = pipe.recv()
        except EOFError:
            return
        inputs = torch.tensor(prompts)
        pipe.send((_timed_generate(oracle, inputs, 1), _timed_generate(oracle, inputs, 1 + tokens)))


def _timed_generate(oracle: Any, inputs: torch.Tensor, tokens: int) -> float:
    mask = torch.ones_like(inputs)
    started = time.perf_counter()
    with torch.inference_mode():
        oracle.generate(inputs, attention_mask=mask, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
