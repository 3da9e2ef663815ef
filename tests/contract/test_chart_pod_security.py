"""What the chart runs satisfies the restricted Pod Security profile, and the checker that says so can say no."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from tests.support.chart import Manifest, of_kind, one, pod_specs, render
from tests.support.pod_security import violations

RESTRICTED: Manifest = {
    "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
    "containers": [
        {
            "name": "main",
            "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        }
    ],
    "volumes": [{"name": "tmp", "emptyDir": {}}],
}


def test_a_restricted_pod_breaks_no_rule() -> None:
    assert violations(RESTRICTED) == []


Change = Callable[[Manifest, dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda pod, _: pod.update(hostNetwork=True), "hostNetwork is true"),
        (lambda pod, _: pod.update(hostPID=True), "hostPID is true"),
        (lambda pod, _: pod["volumes"].append({"name": "h", "hostPath": {"path": "/"}}), "volume h is a hostPath"),
        (lambda pod, _: pod["securityContext"].update(runAsUser=0), "runAsUser is 0"),
        (lambda pod, _: pod["securityContext"].pop("runAsNonRoot"), "container main: runAsNonRoot is not true"),
        (lambda pod, _: pod["securityContext"].pop("seccompProfile"), "container main: no seccomp profile is set"),
        (
            lambda pod, _: pod["securityContext"].update(sysctls=[{"name": "kernel.msgmax"}]),
            "sysctl kernel.msgmax is not among the safe ones",
        ),
        (
            lambda _, context: context.update(seccompProfile={"type": "Unconfined"}),
            "container main: the seccomp profile is Unconfined",
        ),
        (lambda _, context: context.update(runAsUser=0), "container main: runAsUser is 0"),
        (lambda _, context: context.update(privileged=True), "container main: privileged is true"),
        (
            lambda _, context: context.pop("allowPrivilegeEscalation"),
            "container main: allowPrivilegeEscalation is not false",
        ),
        (lambda _, context: context.pop("capabilities"), "container main: capabilities do not drop ALL"),
        (
            lambda _, context: context["capabilities"].update(add=["SYS_PTRACE"]),
            "container main: capability SYS_PTRACE is added",
        ),
        (lambda _, context: context.update(procMount="Unmasked"), "container main: procMount is not Default"),
        (
            lambda _, context: context.update(appArmorProfile={"type": "Unconfined"}),
            "container main: the AppArmor profile is Unconfined",
        ),
        (
            lambda _, context: context.update(seLinuxOptions={"type": "spc_t"}),
            "container main: SELinux options are set beyond the allowed types",
        ),
        (
            lambda pod, _: pod["containers"][0].update(ports=[{"containerPort": 80, "hostPort": 80}]),
            "container main: host port 80 is taken",
        ),
        (
            lambda pod, _: pod["containers"][0].update(livenessProbe={"httpGet": {"host": "10.0.0.1", "port": 80}}),
            "container main: livenessProbe names a host",
        ),
    ],
)
def test_the_checker_names_what_is_broken(change: Change, expected: str) -> None:
    pod = copy.deepcopy(RESTRICTED)
    change(pod, pod["containers"][0]["securityContext"])
    assert expected in violations(pod)


def test_an_init_container_is_checked_too() -> None:
    pod = {**RESTRICTED, "initContainers": [{"name": "init"}]}
    assert "container init: capabilities do not drop ALL" in violations(pod)


def test_every_pod_of_the_chart_is_restricted() -> None:
    specs = pod_specs(render())
    assert set(specs) == {"Deployment/lockstep", "Pod/lockstep-check"}
    assert {name: violations(spec) for name, spec in specs.items()} == {name: [] for name in specs}


def test_every_container_has_a_read_only_root_and_bounded_memory() -> None:
    for name, spec in pod_specs(render()).items():
        for container in spec["containers"]:
            assert container["securityContext"]["readOnlyRootFilesystem"] is True, name
            assert "memory" in container["resources"]["limits"], name
            assert {"cpu", "memory"} <= set(container["resources"]["requests"]), name


def test_only_pods_that_ask_for_the_token_get_it() -> None:
    manifests = render()
    assert one(manifests, "ServiceAccount")["automountServiceAccountToken"] is False
    assert not of_kind(manifests, "Secret")
