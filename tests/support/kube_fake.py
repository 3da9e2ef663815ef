"""An API server in memory, with the controllers around it: enough of Kubernetes to run the operator against.

Objects have UIDs, resource versions and generations; server-side apply merges by list keys, drops fields that the
applier no longer sets, and changes nothing when there is nothing to change; deletes honour UID preconditions. The
StatefulSet controller, the garbage collector and the kubelet act one small step at a time, when the test says so.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from tests.support import kube_answers
from tests.support.kube_answers import (
    check_merged,
    check_quota,
    check_schema,
    check_status,
    check_uid,
    check_version,
    openapi_schema,
)

from lockstep_operator.cluster.client import UNLABELLED, KubeError
from lockstep_operator.types.names import KIND, MODEL_LABEL, POD_INDEX_LABEL, REVISION_LABEL
from lockstep_operator.types.observed import Object
from lockstep_operator.types.timestamps import format_rfc3339

T = TypeVar("T")
Identity = tuple[str, str, str]  # kind, namespace, name
LIST_KEYS = {
    "containers": "name", "volumes": "name", "env": "name", "volumeMounts": "mountPath", "ownerReferences": "uid",
    "ports": "port", "conditions": "type",
}  # fmt: skip

NOT_READY = {"type": "Ready", "status": "False", "reason": "ContainersNotReady"}
_GATED = "Scheduling is blocked due to non-empty scheduling gates"
_UNHEARD = {"type": "Ready", "status": "False"}  # by the node controller, until the kubelet is back and says why


KEY_SECRET = "lockstep-key"  # the only one that the operator may read


class Killed(BaseException):
    """The operator's process ends here: nothing may catch it."""


