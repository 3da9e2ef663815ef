"""What the live page is sent: all that it shows, then only what changed, and nothing that nobody looks at."""

from __future__ import annotations

import msgspec
import pytest
from tests.support.live_models import KEY, hang, report_of, status_of

from lockstep_operator.live.board import FAULTS_KEPT, Board
from lockstep_operator.live.cards import GROUPS_SHOWN, RANKS_SHOWN, TEXT_LIMIT, Mood
from lockstep_operator.live.session import FAULTS_SHOWN, PAGE_SIZE, Session, View, read_view
from lockstep_operator.types.model_status import GroupSummary, LastRecovery
from lockstep_operator.types.names import ModelKey
from lockstep_operator.types.observed import GroupReport
from lockstep_operator.types.recovery_state import RecoveryAction, RecoveryState, Rung
from lockstep_runtime.protocol.status import GroupState

NOW = 1_800_000_000.0


def board_of(*names: str) -> Board:
    board = Board()
    for name in names:
        board.model(ModelKey("team", name), status_of(), {0: GroupReport(report_of())})
    return board


def test_the_first_message_has_everything_and_the_next_what_changed() -> None:
    board = board_of("a", "b")
    session = Session(board, View())
    first = session.message(NOW)
    assert (first.ids, [one.id for one in first.models]) == (["team/a", "team/b"], ["team/a", "team/b"])
    assert (first.tally, first.pages, first.matching) == ({"ready": 2}, 1, 2)

    again = session.message(NOW)
    assert (again.ids, again.models, again.fault_ids, again.faults) == (None, [], None, [])

    board.heard(ModelKey("team", "b"), 0, report_of(revision=2, requests_running=3))
    changed = session.message(NOW)
    assert changed.ids is None
    assert [(one.id, one.groups[0].running) for one in changed.models] == [("team/b", 3)]


def test_a_report_is_shown_before_the_pass_that_it_causes_and_not_undone_by_an_older_one() -> None:
    board = board_of("chat")
    before = GroupReport(report_of(revision=1))
    board.heard(KEY, 0, report_of(0, hang(NOW), revision=2, absent=[1], state=GroupState.RECOVERING))
    board.model(KEY, status_of(), {0: before})  # of a pass that began earlier
    (card,) = Session(board, View()).message(NOW).models
    assert card.mood is Mood.HEALING
    assert [(one.rank, one.state, one.suspect) for one in card.groups[0].ranks] == [
        (0, "Ready", False),
        (1, "Absent", True),
    ]
    board.model(KEY, status_of(), {0: GroupReport(report_of(incarnation="another pod"))})
    assert Session(board, View()).message(NOW).models[0].mood is Mood.READY


def test_faults_are_listed_once_as_they_go_on_and_survive_their_group() -> None:
    board = board_of("chat")
    session = Session(board, View())
    board.heard(KEY, 0, report_of(0, hang(NOW), revision=2))
    (opened,) = session.message(NOW).faults
    assert (opened.fault, opened.group, opened.rank, opened.recovered_at) == ("Hang", 0, 1, None)
    board.heard(KEY, 0, report_of(0, hang(NOW, healed=True), revision=3))
    closed = session.message(NOW)
    assert closed.fault_ids is None
    assert [(one.id, one.resumed, one.phases["rebuild"]) for one in closed.faults] == [(opened.id, 3, 0.019)]
    board.model(KEY, status_of(), {})
    assert session.message(NOW).fault_ids is None
    board.forget(KEY)
    gone = session.message(NOW)
    assert (gone.ids, gone.fault_ids) == ([], [])


def test_a_repair_by_the_operator_is_one_too() -> None:
    repair = LastRecovery(
        fault="Hang", group=0, rung="RecyclePod", phases={"detect": 2.0, "recycle": 4.0}, finished_at=NOW
    )
    board = Board()
    board.model(KEY, status_of(last_recovery=repair), {})
    (fault,) = Session(board, View()).message(NOW).faults
    assert (fault.rung, fault.at, fault.recovered_at) == ("RecyclePod", NOW - 6, NOW)


