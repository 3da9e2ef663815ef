"""Templates that the CRD admits: whatever is in them, the operator says what is wrong or makes a manifest of it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.operator_models import SETTINGS, model, revision_of

from lockstep_operator.decisions import manifests
from lockstep_operator.decisions.pod_template import rendered
from lockstep_operator.decisions.requests import fitted
from lockstep_operator.types.limits import Limits, limits_of
from lockstep_operator.types.template_check import flaw

JUNK: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 70) | st.sampled_from(["", "x", "60s", "lockstep", "1"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["name", "x", "cpu"]), inner, max_size=3)
    ),
    max_leaves=6,
)


def near(*names: str) -> st.SearchStrategy[Any]:
    """A map of these fields, each of which may be anything."""
    return st.fixed_dictionaries({}, optional={name: FIELDS.get(name, JUNK) | JUNK for name in names})


FIELDS: dict[str, st.SearchStrategy[Any]] = {}
FIELDS |= {
    "resources": st.deferred(lambda: near("limits", "requests")),
    "requests": st.dictionaries(st.sampled_from(["cpu", "memory"]), JUNK, max_size=2),
    "limits": st.dictionaries(st.sampled_from(["cpu", "memory"]), JUNK, max_size=2),
    "env": st.lists(st.deferred(lambda: near("name", "value")), max_size=2),
    "name": st.sampled_from(["lockstep", "side", "LOCKSTEP_THREADS_PER_RANK", "model"]),
    "containers": st.lists(
        st.deferred(lambda: near("name", "env", "resources", "ports", "volumeMounts", "args")), max_size=2
    ),
    "volumes": st.lists(st.deferred(lambda: near("name", "emptyDir")), max_size=2),
    "affinity": st.deferred(lambda: near("nodeAffinity")),
    "nodeAffinity": st.deferred(lambda: near("requiredDuringSchedulingIgnoredDuringExecution")),
    "requiredDuringSchedulingIgnoredDuringExecution": st.deferred(lambda: near("nodeSelectorTerms")),
    "nodeSelectorTerms": st.lists(st.deferred(lambda: near("matchFields", "matchExpressions")), max_size=2),
}
SPECS = near(
    "containers", "initContainers", "volumes", "imagePullSecrets", "affinity", "tolerations", "securityContext",
    "terminationGracePeriodSeconds", "nodeSelector", "serviceAccountName",
)  # fmt: skip
METADATA = st.fixed_dictionaries(
    {},
    optional={"labels": st.dictionaries(st.text(max_size=3), st.text(max_size=3)), "annotations": st.just({"a": "b"})},
)


@given(st.fixed_dictionaries({}, optional={"spec": SPECS | JUNK, "metadata": METADATA}))
def test_any_template_has_a_flaw_that_is_named_or_becomes_a_manifest(template: dict[str, Any]) -> None:
    words = flaw(template)
    if words:
        assert words.startswith("template.")
        return
    made = model(template=template, restarted_at=1.0)
    limits = Limits(most={"memory": "256Mi"}, default={"cpu": "100m"}, least={"cpu": "10m"})
    revision = revision_of(made)
    spec = manifests.stateful_set(made, 0, revision, rendered(made, SETTINGS), ["bad-node"], limits)["spec"][
        "template"
    ]["spec"]
    assert "lockstep" in [container["name"] for container in spec["containers"]]
    assert "bad-node" in str(spec["affinity"])


@pytest.mark.parametrize(
    "spec",
    [
        {"containers": [{"name": "lockstep", "resources": {"limits": {"memory": "8Gi"}}}]},
        {"terminationGracePeriodSeconds": 600, "nodeSelector": {"gpu": "yes"}},
        {"terminationGracePeriodSeconds": None, "tolerations": None, "volumes": None},
        {"volumes": [{"name": "model", "image": {"reference": "registry/model:1"}}]},
    ],
)
def test_what_people_write_has_none(spec: dict[str, Any]) -> None:
    assert flaw({"spec": spec}) == ""


def test_the_field_is_named() -> None:
    container = {"name": "lockstep", "env": [{"name": "A"}, {"name": "A"}]}
    assert flaw({"spec": {"containers": [container]}}) == (
        "template.spec.containers[0].env[1].name is 'A', as another item's is"
    )
    assert flaw({"spec": {"terminationGracePeriodSeconds": True}}) == (
        "template.spec.terminationGracePeriodSeconds: expected `int | null`, got `bool`"
    )
    assert flaw({"spec": None}) == "template.spec: expected `object`, got `null`"


@pytest.mark.parametrize(
    ("resources", "limits", "expected"),
    [
        ({}, Limits(), {"memory": "512Mi"}),
        ({"memory": "350Mi"}, Limits(), {"memory": "350Mi"}),
        ({"memory": "8Gi"}, Limits(), {"memory": "8Gi"}),
        ({"memory": "8Gi"}, Limits(most={"memory": "1Gi"}), {"memory": "1Gi"}),
        ({"memory": "8Gi"}, Limits(most={"memory": "256Mi"}), {"memory": "256Mi"}),
        ({"memory": "8Gi"}, Limits(default={"memory": "256Mi"}), {"memory": "8Gi"}),
        ({}, Limits(default={"memory": "256Mi"}), {"memory": "256Mi"}),
        ({}, Limits(least={"memory": "1Gi"}), {"memory": "1Gi"}),
        ({"memory": "lots"}, Limits(), {"memory": "512Mi"}),
    ],
)
def test_requests_of_ours_fit(resources: dict[str, str], limits: Limits, expected: dict[str, str]) -> None:
    asked = {"requests": {"memory": "512Mi"}, "limits": resources}
    assert fitted(asked, ["cpu", "memory"], limits)["requests"] == expected
    assert fitted(asked, ["cpu"], limits)["requests"] == {"memory": "512Mi"}, "what the user sets is the user's"


def test_the_tightest_of_several_ranges_counts_and_pods_are_not_containers() -> None:
    def of(**entry: Any) -> dict[str, Any]:
        return {"spec": {"limits": [{"type": "Container", **entry}, {"type": "Pod", "max": {"memory": "1Mi"}}]}}

    ranges = [of(max={"memory": "1Gi"}, min={"cpu": "10m"}), of(max={"memory": "512Mi"}, min={"cpu": "0.1"})]
    assert limits_of(ranges) == Limits(most={"memory": "512Mi"}, least={"cpu": "0.1"})
    assert limits_of([]) == Limits()
