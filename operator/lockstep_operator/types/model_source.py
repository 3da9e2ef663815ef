"""Where a model comes from, and where its files are kept."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from lockstep_operator.settings import HUGGING_FACE, ModelSource
from lockstep_operator.types.spec_values import SecretKey, SpecError, secret_key

_SOURCES: Final = ("huggingFace", "persistentVolumeClaim", "hostPath", "image")


@dataclass(frozen=True, slots=True, kw_only=True)
class HuggingFace:
    """A repository of a hub. `source`: the hub's name, `endpoint`: its address, None as the runtime has it.
    `resolve_at`: when it was last asked that the revision be resolved anew, in unix seconds."""

    repo: str
    revision: str | None = None
    token: SecretKey | None = None
    token_is_optional: bool = False
    source: str = HUGGING_FACE
    endpoint: str | None = None
    resolve_at: float | None = None

    @property
    def is_fixed(self) -> bool:
        """The revision is a commit already."""
        return re.fullmatch(r"[0-9a-f]{40}", self.revision or "") is not None


@dataclass(frozen=True, slots=True)
class Claim:
    """A persistent volume claim, and a folder within it ("" is its root)."""

    name: str
    path: str = ""


@dataclass(frozen=True, slots=True)
class HostPath:
    path: str


@dataclass(frozen=True, slots=True)
class EmptyDir:
    size_limit: str | None = None


@dataclass(frozen=True, slots=True)
class Image:
    """An OCI image that is mounted as a volume, and a folder within it ("" is its root)."""

    reference: str
    pull_policy: str | None = None
    path: str = ""


Source = HuggingFace | Claim | HostPath | Image
Cache = Claim | HostPath | EmptyDir


def parse_source(
    model: Mapping[str, Any], sources: Sequence[ModelSource], resolve_at: float | None
) -> tuple[Source, Mapping[str, Any] | None, str]:
    """With the cache that its source has by default, and what is wrong with it."""
    match {kind: model[kind] for kind in _SOURCES if kind in model}:
        case {"huggingFace": hub, **rest} if not rest:
            return _of_a_hub(hub, sources, resolve_at)
        case {"persistentVolumeClaim": claim, **rest} if not rest:
            return Claim(claim["claimName"], claim.get("path", "").strip("/")), None, ""
        case {"hostPath": host, **rest} if not rest:
            return HostPath(host["path"]), None, ""
        case {"image": image, **rest} if not rest:
            return Image(image["reference"], image.get("pullPolicy"), image.get("path", "").strip("/")), None, ""
        case _:
            raise SpecError("model must name exactly one of huggingFace, persistentVolumeClaim, hostPath and image")


def _of_a_hub(
    hub: Mapping[str, Any], sources: Sequence[ModelSource], resolve_at: float | None
) -> tuple[HuggingFace, Mapping[str, Any] | None, str]:
    known = {HUGGING_FACE: ModelSource(name=HUGGING_FACE), **{one.name: one for one in sources}}
    default = next((one.name for one in sources if one.default), HUGGING_FACE)
    name = hub.get("source", default)
    flaw = "" if name in known else (
        f"model.huggingFace.source is {name}, and the operator knows {', '.join(known)} (models.sources of its chart)"
    )  # fmt: skip
    source = known.get(name) or ModelSource(name=name)
    own = secret_key(hub.get("tokenSecretRef"))
    return (
        HuggingFace(
            repo=hub["repo"],
            revision=hub.get("revision"),
            token=own or (SecretKey(*source.token_secret) if source.token_secret else None),
            token_is_optional=own is None,
            source=name,
            endpoint=source.endpoint,
            resolve_at=None if resolve_at is None else float(int(resolve_at)),  # as the status has it
        ),
        source.cache,
        flaw,
    )


def parse_cache(cache: Mapping[str, Any] | None) -> Cache:
    match cache or {}:
        case {"persistentVolumeClaim": claim}:
            return Claim(claim["claimName"])
        case {"hostPath": host}:
            return HostPath(host["path"])
        case {"emptyDir": {"sizeLimit": limit}}:
            return EmptyDir(str(limit))
        case _:
            return EmptyDir()
