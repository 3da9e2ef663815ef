"""The demo's faults: what is shown of a disturbed stream, and that nothing but the undisturbed answer passes."""

from __future__ import annotations

import logging
import re
from typing import Final

import pytest
from dev.demo_faults import FAULTS, MAX_TOKENS, PAUSE_S, TRAIL, Answer, End, LogLine, News, Piece, follow, judge
from dev.demo_terminal import BREAK, INDENT, WIDTH, Page
from tests.support.command_line import options

from lockstep_runtime import log

WORDS: Final = "An exception is raised at the point where the error is detected. "


def shown(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return re.sub(r"\x1b\[\d+m", "", capsys.readouterr().out).splitlines()


def told(news: News) -> Answer:
    return follow(news, Page())


def test_a_text_is_wrapped_however_its_pieces_are_cut(capsys: pytest.CaptureFixture[str]) -> None:
    pages = []
    for size in (1, 3, 1000):
        page = Page()
        page.open("model")
        for start in range(0, len(WORDS * 9), size):
            page.text((WORDS * 9)[start : start + size])
        page.end()
        pages.append(shown(capsys))
    assert pages[0] == pages[1] == pages[2]
    assert len(pages[0]) > 5
    assert all(len(line) <= WIDTH for line in pages[0])
    assert all(line.startswith(" " * INDENT) and len(line.rstrip()) >= BREAK for line in pages[0][2:-1])


def test_the_log_stands_between_the_words_with_the_pause(capsys: pytest.CaptureFixture[str]) -> None:
    news = News()
    for item in (Piece("a ra", 10.0), Piece("nk", 10.1), LogLine("watchdog: Hang"), Piece(" fails", 12.5), End()):
        news.put(item)
    answer = told(news)
    assert (answer.text, answer.error) == ("a rank fails", "")
    assert answer.gaps == pytest.approx([0.1, 2.4])
    assert answer.pauses == "0.1 s and 2.4 s"
    lines = [line.strip() for line in shown(capsys)]
    assert lines == ["a rank", "watchdog: Hang", "… 2.4 s without a token", "fails"]


def test_a_short_wait_is_no_pause(capsys: pytest.CaptureFixture[str]) -> None:
    news = News()
    for item in (Piece("one", 1.0), Piece(" two", 1.0 + PAUSE_S / 2), End()):
        news.put(item)
    told(news)
    assert [line.strip() for line in shown(capsys)] == ["one two"]


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (Answer(text="the same"), ""),
        (Answer(text="the sane"), "the answer is not the undisturbed one"),
        (Answer(text="the s", error="closed"), "the stream failed: closed"),
        (Answer(text="the same", error="closed"), "the stream failed: closed"),
    ],
)
def test_only_the_undisturbed_answer_passes(answer: Answer, problem: str) -> None:
    found = judge(answer, "the same")
    assert bool(found) == bool(problem)
    assert found.startswith(problem)


def test_the_trail_is_found_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        log.configure("engine")
        logging.getLogger("x").warning("watchdog: fault 1 epoch 1: Hang: rank 1")
        logging.getLogger("x").info("ready: http://0.0.0.0:8000")
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    found = [TRAIL.match(line) for line in capsys.readouterr().err.splitlines()]
    assert [match and match[2] for match in found] == ["watchdog: fault 1 epoch 1: Hang: rank 1", None]


@pytest.mark.parametrize(("fault", "rank", "tokens"), FAULTS)
def test_the_faults_are_of_the_command_line(fault: str, rank: int, tokens: int) -> None:
    words = ["inject", fault, f"--rank={rank}", "--phase=decode", f"--skip={tokens}"]
    assert options(words)["kind"] == fault
    assert rank in (0, 1)
    assert tokens < MAX_TOKENS
