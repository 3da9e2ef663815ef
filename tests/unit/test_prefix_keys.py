"""What makes two blocks the same: every token up to their ends, where they are cut, and the salt."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lockstep_runtime.engine.prefix_keys import PrefixKeys
from lockstep_runtime.protocol.images import ImageSpan

tokens = st.lists(st.integers(0, 2), max_size=12)
salts = st.sampled_from(["", "a", "b"])


@given(tokens, tokens, salts, salts, st.integers(1, 4))
def test_keys_are_equal_exactly_where_everything_before_is(
    one: list[int], other: list[int], salt: str, another: str, size: int
) -> None:
    keys = PrefixKeys(salt, size).of(one, len(one) // size)
    others = PrefixKeys(another, size).of(other, len(other) // size)
    for end in range(1, min(len(keys), len(others)) + 1):
        same = salt == another and one[: end * size] == other[: end * size]
        assert (keys[end - 1] == others[end - 1]) == same
    assert len(set(keys)) == len(keys)


@given(tokens, st.integers(1, 4), st.data())
def test_tokens_may_come_one_by_one(one: list[int], size: int, data: st.DataObject) -> None:
    grown, whole = PrefixKeys("", size), PrefixKeys("", size).of(one, len(one) // size)
    for length in range(len(one) + 1):
        assert grown.of(one[:length], length // size) == whole[: length // size]
    fewer = data.draw(st.integers(0, len(whole)))
    assert grown.of(one, fewer) == whole[:fewer]


def test_an_image_is_part_of_the_blocks_that_it_reaches_into() -> None:
    prompt = [7] * 16

    def keys(*images: ImageSpan) -> list[bytes]:
        return PrefixKeys("", 4, images).of(prompt, 4)

    def image(digest: str, start: int = 6, rows: int = 1, columns: int = 4) -> ImageSpan:
        return ImageSpan(digest=digest, start=start, rows=rows, columns=columns)

    assert keys(image("a")) == keys(image("a"))
    assert keys(image("a"))[0] == keys()[0]
    others = [(), (image("b"),), (image("a", start=5),), (image("a", rows=4, columns=1),), (image("a"), image("b", 11))]
    for other in others:
        end = 2 if len(other) > 1 else 1
        assert keys(*other)[:end] == keys(image("a"))[:end]
        assert not set(keys(*other)[end:]) & set(keys(image("a"))[end:])
