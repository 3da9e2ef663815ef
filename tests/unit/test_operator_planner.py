"""What is done about a model, in which order and why."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace
from tests.support.operator_models import NOW, SETTINGS, model, pod, revision_of, tokens_of

from lockstep_operator.decisions import manifests
from lockstep_operator.decisions.actions import Apply, Delete, MakeTokens
from lockstep_operator.decisions.manifests import Kept
from lockstep_operator.decisions.planner import Decision, decide
from lockstep_operator.decisions.pod_template import pod_template, rendered
from lockstep_operator.reconcile import targets
from lockstep_operator.types.model_status import GroupSummary, ModelStatus, Tokens
from lockstep_operator.types.names import API_VERSION, KIND
from lockstep_operator.types.observed import GroupReport, Observed, Pod
from lockstep_operator.types.operator_key import OperatorKey
from lockstep_operator.types.recovery_state import RecoveryAction, RecoveryState, Rung
from lockstep_operator.types.spec import Model
from lockstep_operator.types.spec_blocks import Network, Ports, RecoverySpec

Child = dict[str, Any]
REVISION = revision_of(model())


def live(manifest: Child, **metadata: Any) -> Child:
    uid = f"uid-{manifest['metadata']['name'].rpartition('-')[2]}"
    extra = {"uid": uid, "resourceVersion": "7", "generation": 1, "creationTimestamp": "2027-01-15T07:00:00Z"}
    return manifest | {"metadata": manifest["metadata"] | extra | metadata, "status": {"observedGeneration": 1}}


def everything(made: Model, revision: str | None = None, *, groups: int | None = None) -> dict[tuple[str, str], Child]:
    found = revision_of(made) if revision is None else revision
    count = made.replicas if groups is None else groups
    budget = manifests.disruption_budget(made, max(0, made.replicas * made.pods_per_group - 1))
    kept = Kept(revision=found, number=1, shape="", requested=None, rendering=rendered(made, SETTINGS))
    every = [*manifests.shared(made), budget, manifests.template(made, kept)]
    for index in range(count):
        every += [
            *manifests.of_group(made, index, SETTINGS),
            manifests.stateful_set(made, index, found, rendered(made, SETTINGS)),
        ]
    return {(item["kind"], item["metadata"]["name"]): live(item) for item in every}


def pods(made: Model, revision: str, groups: int | None = None) -> tuple[Pod, ...]:
    count = made.replicas if groups is None else groups
    return tuple(pod(index, number, revision) for index in range(count) for number in range(made.pods_per_group))


def decided(made: Model, children: dict[tuple[str, str], Child], of: tuple[Pod, ...] = (), **fields: Any) -> Decision:
    found: dict[str, Any] = {
        "status": ModelStatus(tokens=tokens_of(made)),
        "resource_version": "1",
        "children": children,
        "pods": of,
    }
    return decide(made, Observed(**(found | fields)), NOW, SETTINGS)


def reasons(decision: Decision) -> list[str]:
    return [action.reason for action in decision.actions]


def test_nothing_is_done_when_everything_is_as_the_spec_asks() -> None:
    made = model(replicas=2)
    decision = decided(made, everything(made), pods(made, REVISION))
    assert decision.actions == ()
    assert (decision.revision, decision.bugs) == (REVISION, ())


def test_a_new_model_gets_its_tokens_first_and_no_pods_without_them() -> None:
    made = model()
    decision = decided(made, {}, status=ModelStatus(), operator_key="k")
    secret, tokens = f"chat-token-{made.tokens_id}", Tokens(key="k", id=made.tokens_id, time=NOW)
    assert decision.actions[0] == MakeTokens(secret, tokens, "Secrets with the tokens of team/chat are made")
    workload = next(action for action in decision.actions if action.target == ("StatefulSet", "chat-0"))
    assert ("Secret", secret) in workload.needs


ANOTHER_DAY = 1_790_000_000.0


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"operator_key": "another"}, "is made anew: the operator has another key"),
        ({"asked": ANOTHER_DAY}, "new Secrets with the tokens of team/chat are made, as was asked for"),
    ],
)
def test_tokens_of_another_key_or_an_older_request_are_made_anew(fields: dict[str, Any], reason: str) -> None:
    asked = fields.get("asked")
    made = model(new_tokens_at=asked)
    status = ModelStatus(tokens=tokens_of(model()))
    observed = {"operator_key": fields.get("operator_key", ""), "status": status}
    (action,) = [one for one in decided(made, everything(made), **observed).actions if isinstance(one, MakeTokens)]
    assert reason in action.reason
    assert (action.made.key, action.made.id) == (observed["operator_key"], made.tokens_id)
    assert (made.tokens_id == model().tokens_id) is (asked is None)


@pytest.mark.parametrize(("made_ago", "again"), [(61, True), (59, False)])
def test_a_pod_that_misses_its_secret_has_it_made_anew(made_ago: float, again: bool) -> None:
    made = model()
    secret = f"chat-token-{made.tokens_id}"
    waiting = {"reason": "CreateContainerConfigError", "message": f'secret "{secret}" not found'}
    raw = {"spec": {}, "status": {"containerStatuses": [{"name": "lockstep", "state": {"waiting": waiting}}]}}
    of = (pod(0, 0, REVISION), pod(0, 1, REVISION, ready=False, raw=raw))
    status = ModelStatus(tokens=replace(tokens_of(made), time=NOW - made_ago))
    found = [action.reason for action in decided(made, everything(made), of, status=status).actions]
    expected = "Secrets with the tokens of team/chat are made anew: pod chat-0-1 can't start without one"
    assert found == ([expected] if again else [])


@pytest.mark.parametrize(
    ("refused_for", "made_ago", "has_tokens", "again"),
    [(181, 1801, True, True), (179, 1801, True, False), (1801, 1799, True, False), (1801, 1801, False, False)],
)
def test_a_pod_that_refuses_the_operator_for_long_has_its_secret_made_anew(
    refused_for: float, made_ago: float, has_tokens: bool, again: bool
) -> None:
    """Not one of an older version: it has another Secret, which nothing would change."""
    made = model()
    raw = {"spec": pod_template(made, 0, REVISION, SETTINGS)["spec"] if has_tokens else {}}
    of = (pod(0, 0, REVISION, raw=raw), pod(0, 1, REVISION))
    status = ModelStatus(tokens=replace(tokens_of(made), time=NOW - made_ago))
    report = GroupReport(unreachable_since=NOW - refused_for, error="no", refused=True)
    found = decided(made, everything(made), of, status=status, reports={0: report})
    expected = f"Secret chat-operator-{made.tokens_id} is made anew: pod chat-0-0 doesn't take the operator's token"
    assert reasons(found) == ([expected] if again else [])
    assert found.recoveries[0].state.action is None, "it is alive"


def test_then_each_groups_names_and_walls_come_before_its_pods() -> None:
    made = model()
    children = {key: child for key, child in everything(made).items() if not key[1].endswith("-0")}
    assert reasons(decided(made, children)) == [
        "Service chat-0 is missing", "NetworkPolicy chat-0 is missing", "StatefulSet chat-0 is missing",
    ]  # fmt: skip


def test_drift_is_told_apart_from_a_wish_of_ours() -> None:
    made = model()
    children = everything(made)
    children["Service", "chat"]["spec"] = children["Service", "chat"]["spec"] | {"type": "NodePort"}
    changed = children["ServiceAccount", "chat-ranks"]
    changed["metadata"] = changed["metadata"] | {"annotations": {"lockstep.dev/applied": "older"}}
    drifted = [action for action in decided(made, children, pods(made, REVISION)).actions if isinstance(action, Apply)]
    assert [(action.kind, bool(action.repairs)) for action in drifted] == [("ServiceAccount", False), ("Service", True)]
    assert drifted[1].reason == "Service chat differs: spec.type: NodePort instead of ClusterIP"


def test_what_the_server_rewrites_is_left_alone() -> None:
    made = model()
    children = everything(made)
    children["Service", "chat"]["spec"] = children["Service", "chat"]["spec"] | {"type": "NodePort"}
    server_mutations = {("Service", "chat"): frozenset({"spec.type: NodePort instead of ClusterIP"})}
    assert decided(made, children, pods(made, REVISION), server_mutations=server_mutations).actions == ()


def test_a_changed_spec_first_changes_the_statefulset_whose_turn_it_is() -> None:
    made = model(replicas=2)
    decision = decided(made, everything(made, "old"), pods(made, "old"))
    kept = f"ControllerRevision chat-{REVISION} is missing"
    assert reasons(decision) == [kept, f"group 1 gets revision {REVISION}: it is next"]
    assert decision.actions[0].target in decision.actions[1].needs, "no pod is made from what isn't kept"


def test_then_its_pods_go_once_the_controller_has_seen_the_new_template() -> None:
    made = model()
    children = everything(made)
    unseen = {
        **children,
        ("StatefulSet", "chat-0"): children["StatefulSet", "chat-0"] | {"status": {"observedGeneration": 0}},
    }
    assert decided(made, unseen, pods(made, "old")).actions == ()
    assert decided(made, children, pods(made, "old")).actions == (
        Delete("Pod", "chat-0-0", "uid-0-0", f"pod chat-0-0 has revision old instead of {REVISION}"),
        Delete("Pod", "chat-0-1", "uid-0-1", f"pod chat-0-1 has revision old instead of {REVISION}"),
    )
    ending = tuple(pod(0, index, "old", deleting=NOW + 30) for index in range(2))
    assert decided(made, children, ending).actions == ()


def test_a_statefulset_that_can_not_be_changed_is_made_anew() -> None:
    made = model()
    children = everything(made)
    workload = children["StatefulSet", "chat-0"]
    children["StatefulSet", "chat-0"] = workload | {"spec": workload["spec"] | {"podManagementPolicy": "OrderedReady"}}
    (action,) = decided(made, children, pods(made, REVISION)).actions
    assert isinstance(action, Delete)
    found = "podManagementPolicy: OrderedReady instead of Parallel"
    assert action.reason == f"StatefulSet chat-0 can't be changed in place ({found}) and is recreated"


def test_groups_beyond_replicas_lose_their_pods_first_and_then_their_names() -> None:
    made = model(replicas=1)
    children = everything(made, groups=2)
    first = decided(made, children, pods(made, REVISION, groups=2))
    assert reasons(first) == ["group 1 is beyond replicas 1"]
    del children["StatefulSet", "chat-1"]
    assert decided(made, children, pods(made, REVISION, groups=2)).actions == ()
    assert reasons(decided(made, children, pods(made, REVISION))) == [
        "Service chat-1 of the removed group is left over", "NetworkPolicy chat-1 of the removed group is left over",
    ]  # fmt: skip


def test_a_network_policy_that_is_no_longer_asked_for_goes() -> None:
    made = model(network=Network(policy="None"))
    children = everything(model())
    assert reasons(decided(made, children, pods(made, REVISION))) == ["NetworkPolicy chat-0 is no longer asked for"]
    del children["NetworkPolicy", "chat-0"]
    assert decided(made, children, pods(made, REVISION)).actions == ()


def test_somebody_elses_network_policy_is_left_alone() -> None:
    made = model(network=Network(policy="None"))
    children = everything(model())
    children["NetworkPolicy", "chat-0"]["metadata"]["ownerReferences"] = []
    decision = decided(made, children, pods(made, REVISION))
    assert (decision.actions, decision.conflicts.sentence) == ((), "")


OLDER = {"apiVersion": API_VERSION, "kind": KIND, "name": "chat", "uid": "uid-older", "controller": True}
OTHER = {"apiVersion": "apps/v1", "kind": "Deployment", "name": "web", "uid": "uid-web", "controller": True}


@pytest.mark.parametrize(
    ("owners", "words", "ends"),
    [
        ([], "Service chat exists and isn't Lockstep's: delete it, or give the model another name", False),
        (
            [OTHER],
            "Service chat exists and belongs to Deployment web: delete it, or give the model another name",
            False,
        ),
        (
            [OLDER],
            "Service chat of a deleted model of the same name still exists: Lockstep waits until it is gone",
            True,
        ),
    ],
)
def test_what_belongs_to_others_is_never_touched(owners: list[Child], words: str, ends: bool) -> None:
    made = model()
    children = everything(made)
    service = children["Service", "chat"]
    children["Service", "chat"] = service | {"metadata": service["metadata"] | {"ownerReferences": owners}}
    decision = decided(made, children, pods(made, "old"))
    assert (decision.actions, decision.conflicts.sentence, decision.conflicts.ends) == ((), words, ends)


def test_a_child_on_its_way_out_is_waited_for() -> None:
    made = model()
    children = everything(made)
    for key, child in children.items():
        children[key] = child | {
            "metadata": child["metadata"] | {"deletionTimestamp": "2027-01-15T08:00:00Z", "labels": {}}
        }
    assert decided(made, children, pods(made, REVISION)).actions == ()


def test_pods_of_an_earlier_statefulset_do_not_count() -> None:
    made = model()
    strays = tuple(pod(0, index, REVISION, owner_uid="uid-gone") for index in range(2))
    (facts,) = decided(made, everything(made), strays).groups
    found = facts.group
    assert (found.pods, found.strays, found.ready) == ((), 2, False)


def recovering(rung: Rung = Rung.RECYCLE_POD, **fields: Any) -> ModelStatus:
    """A status with a written step against the pod of rank 1."""
    plan = RecoveryAction(
        rung=rung, trigger="inc/1", fault="Hang", rank=1, reason="because of Hang", pods=("uid-0-1",), since=NOW,
        noticed=NOW,
    )  # fmt: skip
    groups = (GroupSummary(group=0, recovery=RecoveryState(action=plan, **fields)),)
    return ModelStatus(tokens=tokens_of(model()), groups=groups)


UNREADY = tuple(pod(0, index, REVISION, ready=index > 0) for index in range(2))


def test_a_written_step_of_recovery_is_taken_with_little_grace() -> None:
    made = model()
    decision = decided(made, everything(made), UNREADY, status=recovering())
    assert decision.actions == (Delete("Pod", "chat-0-1", "uid-0-1", "because of Hang", grace=5),)


def test_moving_away_first_changes_where_the_successors_may_run() -> None:
    made = model()
    status = recovering(Rung.MOVE_AWAY, avoided={"n1": NOW + 60})
    (action,) = decided(made, everything(made), UNREADY, status=status).actions
    assert isinstance(action, Apply)
    assert (action.kind, action.repairs) == ("StatefulSet", ""), "our own wish, and no drift"
    children = everything(made)
    away = live(manifests.stateful_set(made, 0, REVISION, rendered(made, SETTINGS), ["n1"]))
    children["StatefulSet", "chat-0"] = away
    assert reasons(decided(made, children, UNREADY, status=status)) == ["because of Hang"]
    unseen = {**children, ("StatefulSet", "chat-0"): away | {"status": {"observedGeneration": 0}}}
    assert decided(made, unseen, UNREADY, status=status).actions == ()


def test_what_recovery_has_planned_goes_first_and_a_rollout_takes_the_rest() -> None:
    made = model()
    status = recovering()
    outdated = tuple(pod(0, index, "old", ready=False) for index in range(2))
    decision = decided(made, everything(made), outdated, status=status)
    deleted = [(action.name, action.grace) for action in decision.actions if isinstance(action, Delete)]
    assert deleted == [("chat-0-1", 5), ("chat-0-0", None)]


NO_REASON = {
    "metadata": {},
    "spec": {"nodeName": "n1"},
    "status": {"conditions": [{"type": "Ready", "status": "False"}]},
}
KUBELETS = {"conditions": [{"type": "Ready", "status": "False", "reason": "ContainersNotReady"}]}
EVICTED = {
    "conditions": [
        KUBELETS["conditions"][0],
        {"type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager"},
    ]
}


@pytest.mark.parametrize(
    ("late", "raw", "given_up"),
    [
        (61, NO_REASON, True),
        (61, NO_REASON | {"status": EVICTED}, True),
        (59, NO_REASON, False),  # the node may come back
        (999, NO_REASON | {"status": KUBELETS}, False),  # its kubelet reports
        (999, NO_REASON | {"metadata": {"finalizers": ["a/b"]}}, False),  # someone else holds it
        (999, NO_REASON | {"metadata": {"finalizers": ["kueue.x-k8s.io/managed"]}}, True),  # which goes by itself
    ],
)
def test_a_pod_is_given_up_only_when_its_node_is_long_gone(late: float, raw: dict[str, Any], given_up: bool) -> None:
    made = model()
    lost = pod(0, 1, REVISION, ready=False, deleting=NOW - late, raw=raw)
    decision = decided(made, everything(made), (pod(0, 0, REVISION), lost))
    reason = "pod chat-0-1 is on node n1, which doesn't respond: it is force-deleted"
    assert decision.actions == ((Delete("Pod", "chat-0-1", "uid-0-1", reason, grace=0),) if given_up else ())
    observing = model(recovery=RecoverySpec(observe=True))
    assert decided(observing, everything(observing), (pod(0, 0, REVISION), lost)).actions == ()


def test_only_first_pods_that_have_an_address_and_stay_are_asked() -> None:
    made = model(replicas=4)
    leaders: dict[int, dict[str, Any]] = {0: {}, 1: {"ip": ""}, 2: {"deleting": NOW + 5}}  # of the last there is none
    of = tuple(pod(index, 0, REVISION, **fields) for index, fields in leaders.items())
    observed = Observed(
        status=ModelStatus(), resource_version="1", children=everything(made), pods=of
    )  # fmt: skip
    key = OperatorKey(b"k" * 32)
    asked = targets(made, decide(made, observed, NOW, SETTINGS), key)
    assert {index: (one.pod_uid, one.url) for index, one in asked.items()} == {
        0: ("uid-0-0", "http://10.0.0.1:7401/status")
    }


def test_a_pod_is_asked_on_the_port_that_it_has_whatever_the_spec_says_now() -> None:
    made = model(ports=Ports(status=9401))
    old, new = ({"spec": pod_template(of, 0, REVISION, SETTINGS)["spec"]} for of in (model(), made))
    assert [pod(raw=raw).status_port for raw in (old, new)] == [7401, 9401]
