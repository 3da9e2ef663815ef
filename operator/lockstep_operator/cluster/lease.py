"""A Lease of coordination.k8s.io as a document: who holds it, and the documents that take it and give it back.

Its times are for people to read. Nobody compares another machine's clock with its own.
"""

from __future__ import annotations

from typing import Any, Final

from lockstep_operator.cluster.client import RESOURCES
from lockstep_operator.types.names import GROUP
from lockstep_operator.types.observed import Object
from lockstep_operator.types.timestamps import format_micro

LEASE: Final = "Lease"
PAGE_ANNOTATION: Final = f"{GROUP}/live-page"
RELEASED_SECONDS: Final = 1  # of one that nobody holds: the field must be positive


def new(namespace: str, name: str, holder: str, seconds: int, now: float) -> Object:
    """One that isn't there yet. `now` in unix seconds, as below."""
    document = {"apiVersion": RESOURCES[LEASE][0], "kind": LEASE, "metadata": {"namespace": namespace, "name": name}}
    return document | {"spec": _spec(holder, seconds, now, format_micro(now), 0)}


def held(seen: Object, holder: str, seconds: int, now: float) -> Object:
    """`seen`, taken or renewed by the holder: it is refused if anybody has written it since."""
    spec, changed = _spec_of(seen), holder_of(seen) != holder
    since = format_micro(now) if changed else spec.get("acquireTime") or format_micro(now)
    return {**seen, "spec": _spec(holder, seconds, now, since, int(spec.get("leaseTransitions") or 0) + changed)}


def released(seen: Object, now: float) -> Object:
    return {**seen, "spec": {**_spec_of(seen), "holderIdentity": "", "leaseDurationSeconds": RELEASED_SECONDS,
                             "renewTime": format_micro(now)}}  # fmt: skip


def with_page(document: Object, page: str) -> Object:
    """The holder tells where its live page is reached; without one, that nowhere."""
    metadata = document["metadata"]
    others = {name: text for name, text in (metadata.get("annotations") or {}).items() if name != PAGE_ANNOTATION}
    return {**document, "metadata": {**metadata, "annotations": others | ({PAGE_ANNOTATION: page} if page else {})}}


def page_of(document: Object) -> str:
    """As its holder told; empty: nowhere."""
    told = (document.get("metadata") or {}).get("annotations") or {}
    return str(told.get(PAGE_ANNOTATION, "")) if holder_of(document) else ""


def holder_of(document: Object) -> str:
    """Empty: nobody."""
    return str(_spec_of(document).get("holderIdentity") or "")


def seconds_of(document: Object) -> float:
    """For how long it is its holder's, without another word."""
    return float(_spec_of(document).get("leaseDurationSeconds") or 0)


def is_same(one: Object, other: Object) -> bool:
    """Whether the holder has not written between the two."""
    return _spec_of(one) == _spec_of(other)


def _spec_of(document: Object) -> dict[str, Any]:
    return document.get("spec") or {}


def _spec(holder: str, seconds: int, now: float, since: str, transitions: int) -> dict[str, Any]:
    return {
        "holderIdentity": holder,
        "leaseDurationSeconds": seconds,
        "acquireTime": since,
        "renewTime": format_micro(now),
        "leaseTransitions": transitions,
    }
