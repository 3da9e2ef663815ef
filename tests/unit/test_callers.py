"""Who may ask a supervisor for what, while the operator's token changes under it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lockstep_runtime.protocol.tokens import Purpose, purpose_token
from lockstep_runtime.supervisor.callers import Callers

OPERATORS = (Purpose.STATUS, Purpose.FENCE)


def allowed(callers: Callers, token: str) -> list[Purpose]:
    return [purpose for purpose in Purpose if callers.may(purpose_token(token, purpose), purpose)]


def test_the_groups_token_is_good_for_all_and_the_operators_for_what_it_needs(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("of the operator\n")
    callers = Callers("of the group", file)
    assert allowed(callers, "of the group") == list(Purpose)
    assert allowed(callers, "of the operator") == list(OPERATORS)
    assert allowed(callers, "of another") == []
    assert not callers.may(purpose_token("of the operator", Purpose.STATUS), Purpose.FENCE)
    assert not callers.may("of the operator", Purpose.FAULTS)


def test_another_token_in_the_file_is_taken_up_and_the_one_before_it_is_not(tmp_path: Path) -> None:
    """As a kubelet does it: the file is a link that is replaced."""
    file = tmp_path / "token"
    for name in ("first", "second"):
        (tmp_path / name).write_text(name)
        (tmp_path / "new").symlink_to(tmp_path / name)
        (tmp_path / "new").replace(file)
    callers = Callers("of the group", file)
    assert (allowed(callers, "first"), allowed(callers, "second")) == ([], list(OPERATORS))


def test_while_the_file_is_missing_the_last_token_holds_and_that_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "token"
    file.write_text("of the operator")
    callers = Callers("of the group", file)
    assert allowed(callers, "of the operator") == list(OPERATORS)
    file.unlink()
    assert allowed(callers, "of the operator") == list(OPERATORS)
    assert len(caplog.records) == 1
    file.write_text("another")
    assert allowed(callers, "of the operator") == []


@pytest.mark.parametrize("content", [None, "", "\n"])
def test_without_a_token_of_the_operators_nobody_has_it(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "token"
    if content is not None:
        file.write_text(content)
    callers = Callers("of the group", file)
    assert not callers.may("", Purpose.STATUS)
    assert allowed(callers, "") == []
    assert allowed(callers, "of the group") == list(Purpose)
