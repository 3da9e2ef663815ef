"""What a real API server says against a write, word for word as Kubernetes 1.34 does.

Taken from one: a server-side apply of what isn't of the schema is a 500 without a reason, another UID a conflict, a
value that makes no sense a 422, a quota and a namespace that is being deleted a 403, an unreachable webhook a 500.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, Final

from lockstep_operator.cluster.client import KubeError
from lockstep_operator.cluster.served_schema import WRITTEN
from lockstep_operator.types.names import GROUP, KIND, VERSION
from lockstep_operator.types.quantity import quantity

_POD_SPEC: Final[Mapping[str, type | tuple[type, ...]]] = {
    "activeDeadlineSeconds": int, "affinity": dict, "automountServiceAccountToken": bool, "containers": list,
    "dnsConfig": dict, "dnsPolicy": str, "enableServiceLinks": bool, "ephemeralContainers": list, "hostAliases": list,
    "hostIPC": bool, "hostNetwork": bool, "hostPID": bool, "hostUsers": bool, "hostname": str, "imagePullSecrets": list,
    "initContainers": list, "nodeName": str, "nodeSelector": dict, "os": dict, "overhead": dict,
    "preemptionPolicy": str, "priority": int, "priorityClassName": str, "readinessGates": list, "resourceClaims": list,
    "resources": dict, "restartPolicy": str, "runtimeClassName": str, "schedulerName": str, "schedulingGates": list,
    "securityContext": dict, "serviceAccount": str, "serviceAccountName": str, "setHostnameAsFQDN": bool,
    "shareProcessNamespace": bool, "subdomain": str, "terminationGracePeriodSeconds": int, "tolerations": list,
    "topologySpreadConstraints": list, "volumes": list,
}  # fmt: skip
_CONTAINER: Final[Mapping[str, type | tuple[type, ...]]] = {
    "args": list, "command": list, "env": list, "envFrom": list, "image": str, "imagePullPolicy": str,
    "lifecycle": dict, "livenessProbe": dict, "name": str, "ports": list, "readinessProbe": dict, "resizePolicy": list,
    "resources": dict, "restartPolicy": str, "securityContext": dict, "startupProbe": dict, "stdin": bool,
    "stdinOnce": bool, "terminationMessagePath": str, "terminationMessagePolicy": str, "tty": bool,
    "volumeDevices": list, "volumeMounts": list, "workingDir": str,
}  # fmt: skip
_EXPECTED: Final = {dict: "map", list: "list", str: "string", bool: "boolean", int: "numeric (int or float)"}


def check_uid(kind: str, manifest: Mapping[str, Any], live: Mapping[str, Any] | None) -> None:
    """A UID in what is written is a condition."""
    wanted, name = manifest["metadata"].get("uid"), manifest["metadata"]["name"]
    if wanted is None or (live is not None and live["metadata"]["uid"] == wanted):
        return
    there = f"the existing object has UID {live['metadata']['uid']}" if live else "no existing object was found"
    words = (
        f'Operation cannot be fulfilled on {kind} "{name}": uid mismatch: the provided object specified uid {wanted}'
    )
    raise KubeError(409, "Conflict", f"{words}, and {there}")


def check_version(manifest: Mapping[str, Any], live: Mapping[str, Any] | None) -> None:
    """So is a resource version, where there is an object; what is made may name any."""
    wanted = manifest["metadata"].get("resourceVersion")
    if live is not None and wanted not in (None, live["metadata"]["resourceVersion"]):
        words = f'Operation cannot be fulfilled on "{manifest["metadata"]["name"]}": the object has been modified'
        raise KubeError(409, "Conflict", f"{words}; please apply your changes to the latest version and try again")


def check_schema(kind: str, manifest: Mapping[str, Any]) -> None:
    """Of a pod template: the part of a manifest that a user writes."""
    template = (manifest.get("spec") or {}).get("template")
    if kind == "StatefulSet" and template is not None:
        _untyped(kind, manifest, sorted(_template_flaws(template.get("spec") or {})))


def check_status(kind: str, manifest: Mapping[str, Any], lacking: Collection[str]) -> None:
    """`lacking` are fields that the CRD doesn't have."""
    unknown = [
        path
        for path, names in _fields(manifest["status"], ".status", "status")
        if names in lacking or (tuple(names.split(".")) not in _KNOWN and not names.startswith(_OPEN))
    ]
    _untyped(kind, manifest, [f"{path}: field not declared in schema" for path in sorted(unknown)])


def check_merged(merged: Mapping[str, Any]) -> None:
    """What an object is like when all who apply to it are heard."""
    spec = merged.get("spec") or {}
    names = [port.get("name") for port in spec.get("ports") or []]
    if len(names) != len(set(names)):
        raise KubeError(422, "Invalid", f"spec.ports: Duplicate value: {names}")
    template = ((spec.get("template") or {}).get("spec") or {}) if merged.get("kind") == "StatefulSet" else {}
    if words := next(_too_large(template, {}), ""):
        name = merged["metadata"]["name"]
        raise KubeError(422, "Invalid", f'StatefulSet.apps "{name}" is invalid: spec.template.{words}')


