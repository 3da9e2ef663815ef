"""The restricted Pod Security profile as a function: a pod spec in, the rules it breaks out.

The rules: https://kubernetes.io/docs/concepts/security/pod-security-standards/ (those for Linux, as of v1.34).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

Spec = Mapping[str, Any]

_HOST_NAMESPACES: Final = ("hostNetwork", "hostPID", "hostIPC")
_CONTAINER_KINDS: Final = ("initContainers", "containers", "ephemeralContainers")
_SECCOMP_TYPES: Final = frozenset({"RuntimeDefault", "Localhost"})
_APPARMOR_TYPES: Final = frozenset({"RuntimeDefault", "Localhost"})
_VOLUME_TYPES: Final = frozenset(
    {
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "image",
        "persistentVolumeClaim",
        "projected",
        "secret",
    }
)
_SYSCTLS: Final = frozenset(
    {
        "kernel.shm_rmid_forced",
        "net.ipv4.ip_local_port_range",
        "net.ipv4.ip_unprivileged_port_start",
        "net.ipv4.tcp_syncookies",
        "net.ipv4.ping_group_range",
        "net.ipv4.ip_local_reserved_ports",
        "net.ipv4.tcp_keepalive_time",
        "net.ipv4.tcp_fin_timeout",
        "net.ipv4.tcp_keepalive_intvl",
        "net.ipv4.tcp_keepalive_probes",
        "net.ipv4.tcp_rmem",
        "net.ipv4.tcp_wmem",
    }
)
_SELINUX_TYPES: Final = frozenset({"", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"})


def violations(pod_spec: Spec) -> list[str]:
    """One sentence for each rule of the restricted profile that the pod spec breaks; empty when it satisfies all."""
    found = [*_pod_violations(pod_spec)]
    context = pod_spec.get("securityContext") or {}
    containers = [container for kind in _CONTAINER_KINDS for container in pod_spec.get(kind) or []]
    if not containers:
        found.append("the pod has no container")
    for container in containers:
        found += [f"container {container['name']}: {text}" for text in _container_violations(container, context)]
    return found


def _pod_violations(spec: Spec) -> Iterator[str]:
    for name in _HOST_NAMESPACES:
        if spec.get(name):
            yield f"{name} is true"
    for volume in spec.get("volumes") or []:
        for kind in sorted(set(volume) - {"name"} - _VOLUME_TYPES):
            yield f"volume {volume['name']} is a {kind}"
    for sysctl in (spec.get("securityContext") or {}).get("sysctls") or []:
        if sysctl["name"] not in _SYSCTLS:
            yield f"sysctl {sysctl['name']} is not among the safe ones"
    yield from _shared_violations(spec.get("securityContext") or {})


def _container_violations(container: Spec, pod_context: Spec) -> Iterator[str]:
    context = container.get("securityContext") or {}
    if context.get("privileged"):
        yield "privileged is true"
    if context.get("allowPrivilegeEscalation") is not False:
        yield "allowPrivilegeEscalation is not false"
    if context.get("runAsNonRoot", pod_context.get("runAsNonRoot")) is not True:
        yield "runAsNonRoot is not true"
    if context.get("procMount", "Default") != "Default":
        yield "procMount is not Default"
    if _seccomp(context) is None and _seccomp(pod_context) is None:
        yield "no seccomp profile is set"
    yield from _capability_violations(context.get("capabilities") or {})
    yield from _host_violations(container)
    yield from _shared_violations(context)


def _shared_violations(context: Spec) -> Iterator[str]:
    """What may stand in the context of a pod and of a container alike, and is wrong in both."""
    if context.get("runAsUser") == 0:
        yield "runAsUser is 0"
    if context.get("runAsNonRoot") is False:
        yield "runAsNonRoot is false"
    if (seccomp := _seccomp(context)) is not None and seccomp not in _SECCOMP_TYPES:
        yield f"the seccomp profile is {seccomp}"
    apparmor = (context.get("appArmorProfile") or {}).get("type")
    if apparmor is not None and apparmor not in _APPARMOR_TYPES:
        yield f"the AppArmor profile is {apparmor}"
    if (context.get("windowsOptions") or {}).get("hostProcess"):
        yield "hostProcess is true"
    selinux = context.get("seLinuxOptions") or {}
    if selinux.get("user") or selinux.get("role") or selinux.get("type", "") not in _SELINUX_TYPES:
        yield "SELinux options are set beyond the allowed types"


def _capability_violations(capabilities: Spec) -> Iterator[str]:
    if "ALL" not in (capabilities.get("drop") or []):
        yield "capabilities do not drop ALL"
    for added in capabilities.get("add") or []:
        if added != "NET_BIND_SERVICE":
            yield f"capability {added} is added"


def _host_violations(container: Spec) -> Iterator[str]:
    for port in container.get("ports") or []:
        if port.get("hostPort"):
            yield f"host port {port['hostPort']} is taken"
    lifecycle = container.get("lifecycle") or {}
    handlers = {name: container.get(name) or {} for name in ("startupProbe", "readinessProbe", "livenessProbe")} | {
        name: lifecycle.get(name) or {} for name in ("postStart", "preStop")
    }
    for name, handler in handlers.items():
        if any((handler.get(action) or {}).get("host") for action in ("httpGet", "tcpSocket")):
            yield f"{name} names a host"


def _seccomp(context: Spec) -> str | None:
    profile: str | None = (context.get("seccompProfile") or {}).get("type")
    return profile
