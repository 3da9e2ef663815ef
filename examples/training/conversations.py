"""Conversations in ChatML, made from the lessons: every name, phrasing and length of answer, in random order."""

import random
import re
from collections.abc import Iterator
from keyword import iskeyword

from examples.training.corpus import Lesson
from examples.training.subjects import ESSAY_QUESTIONS, QUESTIONS, SMALL_TALK, SYSTEMS

Turn = tuple[str, str]  # what the user says, what the assistant answers


def conversations(lessons: list[Lesson], rng: random.Random, essays: int) -> Iterator[str]:
    """Without end: each round teaches every lesson once, and `essays` long answers; most conversations are one turn."""
    while True:
        turns = _round(lessons, rng, essays)
        while turns:
            count = rng.choices((1, 2, 3), (6, 2, 1))[0]
            system = rng.choice(SYSTEMS) if rng.random() < 0.2 else ""
            yield render(turns[:count], system)
            turns = turns[count:]


def render(turns: list[Turn], system: str = "") -> str:
    """The turns as the model's chat template would write them."""
    lines = [f"<|im_start|>system\n{system}<|im_end|>\n"] if system else []
    for user, assistant in turns:
        lines.append(f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n{assistant}<|im_end|>\n")
    return "".join(lines)


def _round(lessons: list[Lesson], rng: random.Random, essays: int) -> list[Turn]:
    turns = [(_question(lesson, QUESTIONS, rng), lesson.answer) for lesson in lessons]
    long = rng.sample([lesson for lesson in lessons if lesson.essay], essays)
    turns += [(_question(lesson, ESSAY_QUESTIONS, rng), lesson.essay) for lesson in long]
    turns += rng.sample(SMALL_TALK, 20)
    rng.shuffle(turns)
    return turns


def _question(lesson: Lesson, phrasings: tuple[str, ...], rng: random.Random) -> str:
    name = rng.choice(lesson.names)
    plural = name.endswith("s") and not name.startswith(("the ", "a ")) and lesson.plural
    quoted = rng.random() < 0.25
    name = " ".join(f"`{word}`" if quoted and _is_code(word) else word for word in name.split())
    question = rng.choice(phrasings).format(
        name=name, does="do" if plural else "does", **{"is": "are" if plural else "is"}
    )
    return re.sub(r"[?.]$", "", question) if rng.random() < 0.1 else question


def _is_code(word: str) -> bool:
    return iskeyword(word) or "__" in word or word.startswith("str.")