def test_the_step_of_the_operator_is_the_groups_sentence() -> None:
    action = RecoveryAction(
        rung=Rung.RECYCLE_POD,
        trigger="t",
        fault="Hang",
        reason="pod chat-0-1 is replaced",
        pods=(),
        since=NOW,
        noticed=NOW,
    )
    summary = GroupSummary(group=0, state="Poisoned", recovery=RecoveryState(action=action))
    status = msgspec.structs.replace(status_of(message="broken"), groups=(summary,))
    board = Board()
    board.model(KEY, status, {0: GroupReport(report_of(state=GroupState.POISONED))})
    (card,) = Session(board, View()).message(NOW).models
    assert (card.mood, card.groups[0].message) == (Mood.HEALING, "pod chat-0-1 is replaced")


def test_a_group_that_does_not_answer_is_shown_as_the_status_has_it() -> None:
    board = Board()
    status = status_of(message="group 0 can't be asked", stalled=True)
    unknown = msgspec.structs.replace(status, groups=(GroupSummary(group=0, state="Unknown", message="no answer"),))
    board.model(KEY, unknown, {0: GroupReport(report_of(), unreachable_since=NOW, error="no route")})
    (card,) = Session(board, View()).message(NOW).models
    assert (card.mood, card.reason, card.groups[0].state) == (Mood.STALLED, "Because", "Unknown")


def test_what_is_shown_is_bounded() -> None:
    """2,000 large models, all in trouble: a page is some hundred kilobytes once, and then only what changed."""
    board = Board()
    words = "x" * 10_000
    groups = range(GROUPS_SHOWN + 4)
    for number in range(2000):
        key = ModelKey("team", f"model-{number:04}")
        faults = [hang(NOW + one, number=one, message=words) for one in range(32)]
        reports = {
            group: GroupReport(report_of(group, *faults, size=RANKS_SHOWN + 9, absent=[40], message=words))
            for group in groups[:1]
        }
        board.model(key, status_of(len(groups), message=words), reports)
    session = Session(board, View(page=7))
    first = session.message(NOW)
    assert (first.page, first.pages, first.matching) == (7, 100, 2000)
    assert (len(first.models), len(first.faults)) == (PAGE_SIZE, FAULTS_SHOWN)
    assert first.models[0].id == f"team/model-{6 * PAGE_SIZE:04}"
    assert (len(first.models[0].groups), first.models[0].size) == (GROUPS_SHOWN, len(groups))
    ranks = first.models[0].groups[0].ranks
    assert (len(ranks), ranks[-1].rank, ranks[-1].state) == (RANKS_SHOWN, 40, "Absent")  # trouble first
    assert len(first.models[0].message) == TEXT_LIMIT + 1
    assert len(msgspec.json.encode(first)) < 256 * 1024
    assert len(board.faults()) == FAULTS_KEPT
    board.model(ModelKey("team", "model-0000"), status_of(), {})  # on another page
    assert len(msgspec.json.encode(session.message(NOW))) < 300


def test_models_are_found_by_name_and_by_state() -> None:
    board = board_of("alpha", "beta")
    board.model(ModelKey("other", "alpha"), status_of(message="no such folder", stalled=True), {})
    assert Session(board, View(text="ALPHA")).message(NOW).ids == ["other/alpha", "team/alpha"]
    found = Session(board, View(text="alpha", mood=Mood.STALLED, page=9)).message(NOW)
    assert (found.ids, found.page, found.tally) == (["other/alpha"], 1, {"ready": 2, "stalled": 1})


@pytest.mark.parametrize("query", [{"page": "0"}, {"page": "x"}, {"mood": "happy"}, {"text": "x" * 101}])
def test_what_is_asked_wrongly_is_refused_with_a_sentence(query: dict[str, str]) -> None:
    with pytest.raises(msgspec.ValidationError, match=r"page|mood|enum|int"):
        read_view(query)
    assert read_view({"page": "2", "mood": "stalled"}) == View(page=2, mood=Mood.STALLED)
