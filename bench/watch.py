"""Claim: watching costs at most 1 % of decode speed.

Two ranks decode one sequence, and every other step is watched: the progress record of every collective, the fingerprint
of what went in and came out, and the engine's model of how long the step may take. So watched and plain steps meet the
same noise; the longest tenth of either is left out, and the means are compared. The scrub works between steps: what a
round over all weights takes is spread over its interval and added.
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
from lockstep_runtime.worker.scrub import INTERVAL_SECONDS, Scrub

RANKS = 2
PROMPT = 32
BLOCKS = 16


class Order(msgspec.Struct):
    """A step, and whether it is watched; None: a whole scrub."""

    step: wire.Step | None
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

    def durations(self, tokens: int) -> tuple[list[float], list[float]]:
        """Seconds of each watched step and of each plain one, in turns, of one sequence after its prompt."""
        found: tuple[list[float], list[float]] = ([], [])
        token = self._step(list(range(1, PROMPT + 1)), 0, True)
        for done in range(tokens):
            began = time.perf_counter()
            token = self._step([token], PROMPT + done, done % 2 == 0)
            found[done % 2].append(time.perf_counter() - began)
        return found

    def scrub(self) -> float:
        """Seconds that the slower rank takes to look at all its weights."""
        for rank in self._ranks:
            rank.pipe.send_bytes(msgspec.msgpack.encode(Order(None, watched=True)))
        return max(float(rank.receive()) for rank in self._ranks)

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
        if order.step is None:
            pipe.send(scrub_all(scrub))
            continue
        runner_module._fingerprint = fingerprint if order.watched else unwatched  # type: ignore[assignment]
        output = watch(runner, order.step, watched_group, progress) if order.watched else runner.step(order.step, plain)
        done = wire.StepDone(
            epoch=1, step=order.step.step, seconds=0.0, fingerprint=output.fingerprint, sampled=output.sampled
        )
        pipe.send_bytes(msgspec.msgpack.encode(done))


def unwatched(*_: object) -> int:
    return 0


def watch(runner: Runner, step: wire.Step, group: Group, progress: Progress) -> StepOutput:
    progress.enter(step.epoch, step.step)
    output = runner.step(step, group)
    progress.leave(step.epoch, step.step)
    return output


def scrub_all(scrub: Scrub | None) -> float:
    if scrub is None:
        raise RuntimeError("there is no scrub")
    began, round_before = time.perf_counter(), scrub.rounds
    while scrub.rounds == round_before:
        scrub.turn(time.monotonic())
    return time.perf_counter() - began


def compare(case: str, model: Path, dtype: DType, tokens: int, rounds: int) -> list[Row]:
    ranks = Ranks(model, dtype)
    try:
        ranks.durations(tokens)
        runs = [ranks.durations(tokens) for _ in range(rounds)]
        scrub = 100 * ranks.scrub() / INTERVAL_SECONDS
    finally:
        ranks.close()
    watched, plain = (trimmed_mean([one for run in runs for one in run[kind]]) for kind in (0, 1))
    cost = 100 * (watched / plain - 1)
    return [
        Row(case=case, metric="decode, watched", value=1 / watched, unit="tok/s", peer="plain", peer_value=1 / plain),
        Row(case=case, metric="cost of watching steps", value=cost, unit="%"),
        Row(case=case, metric="cost of the scrub", value=scrub, unit="%"),
        Row(case=case, metric="cost of watching", value=cost + scrub, unit="%", peer="aim", peer_value=1.0),
    ]


def trimmed_mean(values: list[float]) -> float:
    """Of all but the longest tenth."""
    return statistics.mean(sorted(values)[: -(len(values) // 10) or None])


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=12)
    options = arguments.parse_args()
    found = compare("0.6B shape, bfloat16, batch 1", model_directory(), "bfloat16", 60, options.rounds)
    found += compare("tiny-chat, float32, batch 1", TINY_CHAT, "float32", 220, options.rounds)
    report("watch", found)


if __name__ == "__main__":
    main()
