"""Faults injected into a streaming load: how long the stream pauses, and what of it each phase of the repair takes.

Claim: a killed rank costs a running stream at most 1 s, a hang 1 s beyond its deadline, and no request is lost; a
larger model hardly costs more; starting everything anew, measured in the same run, takes at least 20 times as long.

All run with two ranks: tiny-chat and the 0.6B shape (random weights, a tokenizer that names every id) in float32, whose
streams must give the tokens of an undisturbed run, and the 0.6B shape in bfloat16, which a CPU without AVX-512 packs
when it loads. The pause is the longest time between two chunks of the stream. Beside it stand the two ways without a
ladder, after a SIGKILL of rank 1: `RecyclePods`, in which everything is replaced once the group says that it is
poisoned, and a restart of everything at that very moment; both lose the stream and are timed to a retry's first token.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.process_start import measure_starts
from bench.ranks import model_directory
from bench.report import Row, report
from tests.support.chaos import healed
from tests.support.faults import inject
from tests.support.serve import TINY_CHAT, Served, served
from tests.support.stream import Stream
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lockstep_runtime.protocol.chaos import CollectivePoint, FaultPhase, Injection
from lockstep_runtime.protocol.status import FaultRecord, GroupState
from lockstep_runtime.recovery.policy import REBUILD_REFILL_SECONDS

STREAM_SECONDS: Final = 300.0
PHASES: Final = ("detect", "abort", "respawn", "rebuild", "verify", "firstToken")


@dataclass(frozen=True, slots=True)
class Harm:
    kind: Injection
    rank: int
    at: CollectivePoint = CollectivePoint.BEFORE

    @property
    def name(self) -> str:
        where = f" {self.at} a collective" if self.kind is Injection.HANG else ""
        return f"{self.kind}{where} on rank {self.rank}"


HARMS: Final = (
    Harm(Injection.SIGKILL, 1),
    Harm(Injection.SIGKILL, 0),
    Harm(Injection.HANG, 1),
    Harm(Injection.HANG, 1, CollectivePoint.INSIDE),
    Harm(Injection.RAISE, 1),
    Harm(Injection.NAN, 1),
    Harm(Injection.ACTIVATION, 1),
    Harm(Injection.CLOSE_BUS, 1),
)


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    model: Path
    dtype: str
    tokens: int  # of the stream that is disturbed
    exact: bool  # whether its text must be that of an undisturbed one


def ask(serve: Served, tokens: int) -> Stream:
    """Begin a greedy completion."""
    request = {"model": "bench", "prompt": "What is a module?", "max_tokens": tokens, "temperature": 0}
    return Stream(serve.api, request, STREAM_SECONDS)


def text_of(stream: Stream) -> str:
    """The whole, once it has ended."""
    answer = stream.wait()
    if answer.error:
        raise RuntimeError(f"the request failed: {answer.error}")
    return answer.text


@contextlib.contextmanager
def group(case: Case, *more: str) -> Iterator[Served]:
    with tempfile.TemporaryDirectory() as directory:
        arguments = (
            "--tensor-parallel-size", "2", "--threads-per-rank", "1", "--dtype", case.dtype, "--served-name", "bench",
            "--max-model-len", "1024", "--kv-cache-memory", "256Mi", "--allow-faults", *more,
        )  # fmt: skip
        with served(Path(directory), *arguments, model=case.model) as serve:
            yield serve


def disturb(
    serve: Served, case: Case, harm: Harm, undisturbed: str, before: Callable[[], None] = lambda: None
) -> tuple[float, FaultRecord]:
    """The stream's pause, and what the group says of it. `before`: called just before the fault."""
    healed(serve)
    known = {record.id: record.at for record in serve.status().faults}
    # Until the budget has back what the last one took: else a higher rung is measured.
    time.sleep(max(0.0, max(known.values(), default=0.0) + REBUILD_REFILL_SECONDS - time.time()))
    stream = ask(serve, case.tokens)
    serve.until(lambda: len(stream.times) > 5 or bool(stream.error), "the stream has begun", STREAM_SECONDS)
    before()
    inject(serve, harm.kind, harm.rank, phase=FaultPhase.DECODE, at=harm.at)
    text = text_of(stream)
    if case.exact and text != undisturbed:
        raise RuntimeError(f"{harm.name}: the stream went on with other tokens")

    def told() -> list[FaultRecord]:
        return [one for one in serve.status().faults if one.id not in known and "firstToken" in one.phases]

    serve.until(lambda: bool(told()), "the repair is told", 30)
    return stream.pause, told()[0]


