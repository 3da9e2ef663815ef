"""The chart's roles for people, and its admission policy as it is rendered. What they do is tested on the cluster."""

from __future__ import annotations

from typing import Any

import pytest
from tests.contract.test_chart_rbac import granted
from tests.support.chart import Manifest, of_kind, one, render, template

POLICY = "ValidatingAdmissionPolicy"
WITH_POLICIES = ("--kube-version", "1.30.0")
SWITCHES: dict[str, Any] = {
    "forbidHostPath": True,
    "forbidHostNamespaces": True,
    "forbidPrivileged": True,
    "forbidServiceAccounts": True,
    "imagePrefixes": ["registry.example/"],
}
AGGREGATE = "rbac.authorization.k8s.io/aggregate-to-"


def for_people(values: dict[str, Any] | None = None) -> dict[str, Manifest]:
    """By the last word of their names."""
    roles = [
        role for role in of_kind(render(values), "ClusterRole") if AGGREGATE + "admin" in role["metadata"]["labels"]
    ]
    return {role["metadata"]["name"].rpartition("-")[2]: role for role in roles}


def test_people_get_models_by_the_clusters_own_roles() -> None:
    roles = for_people()
    aggregated = {
        name: sorted(
            label.removeprefix(AGGREGATE) for label in role["metadata"]["labels"] if label.startswith(AGGREGATE)
        )
        for name, role in roles.items()
    }
    assert aggregated == {"view": ["admin", "edit", "view"], "edit": ["admin", "edit"]}
    assert {verb for _, _, verb in granted(roles["view"])} == {"get", "list", "watch"}
    written = {resource for _, resource, verb in granted(roles["edit"]) if verb not in {"get", "list", "watch"}}
    assert written == {"tensorparallelmodels", "tensorparallelmodels/scale"}, "the status is the operator's"
    assert for_people({"rbac": {"aggregate": False}}) == {}
    assert for_people({"watchNamespaces": ["a"]}).keys() == roles.keys()


def test_the_policy_is_off_by_default_and_has_a_rule_for_each_switch() -> None:
    assert not of_kind(render(), POLICY)
    assert not of_kind(render({"admissionPolicy": {"namespaceSelector": {"matchLabels": {"a": "b"}}}}), POLICY)
    messages = set()
    for switch, value in SWITCHES.items():
        policy = one(render({"admissionPolicy": {switch: value}}, *WITH_POLICIES), POLICY)
        (rule,) = policy["spec"]["validations"]
        assert (rule["reason"], policy["spec"]["failurePolicy"]) == ("Forbidden", "Fail")
        messages.add(rule["message"])
    assert len(messages) == len(SWITCHES)
    manifests = render({"admissionPolicy": SWITCHES}, *WITH_POLICIES)
    assert {rule["message"] for rule in one(manifests, POLICY)["spec"]["validations"]} == messages
    assert one(manifests, f"{POLICY}Binding")["spec"]["policyName"] == one(manifests, POLICY)["metadata"]["name"]


def test_a_cluster_without_such_policies_is_told() -> None:
    result = template({"admissionPolicy": {"forbidHostPath": True}}, "--kube-version", "1.29.4")
    assert result.returncode != 0
    assert "admissionPolicy needs Kubernetes 1.30 or later" in result.stderr


@pytest.mark.parametrize("prefix", ["registry.example", "", "https://registry.example/", "Registry/"])
def test_a_prefix_that_others_could_share_is_refused(prefix: str) -> None:
    result = template({"admissionPolicy": {"imagePrefixes": [prefix]}}, *WITH_POLICIES)
    assert result.returncode != 0
    assert "/admissionPolicy/imagePrefixes/0" in result.stderr
