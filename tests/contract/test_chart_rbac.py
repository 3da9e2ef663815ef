"""The chart grants the operator what it uses, nothing else, and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from tests.support.chart import NAMESPACE, Manifest, of_kind, one, render

from lockstep_operator.cluster.permissions import (
    KEY_PERMISSION,
    LEASE_PERMISSION,
    NODE_PERMISSIONS,
    PERMISSIONS,
    Permission,
)

ROLES = ("Role", "ClusterRole")
Grants = set[tuple[str, str, str]]  # API group, resource, verb


def granted(role: Manifest) -> Grants:
    return {
        (group, resource, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def roles(values: Mapping[str, Any] | None = None) -> list[Manifest]:
    """The operator's own; those for people are tested in test_chart_tenants."""
    return [role for kind in ROLES for role in of_kind(operators(values), kind)]


def operators(values: Mapping[str, Any] | None = None) -> list[Manifest]:
    return render({"rbac": {"aggregate": False}} | dict(values or {}))


def for_models(manifests: list[Manifest], kind: str = "Role") -> list[Manifest]:
    """Roles, or bindings of them, without those of the operator's own objects."""
    return [found for found in of_kind(manifests, kind) if not found["metadata"]["name"].endswith("-own")]


def used(*permissions: Permission) -> Grants:
    return {(one.group, one.resource, verb) for one in permissions for verb in one.verbs}


def test_granted_is_what_is_used() -> None:
    assert granted(one(operators(), "ClusterRole")) == used(*PERMISSIONS)


@pytest.mark.parametrize("values", [{}, {"watchNamespaces": ["a", "b"]}])
def test_the_lease_and_the_key_are_the_operators_own_in_its_own_namespace(values: dict[str, Any]) -> None:
    manifests = render(values)
    (role,) = [found for found in of_kind(manifests, "Role") if found not in for_models(manifests)]
    assert granted(role) == used(LEASE_PERMISSION, KEY_PERMISSION)
    assert role["metadata"]["namespace"] == NAMESPACE
    unbounded = {verb for rule in role["rules"] if "resourceNames" not in rule for verb in rule["verbs"]}
    assert unbounded == {"create"}
    container = one(manifests, "Deployment")["spec"]["template"]["spec"]["containers"][0]
    told = {variable["name"]: variable.get("value") for variable in container["env"]}
    bounded = {rule["resources"][0]: rule["resourceNames"] for rule in role["rules"] if "resourceNames" in rule}
    assert bounded == {"leases": [told["LOCKSTEP_LEASE"]], "secrets": [told["LOCKSTEP_KEY_SECRET"]]}
    (binding,) = [found for found in of_kind(manifests, "RoleBinding") if found["metadata"]["namespace"] == NAMESPACE]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "lockstep", "namespace": NAMESPACE}]


@pytest.mark.parametrize("namespaces", [[], ["a", "b"]])
def test_nodes_conditions_need_two_verbs_of_the_cluster_more(namespaces: list[str]) -> None:
    plain = {role["metadata"]["name"] for role in roles({"watchNamespaces": namespaces})}
    more = [
        role
        for role in roles({"watchNamespaces": namespaces, "nodeConditions": True})
        if role["metadata"]["name"] not in plain
    ]
    assert [role["kind"] for role in more] == ["ClusterRole"]
    assert granted(more[0]) == used(*NODE_PERMISSIONS)


@pytest.mark.parametrize("values", [{}, {"watchNamespaces": ["a", "b"]}])
def test_nothing_is_granted_by_a_wildcard(values: dict[str, Any]) -> None:
    for role in roles(values):
        assert not any("*" in part for grant in granted(role) for part in grant)
        assert all("nonResourceURLs" not in rule for rule in role["rules"])


@pytest.mark.parametrize("values", [{}, {"watchNamespaces": ["a", "b"]}])
def test_no_secret_can_be_read_but_the_operators_own(values: dict[str, Any]) -> None:
    """`update` and `patch` answer with what it holds, too."""
    rules = [rule for role in roles(values) for rule in role["rules"] if "secrets" in rule["resources"]]
    assert {verb for rule in rules if "resourceNames" not in rule for verb in rule["verbs"]} == {"create", "delete"}
    assert [rule["verbs"] for rule in rules if "resourceNames" in rule] == [["get"]]


def test_nothing_lets_it_raise_its_own_rights() -> None:
    for role in roles():
        assert not any(group == "rbac.authorization.k8s.io" for group, _, _ in granted(role))
        assert not any(resource in {"pods/exec", "serviceaccounts/token"} for _, resource, _ in granted(role))


def test_one_cluster_role_is_bound_to_the_operators_account() -> None:
    manifests = operators()
    binding = one(manifests, "ClusterRoleBinding")
    assert binding["roleRef"]["name"] == one(manifests, "ClusterRole")["metadata"]["name"]
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "lockstep", "namespace": NAMESPACE}]
    assert not for_models(manifests)


def test_watched_namespaces_get_a_role_each_and_the_cluster_none() -> None:
    manifests = operators({"watchNamespaces": ["a", "b"]})
    assert not of_kind(manifests, "ClusterRole")
    assert not of_kind(manifests, "ClusterRoleBinding")
    assert [role["metadata"]["namespace"] for role in for_models(manifests)] == ["a", "b"]
    for binding in of_kind(manifests, "RoleBinding"):
        assert binding["roleRef"]["kind"] == "Role"
        assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "lockstep", "namespace": NAMESPACE}]
    wide = granted(one(operators(), "ClusterRole"))
    nodes = {grant for grant in wide if grant[1] == "nodes"}  # have no namespace
    assert all(granted(role) == wide - nodes for role in for_models(manifests))
    assert {verb for _, _, verb in nodes} == {"list", "watch"}
    assert not {grant for grant in granted(one(operators({"watchNodes": False}), "ClusterRole")) if grant[1] == "nodes"}


def test_roles_can_be_left_to_somebody_else() -> None:
    nothing = {"create": False, "aggregate": False}
    for values in ({"rbac": nothing}, {"rbac": nothing, "watchNamespaces": ["a"]}):
        manifests = render(values)
        assert not [manifest for manifest in manifests if manifest["apiVersion"].startswith("rbac.")]
