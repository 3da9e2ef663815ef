"""Claim: watching costs at most 1 % of decode speed.

Two ranks decode one sequence, and every other step is watched: the progress record of every collective, the fingerprint
of what went in and came out, and the engine's model of how long the step may take. So watched and plain steps meet the
same noise and, every other round begun with a plain one, the same contexts; the median of what a watched step takes
more than the plain one beside it is compared with the median plain step. The scrub works between steps: what a round
over all weights takes is spread over its interval and added.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
from bench.ranks import Ranks, answer_orders, config, done, model_directory, start
from bench.report import Row, report
from tests.support.serve import TINY_CHAT

from lockstep_runtime.config import DType, ServeConfig, Watchdog
from lockstep_runtime.distributed.communicator import Communicator
from lockstep_runtime.distributed.traced import TracedCommunicator
from lockstep_runtime.protocol import bus
from lockstep_runtime.protocol.progress_record import Progress, new_memory
from lockstep_runtime.recovery.watchdog import DeadlineModel, work_of
from lockstep_runtime.worker import model_runner as runner_module
from lockstep_runtime.worker.fingerprint import fingerprint_of
from lockstep_runtime.worker.model_runner import ModelRunner, StepOutput
from lockstep_runtime.worker.scrub import INTERVAL_SECONDS, Scrub

PROMPT = 32


class Order(msgspec.Struct):
    """A step, and whether it is watched; None: a whole scrub, answered by the seconds that it took."""

    step: bus.Step | None
    watched: bool


def durations(ranks: Ranks, deadlines: DeadlineModel, tokens: int, first: int) -> tuple[list[float], list[float]]:
    """Seconds of each watched step and of each plain one, in turns, of one sequence after its prompt.

    `first`: 0 to begin with a watched one, 1 with a plain one. A context of an odd length takes longer.
    """
    found: tuple[list[float], list[float]] = ([], [])
    token = take(ranks, deadlines, list(range(1, PROMPT + 1)), 0, True)
    for count in range(tokens):
        plain = (count + first) % 2
        began = time.perf_counter()
        token = take(ranks, deadlines, [token], PROMPT + count, not plain)
        found[plain].append(time.perf_counter() - began)
    return found


def take(ranks: Ranks, deadlines: DeadlineModel, tokens: list[int], position: int, watched: bool) -> int:
    """One step, and the token that it draws."""
    step = ranks.next_step([tokens], position)
    if not watched:
        return ranks.take(Order(step, watched))[0]
    began, work = time.monotonic(), work_of(step.sequences)
    [token] = ranks.take(Order(step, watched), lambda: deadlines.deadline(work))
    deadlines.learn(work, time.monotonic() - began)
    return token


def serve_rank(pipe: Connection, config: ServeConfig, rank: int, address: str) -> None:
    runner, loaded, plain = start(config, rank, address, sequences=1)
    progress = Progress(new_memory("bench"))
    watched = TracedCommunicator(plain, progress)

    def answer(order: Order) -> bus.StepDone | float:
        if order.step is None:
            return scrub_all(loaded.scrub)
        setattr(runner_module, "fingerprint_of", fingerprint_of if order.watched else unwatched)  # noqa: B010
        output = watch(runner, order.step, watched, progress) if order.watched else runner.step(order.step, plain)
        return done(order.step, output)

    answer_orders(pipe, Order, answer)


def unwatched(*_: object) -> int:
    return 0


def watch(runner: ModelRunner, step: bus.Step, group: Communicator, progress: Progress) -> StepOutput:
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
    deadlines = DeadlineModel(Watchdog())
    with closing(Ranks(serve_rank, config(model, dtype))) as ranks:
        durations(ranks, deadlines, tokens, first=0)
        runs = [durations(ranks, deadlines, tokens, first=number % 2) for number in range(rounds)]
        scrub = 100 * max(ranks.ask(Order(None, watched=True), float)) / INTERVAL_SECONDS
    plain = statistics.median(one for _, run in runs for one in run)
    more = statistics.median(one - other for run in runs for one, other in zip(*run, strict=True))
    watched, cost = plain + more, 100 * more / plain
    return [
        Row(case=case, metric="decode, watched", value=1 / watched, unit="tok/s", peer="plain", peer_value=1 / plain),
        Row(case=case, metric="cost of watching steps", value=cost, unit="%"),
        Row(case=case, metric="cost of the scrub", value=scrub, unit="%"),
        Row(case=case, metric="cost of watching", value=cost + scrub, unit="%", peer="aim", peer_value=1.0),
    ]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=12)
    options = arguments.parse_args()
    found = compare("0.6B shape, bfloat16, batch 1", model_directory(), "bfloat16", 60, options.rounds)
    rounds = 4 * options.rounds  # its steps are short
    found += compare("tiny-chat, float32, batch 1", TINY_CHAT, "float32", 220, rounds)
    report("watch", found)


if __name__ == "__main__":
    main()
