"""A model's life on a real cluster: it grows and shrinks, changes, is meddled with, and leaves nothing behind."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from tests.support import kubectl
from tests.support.cluster_api import ClusterApi
from tests.support.cluster_chaos import OperatorKiller
from tests.support.cluster_lifecycle import (
    DAMAGES,
    change_spec,
    deleted,
    patched,
    scale,
    shape,
    uids,
    until_groups,
    until_rolled_out,
    until_shape,
)
from tests.support.cluster_load import Load
from tests.support.cluster_model import Model, manifest, tiny_chat
from tests.support.seed import printed_seed

NewNamespace = Callable[[str], str]


@pytest.fixture(scope="module")
def living(api: ClusterApi, new_namespace: NewNamespace) -> Iterator[Model]:
    """One model for the tests of this file, which name the number of groups that they want of it."""
    model = Model(api, new_namespace("living"), "living")
    model.apply(tiny_chat())
    yield model
    model.delete()


def with_groups(model: Model, groups: int) -> Model:
    if model.read()["spec"].get("replicas", 1) != groups:
        scale(model, groups)
    until_groups(model, groups)
    return model


def test_it_scales_out(living: Model) -> None:
    with_groups(living, 1)
    first = uids(living)

    scale(living, 2)

    until_groups(living, 2)
    assert first < uids(living), "the group that served goes on serving"


def test_a_model_whose_file_names_no_replicas_belongs_to_the_autoscaler(living: Model) -> None:
    """Autoscalers read and write the scale subresource; the file that Git has is applied again and again meanwhile."""
    with_groups(living, 1)
    file = manifest(living.namespace, living.name, tiny_chat())
    assert "replicas" not in file["spec"]
    path = f"/apis/lockstep.dev/v1alpha1/namespaces/{living.namespace}/tensorparallelmodels/{living.name}/scale"
    assert json.loads(kubectl.kubectl("get", "--raw", path))["spec"] == {"replicas": 1}
    assert kubectl.difference(file) == ""

    with autoscaled(living, groups=2):
        living.until("the autoscaler to set replicas", lambda: living.read()["spec"]["replicas"] == 2, 60)
    assert kubectl.difference(file) == ""
    living.apply(tiny_chat())

    assert json.loads(kubectl.kubectl("get", "--raw", path))["spec"] == {"replicas": 2}
    until_groups(living, 2)


@contextmanager
def autoscaled(model: Model, groups: int) -> Iterator[None]:
    """By Kubernetes' own autoscaler, which needs no metrics to keep to its bounds."""
    target = {"apiVersion": "lockstep.dev/v1alpha1", "kind": "TensorParallelModel", "name": model.name}
    metric = {
        "type": "Resource",
        "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 80}},
    }
    kubectl.apply(
        {
            "apiVersion": "autoscaling/v2",
            "kind": "HorizontalPodAutoscaler",
            "metadata": {"namespace": model.namespace, "name": model.name},
            "spec": {"scaleTargetRef": target, "minReplicas": groups, "maxReplicas": groups, "metrics": [metric]},
        }
    )
    try:
        yield
    finally:
        model.kubectl("delete", "hpa", model.name)


def test_a_changed_spec_is_rolled_out_without_a_failed_request_while_the_operator_is_killed(
    living: Model, api: ClusterApi
) -> None:
    """Again and again: an undisturbed one rolls out in test_operator_writes.py."""
    seed = printed_seed()
    before = uids(with_groups(living, 2))

    with Load(living, clients=3) as load:
        with OperatorKiller(api, random.Random(seed), kills=3):
            change_spec(living, '{"spec": {"engine": {"maxSequences": 8}}}')
        until_rolled_out(living, before)

    assert load.failures == []
    assert load.answered > 20
    for pod in living.pods():
        assert "--max-sequences=8" in pod["spec"]["containers"][0]["args"]


def test_it_scales_in_without_a_failed_request(living: Model) -> None:
    kept = uids(with_groups(living, 2))

    with Load(living, clients=3) as load:
        scale(living, 1)
        until_groups(living, 1)

    assert load.failures == []
    assert uids(living) < kept


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_somebody_does_to_a_child_is_undone(living: Model, damage: str) -> None:
    wanted = shape(with_groups(living, 1))

    DAMAGES[damage](living)

    until_shape(living, wanted)
    living.until_serving(1)


def test_a_child_that_is_nobodys_is_not_taken_over_but_reported(living: Model) -> None:
    wanted = shape(with_groups(living, 1))
    patched("service", "-0", '{"metadata": {"ownerReferences": null}}')(living)

    living.until("the conflict in a condition", lambda: "Service living-0 exists" in _stalled(living), 30)

    assert "delete it" in _stalled(living), "the message says what to do"
    deleted("service", "-0")(living)
    until_shape(living, wanted)
    living.until_serving(1)


def _stalled(model: Model) -> str:
    message: str = model.condition("Stalled").get("message", "")
    return message


def test_what_only_new_pods_can_mend_is_made_anew_with_them(living: Model) -> None:
    wanted = shape(with_groups(living, 1))
    before, token = uids(living), living.token()

    deleted("statefulset", "-0")(living)
    # The operator may not read Secrets: that one is missing, it learns from the pods that can't start without it.
    deleted("secret", f"-token-{living.status()['tokens']['id']}")(living)

    until_rolled_out(living, before)
    until_groups(living, 1)
    assert living.token() == token, "it follows from the operator's key"
    assert shape(living).keys() == wanted.keys()


def test_nothing_is_left_of_a_deleted_model(living: Model) -> None:
    with_groups(living, 1)
    assert len(living.leftovers()) > 7

    living.delete()

    living.until_gone()
    living.apply(tiny_chat())  # and its name can be used again
    living.until_serving(1)
