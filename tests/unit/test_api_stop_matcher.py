"""Stop strings never leak, however a text is cut into pieces."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep_runtime.api.stop_matcher import StopMatcher


def cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The specification: up to the stop string that ends first, of those the longest."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - len(max(ending, key=len))], True
    return text, False


@given(
    st.lists(st.text("ab ", max_size=4), max_size=12),
    st.lists(st.text("ab ", min_size=1, max_size=5), max_size=4),
)
@settings(max_examples=1000)
def test_stop_strings_never_leak_however_the_text_is_cut(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    out = ""
    for piece in pieces:
        out += matcher.feed(piece)
        assert cut("".join(pieces), stops)[0].startswith(out)
        if matcher.stopped:
            break
    else:
        out += matcher.finish()
    assert (out, matcher.stopped) == cut("".join(pieces), stops)


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    matcher = StopMatcher(["STOP"])
    assert [matcher.feed(text) for text in ("go S", "T", "ART ST", "OP")] == ["go ", "", "START ", ""]
    assert matcher.stopped


def test_without_stop_strings_nothing_is_held_back() -> None:
    matcher = StopMatcher([])
    assert matcher.feed("at once") == "at once"
    assert matcher.finish() == ""
