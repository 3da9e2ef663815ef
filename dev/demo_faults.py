"""The demo's faults: a rank hangs and another one is killed while an answer streams, and the answer is the same.

Everything goes through the API server and the model's Service, so that it works on any cluster.
"""

import json
import queue
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import httpx
from dev.demo_terminal import Page, command, kubectl, run, say, show
from openai import OpenAI, OpenAIError

TRAIL: Final = re.compile(r"\S+T([0-9:.]+)Z +\w+ +engine: ((?:watchdog|abort|respawn|rebuild|verify|resumed): .*)")
# Fault, rank, and how many tokens are drawn before it happens: the answer is longer on any machine, however fast.
FAULTS: Final = (("hang", 1, 60), ("sigkill", 0, 150))
PAUSE_S: Final = 0.5  # without a token is worth a word
MAX_TOKENS: Final = 400
STREAM_S: Final = 180.0
TOLD_S: Final = 30.0  # for the status and the Events to tell of the faults


@dataclass(frozen=True, slots=True)
class Piece:
    """Of the answer."""

    text: str
    at: float


@dataclass(frozen=True, slots=True)
class LogLine:
    text: str


@dataclass(frozen=True, slots=True)
class End:
    """Of the stream; `error` is empty when it ended as it should."""

    error: str = ""


News = queue.Queue[Piece | LogLine | End]


@dataclass(slots=True)
class Answer:
    """What a client got: the text, and the seconds between its pieces."""

    text: str = ""
    gaps: list[float] = field(default_factory=list)
    error: str = ""

    @property
    def pauses(self) -> str:
        """As many of the longest as there are faults, in their order."""
        longest = sorted(self.gaps)[-len(FAULTS) :]
        return " and ".join(f"{seconds:.1f} s" for seconds in self.gaps if seconds in longest)


def ask(client: OpenAI, model: str, question: str, page: Page, news: News | None = None) -> Answer:
    """Stream an answer to the page, with what else is in the news."""
    page.open("you")
    page.text(question)
    page.open(model)
    news = news or News()
    threading.Thread(target=_read, args=(client, model, question, news), daemon=True).start()
    return follow(news, page)


def suffer(client: OpenAI, model: str, question: str, undisturbed: str) -> str:
    """Ask again, with the faults on their way; what went wrong, or nothing."""
    before, pod, news = _told(model), f"{model}-0-0", News()
    with _log(pod, news):
        for fault, rank, tokens in FAULTS:
            when = ("--phase=decode", f"--skip={tokens}")
            run(("exec", pod, "--", "lockstep", "inject", fault, f"--rank={rank}", *when))
        show(f"kubectl logs --follow {pod}   # beside the chat")
        answer = ask(client, model, question, Page(), news)
    if problem := judge(answer, undisturbed) or _untold(model, before):
        return problem
    say(f"It is the same answer, letter for letter, after two faults. Its longest pauses were {answer.pauses}.")
    return ""


def judge(answer: Answer, undisturbed: str) -> str:
    """What is wrong with the answer, or nothing."""
    if answer.error:
        return f"the stream failed: {answer.error}"
    if answer.text != undisturbed:
        return f"the answer is not the undisturbed one, which was:\n{undisturbed}"
    return ""


def follow(news: News, page: Page) -> Answer:
    """Print what comes until the stream has ended."""
    answer, begun, last, paused = Answer(), time.monotonic(), 0.0, False
    while time.monotonic() - begun < STREAM_S:
        try:
            item = news.get(timeout=PAUSE_S)
        except queue.Empty:
            if last and not paused:
                page.dots()
                paused = True
            continue
        match item:
            case LogLine(words):
                page.line(words)
            case Piece(words, at):
                if last:
                    answer.gaps.append(at - last)
                if paused or (last and at - last > PAUSE_S):
                    page.line(f"… {at - last:.1f} s without a token")
                last, paused = at, False
                page.text(words)
                answer.text += words
            case End(error):
                page.end()
                answer.error = error
                return answer
    answer.error = f"no end after {STREAM_S:g} s"
    return answer


def _read(client: OpenAI, model: str, question: str, news: News) -> None:
    try:
        for chunk in client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": question}],
            max_tokens=MAX_TOKENS,
            temperature=0,
            stream=True,
        ):
            if chunk.choices and (text := chunk.choices[0].delta.content):
                news.put(Piece(text, time.monotonic()))
        news.put(End())
    except (OpenAIError, httpx.HTTPError) as error:  # the second in the middle of a stream
        news.put(End(str(error) or type(error).__name__))


@contextmanager
def _log(pod: str, news: News) -> Iterator[None]:
    """The recovery's lines in the log of the group's first pod, as they are written."""
    arguments = command("logs", "--follow", "--tail=0", pod)
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        threading.Thread(target=_read_log, args=(process, news), daemon=True).start()
        try:
            yield
        finally:
            process.terminate()


def _read_log(process: subprocess.Popen[str], news: News) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if found := TRAIL.match(line):
            news.put(LogLine(f"{found[1]} {found[2]}"))


def _untold(model: str, before: tuple[int, int]) -> str:
    """Wait until status and Events tell of the faults; what is missing at the end, or nothing."""
    started = time.monotonic()
    while time.monotonic() - started < TOLD_S:
        told = [now - then for now, then in zip(_told(model), before, strict=True)]
        if min(told) >= len(FAULTS):
            return ""
        time.sleep(0.5)
    return f"of {len(FAULTS)} faults the status counts {told[0]} as repaired, and {told[1]} Events Recovered came"


def _told(model: str) -> tuple[int, int]:
    """Repairs by the status, and by Events."""
    status = json.loads(kubectl("get", "tpm", model, "-o", "json")).get("status", {})
    return status.get("recoveries", 0), kubectl("events", "--for", f"tpm/{model}").count("Recovered")