class FakeKube:
    """Every write is counted. `before_write` and `after_write` may raise, as a dying operator or server would."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.objects: dict[Identity, Object] = {}
        self.writes: list[tuple[str, str, str]] = []  # verb, kind, name
        self.deleted: list[tuple[str, str, str, int | None]] = []  # kind, name, UID, grace: that had an effect
        self.requests = Counter[tuple[str, str]]()  # verb, kind
        self.before_write: Callable[[str, str, str], None] = lambda verb, kind, name: None
        self.after_write: Callable[[str, str, str], None] = lambda verb, kind, name: None
        self.before_read: Callable[[], None] = lambda: None
        self.pause: Callable[[], int] = lambda: 0  # how often others get their turn before a request is served
        self.stale: dict[Identity, Object] | None = None  # what reads see instead of what is
        self.admit: Callable[[Object], None] = lambda live: None  # rewrites what is applied, as a webhook does
        self.quotas: dict[str, int] = {}  # kind → how many there may be in a namespace
        self.webhooks_down: set[str] = set()  # kinds that a webhook must admit which isn't there
        self.ending: set[str] = set()  # namespaces that are being deleted
        self.gone: set[str] = set()  # namespaces that are not there any more
        self.crd_lacks: frozenset[str] = frozenset()  # fields of the status, as status.groups.epoch: the CRD is older
        self.nodes = ["node-1"]
        self.cordoned: set[str] = set()
        self.lost_nodes: set[str] = set()  # their kubelets neither act nor report
        self._numbers = itertools.count(1)
        self._applied: dict[tuple[str, str], Object] = {}  # by UID and subresource: what was applied last

    # --- the operator's side ---

    async def get(self, kind: str, namespace: str, name: str) -> Object | None:
        seen = await self._seen("get", kind)
        if kind == "Secret" and name != KEY_SECRET:
            raise KubeError(403, "Forbidden", f'secrets "{name}" is forbidden: User can\'t get resource "secrets"')
        found = seen.get((kind, namespace, name))
        return clone(found)

    async def find(self, kind: str, namespace: str, *, labels: str = "", fields: str = "") -> list[Object]:
        objects = await self._seen("find", kind)
        named = {name: item for (k, ns, name), item in objects.items() if (k, ns) == (kind, namespace)}
        found = [named[name] for name in sorted(named)]
        name, _, value = labels.partition("=")
        if name:
            found = [item for item in found if (item["metadata"].get("labels") or {}).get(name) == value]
        if fields:
            uid = fields.split(",")[0].partition("=")[2]
            found = [item for item in found if item["involvedObject"]["uid"] == uid]
        return clone(found)

    async def survey(self, kind: str, namespace: str) -> list[Object]:
        found = []
        for (k, ns, _), item in sorted((await self._seen("find", kind)).items()):
            watched = kind in UNLABELLED or MODEL_LABEL in (item["metadata"].get("labels") or {})
            if k == kind and watched and namespace in ("", ns):
                found.append(clone(item["metadata"]))
        return found

    async def create(self, kind: str, manifest: Mapping[str, Any]) -> Object:
        name = manifest["metadata"]["name"]
        await self._turns()
        with self._writing("create", kind, name):
            identity = (kind, manifest["metadata"]["namespace"], name)
            self._admit_new(kind, manifest)  # a quota that is used up refuses also what there is
            if identity in self.objects:
                raise KubeError(409, "AlreadyExists", f"{kind} {name} already exists")
            return clone(self.put(kind, manifest))

    async def apply(self, kind: str, manifest: Mapping[str, Any]) -> Object:
        name = manifest["metadata"]["name"]
        await self._turns()
        with self._writing("apply", kind, name):
            live = self.objects.get((kind, manifest["metadata"]["namespace"], name))
            check_uid(kind, manifest, live)
            check_version(manifest, live)
            check_schema(kind, manifest)
            if kind in self.webhooks_down:
                raise kube_answers.webhook_down()
            if live is None:
                self._admit_new(kind, manifest)
                check_merged(manifest)
                live = self.put(kind, manifest)
            else:
                self._merge(live, manifest, "")
            self._applied[live["metadata"]["uid"], ""] = clone(dict(manifest))
            self.admit(live)
            return clone(live)

    async def overwrite(self, kind: str, manifest: Mapping[str, Any], uid: str) -> Object:
        name = manifest["metadata"]["name"]
        await self._turns()
        with self._writing("apply", kind, name):
            live = self.objects.get((kind, manifest["metadata"]["namespace"], name))
            if live is None:
                raise KubeError(404, "NotFound", f"{kind} {name} not found")
            check_uid(kind, {"metadata": {"name": name, "uid": uid}}, live)
            before = clone(live)
            live["spec"] = _merge_patched(live["spec"], manifest["spec"])
            self._bump(live, before)
            self.admit(live)
            return clone(live)

    async def replace(self, kind: str, manifest: Mapping[str, Any]) -> Object:
        name = manifest["metadata"]["name"]
        await self._turns()
        with self._writing("update", kind, name):
            identity = (kind, manifest["metadata"]["namespace"], name)
            live = self.objects.get(identity)
            if live is None:
                raise KubeError(404, "NotFound", f"{kind} {name} not found")
            check_version(manifest, live)
            before = clone(live)
            live["spec"] = clone(dict(manifest["spec"]))
            self._bump(live, before)
            return clone(live)

    async def apply_status(self, kind: str, manifest: Mapping[str, Any]) -> Object:
        metadata = manifest["metadata"]
        await self._turns()
        with self._writing("status", kind, metadata["name"]):
            live = self.objects.get((kind, metadata["namespace"], metadata["name"]))
            if live is None:
                raise KubeError(404, "NotFound", f"{kind} {metadata['name']} not found")
            if metadata["uid"] != live["metadata"]["uid"]:
                raise KubeError(409, "Conflict", "the UID differs")
            check_version(manifest, live)
            check_status(kind, manifest, self.crd_lacks)
            self._merge(live, {"status": manifest["status"]}, "/status")
            self._applied[live["metadata"]["uid"], "/status"] = clone({"status": manifest["status"]})
            return clone(live)

    async def delete(self, kind: str, namespace: str, name: str, uid: str = "", grace: int | None = None) -> None:
        await self._turns()
        with self._writing("delete", kind, name):
            live = self.objects.get((kind, namespace, name))
            if live is not None and uid in ("", live["metadata"]["uid"]):
                self.deleted.append((kind, name, uid, grace))
                self.remove(kind, namespace, name, grace)

    async def served_schema(self) -> Mapping[str, Any]:
        await self._turns()
        return {"model": openapi_schema(self.crd_lacks)}

    async def _turns(self) -> None:
        for _ in range(self.pause()):
            await asyncio.sleep(0)

    async def _seen(self, verb: str, kind: str) -> dict[Identity, Object]:
        self.requests[verb, kind] += 1
        self.before_read()
        await self._turns()
        return self.objects if self.stale is None else self.stale

    # --- everybody else's side ---

    def put(self, kind: str, manifest: Mapping[str, Any]) -> Object:
        """Store a new object."""
        document: Object = clone(dict(manifest))
        document["metadata"] |= {
            "uid": f"uid-{next(self._numbers)}",
            "resourceVersion": str(next(self._numbers)),
            "generation": 1,
            "creationTimestamp": format_rfc3339(self.now()),
        }
        if kind == "Secret":
            plain = document.pop("stringData", {})
            encoded = {name: base64.b64encode(value.encode()).decode() for name, value in plain.items()}
            document["data"] = document.get("data", {}) | encoded
        self.objects[kind, document["metadata"]["namespace"], document["metadata"]["name"]] = document
        return document

    def change(self, kind: str, namespace: str, name: str, edit: Callable[[Object], None]) -> None:
        """As somebody with kubectl does."""
        live = self.objects[kind, namespace, name]
        before = clone(live)
        edit(live)
        self._bump(live, before)

    def remove(self, kind: str, namespace: str, name: str, grace: int | None = None) -> None:
        """Pods end gracefully: the kubelet removes them later, unless no grace is given. All else goes at once."""
        if kind == "Pod" and grace != 0:
            seconds = 60 if grace is None else grace
            self.objects[kind, namespace, name]["metadata"].setdefault(
                "deletionTimestamp", format_rfc3339(self.now() + seconds)
            )
        else:
            del self.objects[kind, namespace, name]

    def of_kind(self, kind: str) -> list[Object]:
        found = {identity: item for identity, item in self.objects.items() if identity[0] == kind}
        return [found[identity] for identity in sorted(found)]

    # --- the cluster's own controllers: each yields the steps that it could take now ---

    def steps(self, broken: Callable[[Object], bool]) -> list[Callable[[], None]]:
        """What could happen next. Pods for which `broken` holds never become Ready."""
        return [*self._garbage(), *self._stateful_sets(), *self._kubelet(broken)]

    def _garbage(self) -> Iterator[Callable[[], None]]:
        uids = {item["metadata"]["uid"] for item in self.objects.values()}
        for (kind, namespace, name), item in list(self.objects.items()):
            owners = item["metadata"].get("ownerReferences") or []
            if (
                owners
                and all(owner["uid"] not in uids for owner in owners)
                and "deletionTimestamp" not in item["metadata"]
            ):
                yield lambda kind=kind, namespace=namespace, name=name: self.remove(kind, namespace, name)  # type: ignore[misc]

    def _stateful_sets(self) -> Iterator[Callable[[], None]]:
        for workload in self.of_kind("StatefulSet"):
            metadata, spec = workload["metadata"], workload["spec"]
            if (workload.get("status") or {}).get("observedGeneration") != metadata["generation"]:
                yield lambda workload=workload: workload.update(  # type: ignore[misc]
                    status={"observedGeneration": workload["metadata"]["generation"]}
                )
                continue
            for index in range(spec["replicas"]):
                pod = self.objects.get(("Pod", metadata["namespace"], f"{metadata['name']}-{index}"))
                if pod and pod["status"]["phase"] == "Failed":
                    yield lambda pod=pod: self._forget(pod)  # type: ignore[misc]
                elif pod is None and not self._refused(workload, index):
                    yield lambda workload=workload, index=index: self._make_pod(workload, index)  # type: ignore[misc]
            for pod in self.of_kind("Pod"):
                if owned(pod, workload) and int(pod["metadata"]["labels"][POD_INDEX_LABEL]) >= spec["replicas"]:
                    yield lambda pod=pod: self.remove("Pod", pod["metadata"]["namespace"], pod["metadata"]["name"])  # type: ignore[misc]

    def evict(self, namespace: str, name: str, why: str = "The node was low on resource: memory.") -> None:
        """As a kubelet does whose node is short of something."""
        pod = self.objects["Pod", namespace, name]
        pod.update(status={"phase": "Failed", "reason": "Evicted", "message": why})

    def _forget(self, pod: Object) -> None:
        self.objects.pop(("Pod", pod["metadata"]["namespace"], pod["metadata"]["name"]), None)

    def _refused(self, workload: Object, index: int) -> bool:
        """Whether making this pod fails, and that has been told."""
        refusal = self._pod_refusal(self._pod_of(workload, index))
        if not refusal:
            return False
        self._tell(workload, "FailedCreate", refusal)
        return True

    def _make_pod(self, workload: Object, index: int) -> None:
        self.put("Pod", self._pod_of(workload, index) | {"status": {"phase": "Pending"}})

    def _pod_of(self, workload: Object, index: int) -> Object:
        name, template = f"{workload['metadata']['name']}-{index}", clone(workload["spec"]["template"])
        owner = {
            "kind": "StatefulSet",
            "name": workload["metadata"]["name"],
            "uid": workload["metadata"]["uid"],
            "controller": True,
        }
        labels = template["metadata"]["labels"] | {POD_INDEX_LABEL: str(index)}
        namespace = workload["metadata"]["namespace"]
        metadata = {"name": name, "namespace": namespace, "labels": labels, "ownerReferences": [owner]}
        return {"metadata": metadata, "spec": template["spec"]}

    def _pod_refusal(self, pod: Object) -> str:
        ranges = [
            item for item in self.of_kind("LimitRange") if item["metadata"]["namespace"] == pod["metadata"]["namespace"]
        ]
        try:
            self._admit_new("Pod", pod)
        except KubeError as error:
            return error.message
        return kube_answers.pod_refused(pod, ranges)

    def _tell(self, item: Object, reason: str, message: str) -> None:
        """A Warning about an object, as controllers write it: the same again is counted, not repeated."""
        namespace, name = item["metadata"]["namespace"], f"{item['metadata']['name']}.{reason}".lower()
        event = {
            "metadata": {"name": name, "namespace": namespace},
            "reason": reason,
            "message": message,
            "involvedObject": {"uid": item["metadata"]["uid"]},
            "type": "Warning",
        }
        if ("Event", namespace, name) not in self.objects:
            self.put("Event", event)

    def _kubelet(self, broken: Callable[[Object], bool]) -> Iterator[Callable[[], None]]:
        """With the scheduler before it, and the node controller where it is lost."""
        for pod in self.of_kind("Pod"):
            identity = ("Pod", pod["metadata"]["namespace"], pod["metadata"]["name"])
            if pod["spec"].get("nodeName") in self.lost_nodes:
                yield from self._unheard(pod)
            elif "deletionTimestamp" in pod["metadata"]:
                yield lambda identity=identity: self.objects.pop(identity, None)  # type: ignore[misc]
            elif pod["status"]["phase"] == "Pending":
                yield from self._start(pod)
            elif pod["status"]["phase"] == "Failed":
                continue
            elif is_ready(pod) == broken(pod) or _UNHEARD in (pod["status"].get("conditions") or []):
                yield lambda pod=pod: _turn_ready(pod, not broken(pod))  # type: ignore[misc]

    def _start(self, pod: Object) -> Iterator[Callable[[], None]]:
        if pod["spec"].get("schedulingGates"):
            gated = {"type": "PodScheduled", "status": "False", "reason": "SchedulingGated", "message": _GATED}
            if pod["status"].get("conditions") != [gated]:
                yield lambda: pod["status"].update(conditions=[gated])
            return
        allowed = [node for node in self.nodes if node not in {*self.lost_nodes, *self.cordoned, *_ruled_out(pod)}]
        if not allowed:
            unplaced = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "no node fits"}
            if pod["status"].get("conditions") != [unplaced]:
                yield lambda: pod["status"].update(conditions=[unplaced])
            return
        if missing := self._missing_secret(pod):
            waiting = {"reason": "CreateContainerConfigError", "message": f'secret "{missing}" not found'}
            statuses = [{"name": "lockstep", "state": {"waiting": waiting}}]
            if pod["status"].get("containerStatuses") != statuses:
                yield lambda: pod["status"].update(containerStatuses=statuses)
            return
        node = allowed[int(pod["metadata"]["labels"][POD_INDEX_LABEL]) % len(allowed)]
        running = {"name": "lockstep", "state": {"running": {"startedAt": format_rfc3339(self.now())}}}

        def start() -> None:
            pod["spec"]["nodeName"] = node
            pod.update(status={"phase": "Running", "podIP": "10.0.0.1", "containerStatuses": [running]})

        yield start

    def _missing_secret(self, pod: Object) -> str:
        variables = [one for container in pod["spec"]["containers"] for one in container.get("env") or []]
        named = [(one.get("valueFrom") or {}).get("secretKeyRef", {}).get("name") for one in variables]
        namespace = pod["metadata"]["namespace"]
        return next((name for name in named if name and ("Secret", namespace, name) not in self.objects), "")

    def _unheard(self, pod: Object) -> Iterator[Callable[[], None]]:
        evicted = {"type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager"}
        if is_ready(pod):
            yield lambda: pod["status"].update(conditions=[dict(_UNHEARD)])
        elif "deletionTimestamp" not in pod["metadata"]:

            def evict() -> None:
                pod["status"].setdefault("conditions", []).append(evicted)
                self.remove("Pod", pod["metadata"]["namespace"], pod["metadata"]["name"])

            yield evict

    # --- inside ---

    def _admit_new(self, kind: str, manifest: Mapping[str, Any]) -> None:
        namespace, name = manifest["metadata"]["namespace"], manifest["metadata"]["name"]
        if namespace in self.gone:
            raise KubeError(404, "NotFound", f'namespaces "{namespace}" not found')
        if namespace in self.ending:
            raise kube_answers.namespace_ending(kind, namespace, name)
        used = sum((k, ns) == (kind, namespace) for k, ns, _ in self.objects)
        check_quota(kind, name, used, self.quotas.get(kind))

    def _writing(self, verb: str, kind: str, name: str) -> _Write:
        return _Write(self, verb, kind, name)

    def _merge(self, live: Object, manifest: Mapping[str, Any], subresource: str) -> None:
        before = clone(live)
        previous = self._applied.get((live["metadata"]["uid"], subresource), {})
        merged = _applied_over(live, manifest, previous)
        check_merged(merged)
        merged["metadata"] |= {name: before["metadata"][name] for name in ("uid", "resourceVersion", "generation")}
        live.clear()
        live.update(merged)
        self._bump(live, before)

    def _bump(self, live: Object, before: Object) -> None:
        if live != before:
            live["metadata"]["resourceVersion"] = str(next(self._numbers))
        if live.get("spec") != before.get("spec"):
            live["metadata"]["generation"] += 1


class _Write:
    def __init__(self, kube: FakeKube, verb: str, kind: str, name: str) -> None:
        self._kube, self._what = kube, (verb, kind, name)

    def __enter__(self) -> None:
        self._kube.before_write(*self._what)
        self._kube.writes.append(self._what)
        self._kube.requests[self._what[:2]] += 1

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._kube.after_write(*self._what)


def clone(document: T) -> T:
    """A deep copy by way of JSON, which is what a network would make of it (and faster than `copy`)."""
    copied: T = json.loads(json.dumps(document))
    return copied


def owned(child: Mapping[str, Any], owner: Mapping[str, Any]) -> bool:
    references = child["metadata"].get("ownerReferences") or []
    return any(reference["uid"] == owner["metadata"]["uid"] for reference in references)


def is_ready(pod: Mapping[str, Any]) -> bool:
    conditions = pod["status"].get("conditions") or []
    return any(condition["type"] == "Ready" and condition["status"] == "True" for condition in conditions)


def _turn_ready(pod: Object, ready: bool) -> None:
    condition = {"type": "Ready", "status": "True"} if ready else NOT_READY
    pod["status"]["conditions"] = [dict(condition)]


def _ruled_out(pod: Object) -> set[str]:
    affinity = (pod["spec"].get("affinity") or {}).get("nodeAffinity") or {}
    terms = (affinity.get("requiredDuringSchedulingIgnoredDuringExecution") or {}).get("nodeSelectorTerms") or []
    fields = [field for term in terms for field in term.get("matchFields") or [] if field["operator"] == "NotIn"]
    return {node for field in fields for node in field["values"]}


def revision_of(pod: Mapping[str, Any]) -> str:
    return str(pod["metadata"]["labels"][REVISION_LABEL])


def resource(name: str = "chat", namespace: str = "team", **spec: Any) -> Object:
    """A TensorParallelModel as a user would write it."""
    whole = {"model": {"hostPath": {"path": "/models/chat"}}, "tensorParallelSize": 2, **spec}
    return {"kind": KIND, "metadata": {"name": name, "namespace": namespace}, "spec": whole}


def _applied_over(live: Any, wanted: Any, previous: Any) -> Any:
    """Structured merge: `wanted` over `live`, without what `previous` set and `wanted` doesn't."""
    if not isinstance(wanted, Mapping) or not isinstance(live, Mapping):
        return clone(wanted)
    merged = dict(clone(live))
    before = previous if isinstance(previous, Mapping) else {}
    for name in before:
        if name not in wanted:
            merged.pop(name, None)
    for name, value in wanted.items():
        key = LIST_KEYS.get(name)
        if key == "port" and value and "containerPort" in value[0]:
            key = "containerPort"
        if key and isinstance(value, list) and isinstance(live.get(name), list):
            merged[name] = _keyed(live[name], value, before.get(name) or [], key)
        else:
            merged[name] = _applied_over(live.get(name), value, before.get(name))
    return merged


def _merge_patched(live: Any, patch: Any) -> Any:
    """RFC 7386: maps are merged, all else is replaced."""
    if not isinstance(patch, Mapping) or not isinstance(live, Mapping):
        return clone(patch)
    return dict(live) | {name: _merge_patched(live.get(name), value) for name, value in patch.items()}


def _keyed(live: list[Any], wanted: list[Any], previous: list[Any], key: str) -> list[Any]:
    dropped = {item.get(key) for item in previous} - {item.get(key) for item in wanted}
    by_live, by_previous = {item.get(key): item for item in live}, {item.get(key): item for item in previous}
    merged = [_applied_over(by_live.get(item[key], {}), item, by_previous.get(item[key], {})) for item in wanted]
    names = {item.get(key) for item in wanted} | dropped
    return merged + [item for item in live if item.get(key) not in names]
