"""Faults injected into a streaming load: how long the stream pauses, and what of it each phase of the repair takes.

Claim: a killed rank costs a running stream at most 1 s, a hang 1 s beyond its deadline, and no request is lost; a
larger model hardly costs more; starting everything anew, measured in the same run, takes at least 20 times as long.

Both models run with two ranks: tiny-chat in float32, whose streams must give the tokens of an undisturbed run, and the
0.6B shape in bfloat16 with random weights and a tokenizer that names every id. The pause is the longest time between
two chunks of the stream. A fault is injected only when the spare is warm, as in a group that has served for a while.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx
from bench.decode import model_directory
from bench.report import Row, report
from tests.support.faults import inject
from tests.support.serve import TINY_CHAT, Served, served, title_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lockstep_runtime.wire import FaultRecord, GroupState, Injection, Moment, Phase

WARM_BYTES: Final = 150 * 1024 * 1024  # resident, once torch is imported
STREAM_SECONDS: Final = 300.0
PHASES: Final = ("detect", "abort", "respawn", "rebuild", "verify", "firstToken")


@dataclass(frozen=True, slots=True)
class Harm:
    kind: Injection
    rank: int
    at: Moment = Moment.BEFORE

    @property
    def name(self) -> str:
        where = f" {self.at} a collective" if self.kind is Injection.HANG else ""
        return f"{self.kind}{where} on rank {self.rank}"


HARMS: Final = (
    Harm(Injection.SIGKILL, 1),
    Harm(Injection.SIGKILL, 0),
    Harm(Injection.HANG, 1),
    Harm(Injection.HANG, 1, Moment.INSIDE),
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


class Stream:
    """A greedy completion, read by a thread that notes when each chunk came."""

    def __init__(self, serve: Served, tokens: int) -> None:
        self.times: list[float] = []
        self.text, self.error = "", ""
        self._url = f"{serve.api}/v1/completions"
        self._body = {
            "model": "bench", "prompt": "What is a module?", "max_tokens": tokens,
            "temperature": 0, "ignore_eos": True, "stream": True,
        }  # fmt: skip
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        self._thread.join(STREAM_SECONDS)
        if self._thread.is_alive() or self.error:
            raise RuntimeError(f"the request failed: {self.error or 'its stream does not end'}")

    def pause(self) -> float:
        """The longest time between two chunks, in seconds."""
        return max(later - sooner for sooner, later in zip(self.times, self.times[1:], strict=False))

    def _read(self) -> None:
        try:
            with httpx.stream("POST", self._url, json=self._body, timeout=STREAM_SECONDS) as answer:
                for line in answer.iter_lines():
                    if line.startswith("data: {"):
                        self._take(json.loads(line.removeprefix("data: ")))
        except httpx.HTTPError as error:
            self.error = f"{type(error).__name__}: {error}"

    def _take(self, event: dict[str, list[dict[str, str]]]) -> None:
        self.error = self.error or str(event.get("error", ""))
        if any(choice["text"] for choice in event.get("choices", [])):
            self.times.append(time.monotonic())
            self.text += event["choices"][0]["text"]


@contextlib.contextmanager
def group(case: Case) -> Iterator[Served]:
    with tempfile.TemporaryDirectory() as directory:
        arguments = (
            "--tensor-parallel-size", "2", "--threads-per-rank", "1", "--dtype", case.dtype, "--served-name", "bench",
            "--max-model-len", "1024", "--kv-cache-memory", "256Mi", "--allow-faults",
        )  # fmt: skip
        with served(Path(directory), *arguments, model=case.model) as serve:
            yield serve


def until_settled(serve: Served) -> None:
    """Ready, nothing under repair, and a spare that only waits."""

    def settled() -> bool:
        status = serve.status()
        if status.state is not GroupState.READY or any(one.recovered_at is None for one in status.faults):
            return False
        spares = [pid for pid in serve.child_pids() if "lockstep: spare" in title_of(pid)]
        return bool(spares) and _waits(spares[0])

    serve.until(settled, "the group is ready and has a warm spare", STREAM_SECONDS)


def _waits(pid: int) -> bool:
    """Whether the process has imported its share and uses no CPU time."""

    def used() -> tuple[int, int]:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return int(fields[11]) + int(fields[12]), int(fields[21]) * 4096

    before, resident = used()
    time.sleep(0.5)
    return resident > WARM_BYTES and used()[0] == before


def disturb(serve: Served, case: Case, harm: Harm, undisturbed: str) -> tuple[float, FaultRecord]:
    """The stream's pause, and what the group says of it."""
    until_settled(serve)
    known = {record.id for record in serve.status().faults}
    stream = Stream(serve, case.tokens)
    serve.until(lambda: len(stream.times) > 5 or bool(stream.error), "the stream has begun", STREAM_SECONDS)
    inject(serve, harm.kind, harm.rank, phase=Phase.DECODE, at=harm.at)
    stream.wait()
    if case.exact and stream.text != undisturbed:
        raise RuntimeError(f"{harm.name}: the stream went on with other tokens")

    def told() -> list[FaultRecord]:
        return [one for one in serve.status().faults if one.id not in known and "firstToken" in one.phases]

    serve.until(lambda: bool(told()), "the repair is told", 30)
    return stream.pause(), told()[0]


def restart(serve: Served, case: Case) -> float:
    """Seconds from the kill of everything to the first token of a group started at once in its place."""
    begun = time.monotonic()
    serve.process.kill()
    with group(case) as anew:
        anew.ready()
        stream = Stream(anew, 2)
        stream.wait()
        return stream.times[0] - begun


def measure(case: Case, rounds: int) -> list[Row]:
    pauses: dict[Harm, list[float]] = {harm: [] for harm in HARMS}
    records: dict[Harm, list[FaultRecord]] = {harm: [] for harm in HARMS}
    with group(case) as serve:
        serve.ready()
        first = Stream(serve, case.tokens)
        first.wait()
        for _ in range(rounds):
            for harm in HARMS:
                pause, record = disturb(serve, case, harm, first.text)
                pauses[harm].append(pause)
                records[harm].append(record)
        anew = restart(serve, case)
    return [row for harm in HARMS for row in rows(case, harm, pauses[harm], records[harm], anew)]


def rows(case: Case, harm: Harm, pauses: list[float], records: list[FaultRecord], anew: float) -> list[Row]:
    name = f"{case.name}: {harm.name}"
    medians = {phase: statistics.median(record.phases.get(phase, 0.0) for record in records) for phase in PHASES}
    pause = Row(
        case=name, metric="pause of the stream", value=statistics.median(pauses), unit="s",
        peer="everything started anew", peer_value=anew,
    )  # fmt: skip
    return [pause, *(Row(case=name, metric=phase, value=value, unit="s") for phase, value in medians.items())]


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
    arguments.add_argument("--only", choices=["tiny-chat", "0.6B"])
    options = arguments.parse_args()
    found: list[Row] = []
    if options.only != "0.6B":
        found += measure(Case("tiny-chat", TINY_CHAT, "float32", 250, exact=True), options.rounds)
    if options.only != "tiny-chat":
        model = servable(model_directory())
        found += measure(Case("0.6B shape", model, "bfloat16", 30, exact=False), options.rounds)
    report("recovery", found)


if __name__ == "__main__":
    main()
