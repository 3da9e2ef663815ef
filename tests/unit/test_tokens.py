"""What is overheard on one way opens no other."""

from __future__ import annotations

import pytest

from lockstep_runtime.protocol.tokens import Purpose, entitles, purpose_token


@pytest.mark.parametrize("purpose", Purpose)
def test_a_token_is_good_for_its_purpose_and_its_group_alone(purpose: Purpose) -> None:
    given = purpose_token("of the group", purpose)
    assert [other for other in Purpose if entitles(given, "of the group", other)] == [purpose]
    assert not entitles(given, "of another group", purpose)
    assert "of the group" not in given


def test_the_groups_own_token_is_good_for_all_and_nothing_else_for_any() -> None:
    for purpose in Purpose:
        assert entitles("of the group", "of the group", purpose)
        for wrong in ("", "of the grouq", "of the group ", "größe", purpose_token("of the group", purpose).upper()):
            assert not entitles(wrong, "of the group", purpose)