def check_quota(kind: str, name: str, used: int, most: int | None) -> None:
    if most is not None and used >= most:
        counted = f"count/{kind}"
        words = f"exceeded quota: q, requested: {counted}=1, used: {counted}={used}, limited: {counted}={most}"
        raise KubeError(403, "Forbidden", f'{kind} "{name}" is forbidden: {words}')


def namespace_ending(kind: str, namespace: str, name: str) -> KubeError:
    words = f"unable to create new content in namespace {namespace} because it is being terminated"
    return KubeError(403, "Forbidden", f'{kind} "{name}" is forbidden: {words}', ("NamespaceTerminating",))


def webhook_down() -> KubeError:
    words = 'failed to call webhook: Post "https://nothing.team.svc:443/?timeout=2s": service "nothing" not found'
    return KubeError(500, "InternalError", f'Internal error occurred: failed calling webhook "no.dev": {words}')


def pod_refused(pod: Mapping[str, Any], ranges: Collection[Mapping[str, Any]]) -> str:
    """What the StatefulSet's controller is told when a LimitRange doesn't admit its pod; empty if it does."""
    bounds: dict[str, str] = {}
    for item in ranges:
        for entry in item["spec"]["limits"]:
            bounds |= {**(entry.get("max") or {}), **(entry.get("default") or {})}
    words = next(_too_large(pod["spec"], bounds), "")
    return f'Pod "{pod["metadata"]["name"]}" is invalid: {words}' if words else ""


def openapi_schema(lacking: Collection[str]) -> dict[str, Any]:
    """As an API server publishes a CRD's."""
    root: dict[str, Any] = {
        "x-kubernetes-group-version-kind": [{"group": GROUP, "kind": KIND, "version": VERSION}],
        "properties": {},
    }
    for path in sorted(WRITTEN, key=len):
        names = [".".join(path[: depth + 1]) for depth in range(len(path))]
        if any(name in lacking for name in names):
            continue
        place = root
        for name in path[:-1]:
            place = place["properties"].setdefault(name, {"properties": {}})
        place["properties"].setdefault(path[-1], {"properties": {}})
    return root


def _untyped(kind: str, manifest: Mapping[str, Any], flaws: list[str]) -> None:
    if not flaws:
        return
    metadata = manifest["metadata"]
    listed = flaws[0] if len(flaws) == 1 else "errors:" + "".join(f"\n  {flaw}" for flaw in flaws)
    what = f"({metadata['namespace']}/{metadata['name']}; {manifest.get('apiVersion', '')}, Kind={kind})"
    raise KubeError(500, "", f"failed to create typed patch object {what}: {listed}")


def _template_flaws(spec: Mapping[str, Any]) -> Iterator[str]:
    path = ".spec.template.spec"
    yield from _typed(path, spec, _POD_SPEC)
    for name in ("containers", "initContainers"):
        for item in spec.get(name) or []:
            if isinstance(item, Mapping):
                yield from _typed(f'{path}.{name}[name="{item.get("name")}"]', item, _CONTAINER)


def _typed(path: str, value: Mapping[str, Any], schema: Mapping[str, type | tuple[type, ...]]) -> Iterator[str]:
    for name, item in value.items():
        expected = schema.get(name)
        if expected is None:
            yield f"{path}.{name}: field not declared in schema"
        elif item is not None and not (isinstance(item, expected) and not (expected is int and isinstance(item, bool))):
            assert isinstance(expected, type)
            yield f"{path}.{name}: expected {_EXPECTED[expected]}, got {type(item).__name__}"


def _too_large(spec: Mapping[str, Any], bounds: Mapping[str, str]) -> Iterator[str]:
    for position, container in enumerate(spec.get("containers") or []):
        resources = container.get("resources") or {}
        for name, asked in (resources.get("requests") or {}).items():
            limit = (resources.get("limits") or {}).get(name, bounds.get(name))
            want, most = quantity(asked), quantity(limit)
            if want is not None and most is not None and want > most:
                words = f'Invalid value: "{asked}": must be less than or equal to {name} limit of {limit}'
                yield f"spec.containers[{position}].resources.requests: {words}"


_KNOWN: Final = frozenset(WRITTEN)
_OPEN: Final = ("status.lastRecovery.phases.",)


def _fields(value: Any, path: str, names: str) -> Iterator[tuple[str, str]]:
    """Each field's path as the API server writes it, and by names alone."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield f"{path}.{name}", f"{names}.{name}"
            yield from _fields(item, f"{path}.{name}", f"{names}.{name}")
    elif isinstance(value, list):
        for position, item in enumerate(value):
            key = next(iter(item.items()), None) if isinstance(item, Mapping) else None
            where = f"[{key[0]}={key[1]}]" if key else f"[{position}]"
            yield from _fields(item, f"{path}{where}", names)
