"""Whether `spec.template` has the shape that a pod template must have, as far as the operator reads it (pure).

The CRD takes whatever is in `template.spec`: a PodSpec has more fields than a schema may hold. What the operator itself
doesn't read, the API server checks. Null removes a field, so most may be null.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Final

import msgspec

from lockstep_operator.types.names import CONTAINER

Natural = Annotated[int, msgspec.Meta(ge=0)]
Text = Annotated[str, msgspec.Meta(min_length=1)]
Anything = Mapping[str, Any]


class _Named(msgspec.Struct):
    name: Text


class _Port(msgspec.Struct, rename="camel"):
    container_port: Natural


class _Mount(msgspec.Struct, rename="camel"):
    mount_path: Text


class _Resources(msgspec.Struct):
    limits: Anything | None = None
    requests: Anything | None = None
    claims: list[_Named] | None = None


class _Container(msgspec.Struct, rename="camel"):
    name: Text
    env: list[_Named] | None = None
    ports: list[_Port] | None = None
    volume_mounts: list[_Mount] | None = None
    resources: _Resources | None = None


class _Term(msgspec.Struct, rename="camel"):
    match_fields: list[Anything] | None = None


class _Required(msgspec.Struct, rename="camel"):
    node_selector_terms: list[_Term] | None = None


class _NodeAffinity(msgspec.Struct, rename={"required": "requiredDuringSchedulingIgnoredDuringExecution"}):
    required: _Required | None = None


class _Affinity(msgspec.Struct, rename="camel"):
    node_affinity: _NodeAffinity | None = None


class _PodSpec(msgspec.Struct, rename="camel"):
    containers: list[_Container] = []
    init_containers: list[_Container] | None = None
    volumes: list[_Named] | None = None
    image_pull_secrets: list[_Named] | None = None
    resource_claims: list[_Named] | None = None
    affinity: _Affinity | None = None
    tolerations: list[Anything] | None = None
    termination_grace_period_seconds: Natural | None = None


class _Metadata(msgspec.Struct):
    labels: Anything | None = None
    annotations: Anything | None = None


class _Template(msgspec.Struct):
    metadata: _Metadata = msgspec.field(default_factory=_Metadata)
    spec: _PodSpec = msgspec.field(default_factory=_PodSpec)


_KEYS: Final = {
    "containers": "name",
    "initContainers": "name",
    "volumes": "name",
    "imagePullSecrets": "name",
    "env": "name",
    "volumeMounts": "mountPath",
}


def flaw(template: Mapping[str, Any]) -> str:
    """What is wrong with it first, in a sentence that names the field; empty if nothing is."""
    try:
        msgspec.convert(template, _Template)
    except msgspec.ValidationError as error:
        text, _, path = str(error).partition(" - at `$")
        return f"template{path.rstrip('`')}: {text[0].lower()}{text[1:]}"
    return next(_duplicates("template.spec", template.get("spec") or {}), "")


def claim_flaw(template: Mapping[str, Any]) -> str:
    """The same, of a template whose shape is right and whose pods must claim their devices: they'd start without."""
    spec = template.get("spec") or {}
    ours: Anything = next((one for one in spec.get("containers") or [] if one["name"] == CONTAINER), {})
    claimed = [one["name"] for one in (ours.get("resources") or {}).get("claims") or []]
    given = [one["name"] for one in spec.get("resourceClaims") or []]
    if set(claimed) & set(given):
        return ""
    return (
        "backend nccl without accelerator takes GPUs by resource claims: name one of template.spec.resourceClaims "
        f"({', '.join(given) or 'there is none'}) in resources.claims of the template's container {CONTAINER}"
    )


def _duplicates(path: str, value: Mapping[str, Any]) -> Iterator[str]:
    for name, key in _KEYS.items():
        seen: set[str] = set()
        for position, item in enumerate(value.get(name) or []):
            where = f"{path}.{name}[{position}]"
            if item[key] in seen:
                yield f"{where}.{key} is {item[key]!r}, as another item's is"
            seen.add(item[key])
            yield from _duplicates(where, item)
