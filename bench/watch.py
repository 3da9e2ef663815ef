"""Claim: watching costs at most 1 % of decode speed.

Two ranks decode with everything that watches a step, and without, in turns and in the same processes: the progress
record of every collective, the fingerprint of what went in and came out, the scrub of the weights at its usual pace,
and the engine's model of how long the step may take. Each pair of runs gives one ratio; the median is reported.
"""

from __future__ import annotations

import argparse
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
from bench.decode import Child, model_directory
from bench.report import Row, report
from tests.support.serve import TINY_CHAT

from lockstep_runtime import wire
from lockstep_runtime.config import DType, EngineLimits, ServeConfig, Watchdog
from lockstep_runtime.engine.deadline import DeadlineModel, work_of
from lockstep_runtime.parallel.group import Group, join, open_rendezvous
from lockstep_runtime.parallel.watched import WatchedGroup
from lockstep_runtime.progress import Progress, new_memory
from lockstep_runtime.worker import runner as runner_module
from lockstep_runtime.worker.runner import Runner, StepOutput

RANKS = 2
PROMPT = 32
BLOCKS = 16


class Order(msgspec.Struct):
    """A step, and whether it is watched."""

    step: wire.Step
    watched: bool


class Ranks:
    """Two ranks, and the least of an engine."""

    def __init__(self, model: Path, dtype: DType) -> None:
        config = ServeConfig(
            model=str(model), served_name="bench", tensor_parallel_size=RANKS, ranks_per_pod=RANKS, backend="gloo",
            dtype=dtype, threads_per_rank=1, limits=EngineLimits(kv_cache_bytes=1 << 28),
        )  # fmt: skip
        self._meeting = open_rendezvous(config, 1)
        self._ranks = [Child(serve_rank, config, rank, self._meeting.address) for rank in range(RANKS)]
        for rank in self._ranks:
            rank.receive()
        self._deadlines = DeadlineModel(Watchdog())
        self._steps = 0

    def seconds(self, tokens: int, *, watched: bool) -> float:
        """To decode so many tokens of one sequence, after its prompt."""
        token = self._step(list(range(1, PROMPT + 1)), 0, watched)
        began = time.perf_counter()
        for done in range(tokens):
            token = self._step([token], PROMPT + done, watched)
        return time.perf_counter() - began

    def close(self) -> None:
        for rank in self._ranks:
            rank.close()
        self._meeting.close()

    def _step(self, tokens: list[int], position: int, watched: bool) -> int:
        self._steps += 1
        sequence = wire.SequenceSlice(
            sequence_id=1, position=position, tokens=tokens, blocks=list(range(BLOCKS)),
            sample=wire.SamplingParams(temperature=0),
        )  # fmt: skip
        order = Order(wire.Step(epoch=1, step=self._steps, sequences=[sequence]), watched)
        began, work = time.monotonic(), work_of([sequence])
        if watched:
            self._deadlines.deadline(work)
        frame = msgspec.msgpack.encode(order)
        for rank in self._ranks:
            rank.pipe.send_bytes(frame)
        answers = [msgspec.msgpack.decode(rank.pipe.recv_bytes(), type=wire.StepDone) for rank in self._ranks]
        if len({answer.fingerprint for answer in answers}) != 1:
            raise RuntimeError("the ranks' hidden states differ")
        if watched:
            self._deadlines.learn(work, time.monotonic() - began)
        return answers[0].sampled[0].token


def serve_rank(pipe: Connection, config: ServeConfig, rank: int, address: str) -> None:
    runner = Runner(config, rank)
    scrub = runner.load(lambda done, total: None).scrub
    runner.allocate(BLOCKS)
    plain = join(config, rank, 1, address, timeout=300)
    progress = Progress(new_memory("bench"))
    watched_group, fingerprint = WatchedGroup(plain, progress), runner_module._fingerprint
    pipe.send("ready")
    while True:
        try:
            order = msgspec.msgpack.decode(pipe.recv_bytes(), type=Order)
        except EOFError:
            return
        runner_module._fingerprint = fingerprint if order.watched else unwatched  # type: ignore[assignment]
        output = watch(runner, order.step, watched_group, progress) if order.watched else runner.step(order.step, plain)
        done = wire.StepDone(
            epoch=1, step=order.step.step, seconds=0.0, fingerprint=output.fingerprint, sampled=output.sampled
        )
        pipe.send_bytes(msgspec.msgpack.encode(done))
        if order.watched and scrub is not None and scrub.wait(time.monotonic()) == 0:
            scrub.turn(time.monotonic())


def unwatched(*_: object) -> int:
    return 0


def watch(runner: Runner, step: wire.Step, group: Group, progress: Progress) -> StepOutput:
    progress.enter(step.epoch, step.step)
    output = runner.step(step, group)
    progress.leave(step.epoch, step.step)
    return output


def compare(case: str, model: Path, dtype: DType, tokens: int, rounds: int) -> list[Row]:
    ranks = Ranks(model, dtype)
    try:
        ranks.seconds(tokens, watched=True)
        pairs = [(ranks.seconds(tokens, watched=True), ranks.seconds(tokens, watched=False)) for _ in range(rounds)]
    finally:
        ranks.close()
    ratio = statistics.median(watched / plain for watched, plain in pairs)
    watched, plain = (tokens / statistics.median(pair[index] for pair in pairs) for index in (0, 1))
    return [
        Row(case=case, metric="decode, watched", value=watched, unit="tok/s", peer="unwatched", peer_value=plain),
        Row(case=case, metric="cost of watching", value=100 * (ratio - 1), unit="%", peer="aim", peer_value=1.0),
    ]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=15)
    options = arguments.parse_args()
    found = compare("0.6B shape, bfloat16, batch 1", model_directory(), "bfloat16", 48, options.rounds)
    found += compare("tiny-chat, float32, batch 1", TINY_CHAT, "float32", 200, options.rounds)
    report("watch", found)


if __name__ == "__main__":
    main()
