"""What schedulers and queues read from a group's StatefulSet, and what becomes of a group that a queue has admitted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from tests.support.kube_fake import resource
from tests.support.operator_models import NOW, SETTINGS, model, pod, revision_of, tokens_of

from lockstep_operator.decisions import manifests
from lockstep_operator.decisions.actions import Action, Apply, Delete
from lockstep_operator.decisions.planner import decide
from lockstep_operator.decisions.pod_template import rendered
from lockstep_operator.types.model_status import GroupSummary, ModelStatus
from lockstep_operator.types.observed import Observed, Pod
from lockstep_operator.types.recovery_state import RecoveryAction, RecoveryState, Rung
from lockstep_operator.types.spec import Model, parse
from lockstep_operator.types.spec_blocks import GroupMetadata, Rollout

QUEUE = {"kueue.x-k8s.io/queue-name": "team"}


def metadata(made: Model, group: int = 0) -> Mapping[str, Any]:
    found: Mapping[str, Any] = manifests.stateful_set(made, group, "abc", rendered(made, SETTINGS))["metadata"]
    return found


def queued(queue: str = "team", **fields: Any) -> Model:
    return model(group_metadata=GroupMetadata({"kueue.x-k8s.io/queue-name": queue}), **fields)


def moved_to(**selector: str) -> Mapping[str, Any]:
    return {"spec": {"nodeSelector": selector}}


def actions(before: Model, after: Model, *pods: Pod, status: ModelStatus | None = None) -> tuple[Action, ...]:
    """What is done about `after`, beside keeping what pods are made from, where everything is as `before` asks."""
    revision = revision_of(before)
    every = [
        *manifests.shared(before), *manifests.of_group(before, 0, SETTINGS),
        manifests.stateful_set(before, 0, revision, rendered(before, SETTINGS)), manifests.disruption_budget(before, 1),
    ]  # fmt: skip
    extra = {"uid": "uid-0", "resourceVersion": "7", "generation": 1, "creationTimestamp": "2027-01-15T07:00:00Z"}
    children = {
        (item["kind"], item["metadata"]["name"]): item
        | {"metadata": item["metadata"] | extra, "status": {"observedGeneration": 1}}
        for item in every
    }
    known = pods or (pod(0, 0, revision), pod(0, 1, revision))
    observed = Observed(
        status=status or ModelStatus(tokens=tokens_of(after)), resource_version="1", children=children, pods=known
    )
    decided = decide(after, observed, NOW, SETTINGS).actions
    return tuple(action for action in decided if action.target[0] != "ControllerRevision")


def test_labels_and_annotations_are_the_groups_own() -> None:
    wanted = GroupMetadata({"gang": "chat-$(group)", "$(group)": "x"}, {"size": "$(pods) of $(group)"})
    made = model(group_metadata=wanted, tensor_parallel_size=4, ranks_per_pod=2)
    found = metadata(made, 7)
    assert {name: found["labels"][name] for name in ("gang", "$(group)")} == {"gang": "chat-7", "$(group)": "x"}
    assert found["annotations"]["size"] == "2 of 7"


def test_the_operators_own_labels_win() -> None:
    found = metadata(model(group_metadata=GroupMetadata({"lockstep.dev/group": "9", "lockstep.dev/revision": "other"})))
    assert (found["labels"]["lockstep.dev/group"], found["labels"]["lockstep.dev/revision"]) == ("0", "abc")


def test_no_pod_is_replaced_for_a_label_of_its_statefulset() -> None:
    before, after = model(), model(group_metadata=GroupMetadata({"team": "red"}, {"cost": "high"}))
    (action,) = actions(before, after)
    assert isinstance(action, Apply)
    assert (action.kind, action.repairs) == ("StatefulSet", "")
    (back,) = actions(after, before)
    assert isinstance(back, Apply)


@pytest.mark.parametrize(("scheduler", "minimum"), [("volcano", "2"), ("default-scheduler", None), (None, None)])
def test_volcano_is_told_how_many_pods_belong_together(scheduler: str | None, minimum: str | None) -> None:
    made = model(template={"spec": {"schedulerName": scheduler}} if scheduler else {})
    assert metadata(made)["annotations"].get("scheduling.volcano.sh/group-min-member") == minimum


def test_but_who_knows_better_says_so() -> None:
    own = GroupMetadata(annotations={"scheduling.volcano.sh/group-min-member": "1"})
    made = model(template={"spec": {"schedulerName": "volcano"}}, group_metadata=own)
    assert metadata(made)["annotations"]["scheduling.volcano.sh/group-min-member"] == "1"


def test_a_models_queue_is_its_groups() -> None:
    live = resource(groupMetadata={"labels": {"kueue.x-k8s.io/priority-class": "high"}})
    labels = QUEUE | {"kueue.x-k8s.io/priority-class": "low", "team": "red", "app.kubernetes.io/name": "theirs"}
    live["metadata"] |= {"uid": "u", "labels": labels}
    assert parse(live).group_metadata.labels == QUEUE | {"kueue.x-k8s.io/priority-class": "high"}


def test_a_group_without_a_queue_follows_a_new_place_where_it_is() -> None:
    (action,) = actions(model(), model(template=moved_to(rack="a")))
    assert isinstance(action, Apply)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (queued(), queued(template=moved_to(rack="a"))),
        (queued(template=moved_to(rack="a", zone="z")), queued(template=moved_to(rack="a"))),
        (queued(), queued("other")),
        (model(), queued()),
        (queued(), model()),
    ],
    ids=["another place", "a selector less", "another queue", "a first queue", "no queue"],
)
def test_a_group_in_a_queue_is_recreated_for_what_the_queue_does_not_let_change(before: Model, after: Model) -> None:
    assert actions(before, after) == (
        Delete("StatefulSet", "chat-0", "uid-0", "StatefulSet chat-0 is recreated: its queue admits it anew"),
    )


def test_but_not_for_what_it_lets_change() -> None:
    (action,) = actions(queued(), queued(rollout=Rollout(max_unavailable=2), served_name="other"))
    assert isinstance(action, Apply)


def avoiding(node: str, *, pods: tuple[str, ...] = ()) -> ModelStatus:
    step = RecoveryAction(
        rung=Rung.MOVE_AWAY, trigger="x", fault="Hang", rank=0, reason="away", pods=pods, since=NOW, noticed=NOW
    )
    state = RecoveryState(action=step if pods else None, avoided={node: NOW + 60})
    return ModelStatus(tokens=tokens_of(queued()), groups=(GroupSummary(group=0, recovery=state),))


def test_an_admitted_group_that_serves_is_left_as_it_was_admitted() -> None:
    """Its pods would not move anyway: the place is for those that come."""
    assert actions(queued(), queued(), status=avoiding("n1")) == ()


def test_one_that_recovery_moves_is_admitted_anew() -> None:
    revision = revision_of(queued())
    broken = tuple(pod(0, index, revision, ready=False) for index in range(2))
    status = avoiding("n1", pods=("uid-0-0", "uid-0-1"))
    (action,) = actions(queued(), queued(), *broken, status=status)
    assert isinstance(action, Delete)
    assert (action.kind, action.name) == ("StatefulSet", "chat-0")
