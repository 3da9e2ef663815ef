"""`helm test` breaks a model of the runtime image's own: with what rights, and for how long."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import yaml
from tests.support.chart import ROOT, Manifest, of_kind, one, render
from tests.support.pod_security import violations

from lockstep_operator.decisions.pod_template import pod_template
from lockstep_operator.plugin import cli
from lockstep_operator.plugin.shadow import shadow
from lockstep_operator.settings import Settings
from lockstep_operator.types.spec import parse

IMAGE = "registry.example/lockstep/runtime:0.1.0"


def rendered(values: Mapping[str, Any] | None = None) -> list[Manifest]:
    """What belongs to the test alone."""
    found = render({"tests": {"gameday": {"enabled": True, "seconds": 99}}, **(values or {})})
    label = "app.kubernetes.io/component"
    return [one for one in found if one["metadata"].get("labels", {}).get(label) == "gameday"]


def model() -> Manifest:
    document: Manifest = yaml.safe_load(one(rendered(), "ConfigMap")["data"]["model.yaml"])
    return document


def test_all_of_it_is_there_only_while_the_test_runs() -> None:
    for manifest in rendered():
        annotations = manifest["metadata"]["annotations"]
        assert annotations["helm.sh/hook"] == "test"
        assert annotations["helm.sh/hook-delete-policy"] == "before-hook-creation,hook-succeeded"
    weights = {one["kind"]: int(one["metadata"]["annotations"]["helm.sh/hook-weight"]) for one in rendered()}
    assert weights.pop("Pod") > max(weights.values())
    assert len(weights) == 4


def test_its_account_may_do_no_more_than_it_does() -> None:
    granted = {
        (group, resource, verb)
        for rule in one(rendered(), "Role")["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert granted == {
        ("lockstep.dev", "tensorparallelmodels", "get"),
        ("lockstep.dev", "tensorparallelmodels", "create"),
        ("lockstep.dev", "tensorparallelmodels", "delete"),
        ("", "pods", "list"),
        ("", "pods/exec", "get"),
        ("", "pods/exec", "create"),
    }
    assert not of_kind(rendered(), "ClusterRole")


def test_it_works_in_a_namespace_that_is_served() -> None:
    manifests = rendered({"watchNamespaces": ["a", "b"]})
    assert {one(manifests, kind)["metadata"]["namespace"] for kind in ("Role", "RoleBinding")} == {"a"}
    assert "--namespace=a" in one(manifests, "Pod")["spec"]["containers"][0]["args"]


def test_the_pod_runs_a_command_that_there_is_and_keeps_to_the_restricted_profile() -> None:
    spec = one(rendered(), "Pod")["spec"]
    container = spec["containers"][0]
    assert container["command"][1] in cli.main.commands
    assert spec["activeDeadlineSeconds"] == 99
    assert "--timeout=99" in container["args"]
    assert violations(spec) == []


def test_the_models_pods_need_neither_a_folder_of_the_node_nor_volumes_of_images() -> None:
    copy = shadow({**model(), "metadata": {"name": "tiny-chat", "namespace": "team"}}, "abcd")
    parsed = parse({**copy, "metadata": {**copy["metadata"], "uid": "uid-m"}})
    pod = pod_template(parsed, 0, "new", Settings(runtime_image=IMAGE))["spec"]
    assert violations(pod) == []
    [volume] = [one for one in pod["volumes"] if one["name"] == "model"]
    assert volume.keys() == {"name", "emptyDir"}
    [init] = pod["initContainers"]
    assert init["image"] == pod["containers"][0]["image"] == IMAGE
    assert {"name": "LOCKSTEP_ALLOW_FAULTS", "value": "true"} in pod["containers"][0]["env"]


def test_the_image_has_the_model_where_it_is_copied_from() -> None:
    folder = model()["spec"]["template"]["spec"]["initContainers"][0]["command"][2].removesuffix("/.")
    assert f"COPY examples/tiny-chat {folder}\n" in (ROOT / "images" / "runtime.Dockerfile").read_text()
    assert "tiny-chat" in json.dumps(model())
