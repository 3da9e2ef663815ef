"""The text tiny-chat learns from: the language reference that every Python carries, in `pydoc_data.topics`.

Two views of the same text. `prose()` is the reference as running text, for fluency; `lessons()` are pairs of a
subject and what the reference says of it, from which the conversations are made.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pydoc_data.topics import topics

from examples.training.subjects import SUBJECTS

ANSWER_CHARS = 230  # an answer takes whole sentences until it is this long: one breath, about 60 tokens
ESSAY_CHARS = 1100
_PLAIN = str.maketrans(
    {
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2013": "-",
        "\u2014": "-",
        "\u2026": "...",
        "\xa0": " ",
    }
)
_POINTER = re.compile(r"^See |^The syntax|section|the following")  # to what an answer does not hold
_METHOD = re.compile(
    r"^(?P<owner>object|str|class|container|iterator|generator|agen|coroutine|instance)?\.?"
    r"(?P<name>[a-z_]+)\([^\n]*\)\n(?:[a-z_.]+\([^\n]*\)\n)*\n(?P<body>(?:   [^\n]*\n|\n)+)",
    re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class Lesson:
    """What the reference says of something: `names` it goes by in a question, a short `answer`, perhaps an `essay`."""

    names: tuple[str, ...]
    plural: bool
    answer: str
    essay: str = ""


def prose() -> list[str]:
    """Every topic as plain text, its line breaks joined, in the order of the topics' names."""
    return ["\n\n".join(_paragraphs(topics[name])) for name in sorted(topics)]


def lessons() -> list[Lesson]:
    """The lessons about topics, then those about methods; a topic this Python lacks is left out."""
    found = [_lesson(key, names) for key, names in SUBJECTS.items() if key in topics]
    return found + list(_methods())


def _lesson(key: str, names: tuple[str, ...]) -> Lesson:
    paragraphs = _paragraphs(topics[key])
    answer, essay = _sentences(paragraphs, ANSWER_CHARS), _sentences(paragraphs, ESSAY_CHARS)
    return Lesson(names, names[0].endswith("s"), answer, essay if len(essay) > 2 * len(answer) else "")


def _methods() -> Iterator[Lesson]:
    """One lesson for each method the reference describes (`object.__len__(self)`, then an indented text)."""
    seen: set[str] = set()
    for name in ("specialnames", "string-methods"):
        for match in _METHOD.finditer(topics[name]):
            body = re.sub(r"^   ", "", match["body"], flags=re.MULTILINE)
            answer = _sentences(_paragraphs("\n\n" + body), ANSWER_CHARS)
            full = f"str.{match['name']}" if match["owner"] == "str" else match["name"]
            if answer and full not in seen:
                seen.add(full)
                yield Lesson((full, f"the {match['name']} method"), False, answer)


def _paragraphs(text: str) -> list[str]:
    """The prose of a topic, without its headings, grammar, code and lists."""
    blocks = [block for block in text.translate(_PLAIN).split("\n\n") if block.strip()]
    followed = zip(blocks, [*blocks[1:], ""], strict=True)
    return [_plain(block, "::=" in after) for block, after in followed if _is_prose(block)]


def _is_prose(block: str) -> bool:
    lines = block.strip("\n").split("\n")
    heading = len(lines) > 1 and set(lines[1]) <= set("*=-~^")
    listed = re.match(r"\n*( |\*|-|\+|\||\[|\d\.|New in|Changed in|See also|Note:)", block)
    return not (heading or listed or "::=" in block or "**" in block or len(block) < 30)


def _plain(block: str, introduces_grammar: bool) -> str:
    """One paragraph as one line; a colon that led to the grammar left out ends the sentence instead."""
    text = " ".join(line.strip() for line in block.strip().split("\n"))
    text = re.sub(r" \((?:see|See)[^()]*\)| \[\d+\]", "", text)
    text = re.sub(r"(?<!\w)\*([\w. ]+)\*(?!\w)", r"\1", text)
    text = re.sub(r"(\w)- (\w)", r"\1-\2", text)
    text = re.sub(r'"([^"\s][^"]*)"', r"`\1`", re.sub(r"  +", " ", text))
    return re.sub(r":$", ".", text) if introduces_grammar else text


def _sentences(paragraphs: list[str], limit: int) -> str:
    """Whole sentences from the start of the prose: the first, then more while all are at most `limit` characters."""
    kept = ""
    for sentence in (part for text in paragraphs for part in re.split(r"(?<=[a-z`)]\.)(?<!e\.g\.)\s+(?=[A-Z`])", text)):
        if not sentence.endswith(".") or _POINTER.search(sentence):
            continue
        if kept and len(kept) + len(sentence) > limit:
            break
        kept = f"{kept} {sentence}".strip()
    return kept