def restart(case: Case) -> float:
    """Seconds from the loss of a rank to a retry's first token, if everything is started anew at once."""
    with group(case) as serve:
        serve.ready()
        begun = time.monotonic()
        serve.process.kill()
        return _first_token_anew(case) - begun


def recycle(case: Case) -> float:
    """The same, if the group has to say that it is poisoned before everything is replaced."""
    with group(case, "--recovery-strategy", "RecyclePods") as serve:
        serve.ready()
        begun = time.monotonic()
        os.kill(serve.pid_of("worker model=local group=0 rank=1"), signal.SIGKILL)
        serve.until(lambda: serve.status().state is GroupState.POISONED, "it says that it is poisoned")
        serve.end()
        return _first_token_anew(case) - begun


def _first_token_anew(case: Case) -> float:
    """When it came, of a group that is started now."""
    with group(case) as serve:
        serve.ready()
        stream = ask(serve, 2)
        text_of(stream)
        return stream.times[0]


def measure(case: Case, rounds: int) -> list[Row]:
    pauses: dict[Harm, list[float]] = {harm: [] for harm in HARMS}
    records: dict[Harm, list[FaultRecord]] = {harm: [] for harm in HARMS}
    with group(case) as serve:
        serve.ready()
        undisturbed = text_of(ask(serve, case.tokens))
        for _ in range(rounds):
            for harm in HARMS:
                pause, record = disturb(serve, case, harm, undisturbed)
                pauses[harm].append(pause)
                records[harm].append(record)
                print(f"{case.name}: {harm.name}: {pause:.2f} s", flush=True)
        starts = measure_starts(
            case.name, serve, rounds, lambda before: disturb(serve, case, HARMS[0], undisturbed, before)
        )
    plain = {
        "RecyclePods": statistics.median(recycle(case) for _ in range(rounds)),
        "restart": statistics.median(restart(case) for _ in range(rounds)),
    }
    return [row for harm in HARMS for row in rows(case, harm, pauses[harm], records[harm], plain)] + starts


def rows(
    case: Case, harm: Harm, pauses: list[float], records: list[FaultRecord], plain: Mapping[str, float]
) -> list[Row]:
    name = f"{case.name}: {harm.name}"
    medians = {phase: statistics.median(record.phases.get(phase, 0.0) for record in records) for phase in PHASES}
    paused = statistics.median(pauses)
    return [
        *(Row(case=name, metric="pause", value=paused, unit="s", peer=peer, peer_value=plain[peer]) for peer in plain),
        *(Row(case=name, metric=phase, value=value, unit="s") for phase, value in medians.items()),
    ]


def servable(directory: Path) -> Path:
    """The generated checkpoint with a tokenizer, in which every id has a text of its own."""
    if not (directory / "tokenizer.json").exists():
        size = json.loads((directory / "config.json").read_text())["vocab_size"]
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {token: index for index, token in enumerate(alphabet)}
        vocabulary |= {f"w{index}": index for index in range(len(alphabet), size)}
        tokenizer = Tokenizer(models.BPE(vocabulary, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--only", default="", help="of the cases, those with this in their names")
    options = arguments.parse_args()
    large = servable(model_directory())
    cases = [
        Case("tiny-chat float32", TINY_CHAT, "float32", 250, exact=True),
        Case("0.6B shape float32", large, "float32", 30, exact=True),
        Case("0.6B shape bfloat16", large, "bfloat16", 30, exact=False),
    ]
    found = [row for case in cases if options.only in case.name for row in measure(case, options.rounds)]
    report("recovery", found)


if __name__ == "__main__":
    main()
