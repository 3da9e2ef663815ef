"""Time to the first token behind a prefix of 2,000 tokens, when it was not computed before and when it was.

Through HTTP, on CPUs: two ranks of one thread each, a Qwen3-0.6B shape in bfloat16. Each round has a prefix of its own.
One question behind it is asked when nobody has computed it, and another one while a third is being answered, which it
shares its beginning with. The blocks of a sequence that shares don't lie side by side: how long it takes from token to
token is set beside the same of the first one, whose blocks do.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from bench.ranks import model_directory
from bench.report import Row, report
from tests.support.architectures import write_words
from tests.support.models import QWEN3_0_6B
from tests.support.serve import Served, served
from tests.support.stream import Stream

PREFIX: Final = 2000  # tokens
QUESTION: Final = 20
ANSWER: Final = 24
LONGER: Final = 40  # so that the first answer is still being written when the second question comes
DEADLINE: Final = 600.0
ARGUMENTS: Final = (
    "--tensor-parallel-size", "2", "--threads-per-rank", "1", "--served-name", "bench", "--kv-cache-memory", "1Gi",
)  # fmt: skip


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=3)
    rounds = arguments.parse_args().rounds
    chance = random.Random(1)
    with TemporaryDirectory() as folder:
        model = with_words(model_directory(), Path(folder, "model"))
        with served(Path(folder), *ARGUMENTS, model=model) as serve:
            serve.ready()
            ask(serve, tokens(chance, 100), 4)  # what is compiled or allocated at first is
            found = [one_round(serve, chance) for _ in range(rounds)]
    cold, warm, alone, shared = (statistics.median(values) for values in zip(*found, strict=True))
    case = f"{PREFIX} shared tokens, {QUESTION} own"
    report(
        "prefix",
        [
            Row(case=case, metric="first token, cold", value=cold, unit="s", peer="warm", peer_value=warm),
            Row(case=case, metric="first token, warm", value=warm, unit="s"),
            Row(case=case, metric="token to token, own blocks", value=alone, unit="s"),
            Row(case=case, metric="token to token, shared blocks", value=shared, unit="s", peer="own blocks",
                peer_value=alone),
        ],
    )  # fmt: skip


def one_round(serve: Served, chance: random.Random) -> tuple[float, float, float, float]:
    """Seconds: to the first token, cold and warm; from token to token, alone in blocks side by side and in others."""
    prefix = tokens(chance, PREFIX)
    cold, alone = ask(serve, prefix + tokens(chance, QUESTION), ANSWER)
    running = begin(serve, prefix + tokens(chance, QUESTION), LONGER)
    serve.until(lambda: running.pieces > 0, "the answer has begun", DEADLINE)
    warm, _ = ask(serve, prefix + tokens(chance, QUESTION), 1)
    running.wait()
    _, shared = ask(serve, prefix + tokens(chance, QUESTION), ANSWER)
    return cold, warm, alone, shared


def begin(serve: Served, prompt: list[int], count: int) -> Stream:
    return Stream(serve.api, {"model": "bench", "prompt": prompt, "max_tokens": count, "temperature": 0}, DEADLINE)


def ask(serve: Served, prompt: list[int], count: int) -> tuple[float, float]:
    """Seconds to the first token, and the median from one to the next."""
    started = time.monotonic()
    stream = begin(serve, prompt, count)
    stream.wait()
    times = stream.times
    between = [later - sooner for sooner, later in pairwise(times)]
    return times[0] - started, statistics.median(between or [0.0])


def tokens(chance: random.Random, count: int) -> list[int]:
    return [chance.randrange(1000, QWEN3_0_6B.vocabulary) for _ in range(count)]


def with_words(model: Path, folder: Path) -> Path:
    """The same model, with a tokenizer."""
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).symlink_to(file)
    write_words(folder, QWEN3_0_6B.vocabulary)
    return folder


if __name__ == "__main__":
    main()
