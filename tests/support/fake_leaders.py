"""Stands in for the supervisors of fake leader pods: `python -m tests.support.fake_leaders KUBECONFIG PORT`.

Each group has the runtime's own `StatusStore` behind the runtime's own HTTP application, token and long poll included.
The connection's local address says which pod was meant, so all pod addresses must be this machine's. Groups are well
until `POST /poison?group=NAMESPACE/MODEL/NUMBER` on PORT, which answers when that was (unix seconds) and makes rank 1
the suspect; a poisoned group is well again once another pod runs in place of one of its own. `GET /` counts groups.
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx
import msgspec
import uvicorn
import yaml
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from tests.support.cluster_api import client_context

from lockstep_operator.types.names import (
    GROUP_LABEL,
    MODEL_LABEL,
    OPERATOR_TOKEN_VOLUME,
    POD_INDEX_LABEL,
    REVISION_LABEL,
    TOKEN_KEY,
)
from lockstep_runtime.config import ServeConfig
from lockstep_runtime.protocol.status import (
    STATUS_PORT,
    Fault,
    FaultRecord,
    GroupState,
    RankState,
    RankStatus,
)
from lockstep_runtime.supervisor.callers import Callers
from lockstep_runtime.supervisor.server import create_app
from lockstep_runtime.supervisor.status_store import StatusStore

Object = dict[str, Any]

SUSPECT: Final = 1
GROUP_PODS: Final = f"{MODEL_LABEL},{POD_INDEX_LABEL}"


@dataclass(slots=True)
class Group:
    """`pods` are UIDs by index, of those that run."""

    name: str
    pods: dict[int, str] = field(default_factory=dict)
    address: str = ""
    store: StatusStore | None = None
    faults: list[FaultRecord] = field(default_factory=list)

    def begin(self, pod: Object, size: int) -> StatusStore:
        """A new first pod: its supervisor's board, on which the group is well."""
        labels, name = pod["metadata"]["labels"], pod["metadata"]["name"]
        config = ServeConfig(
            model="/model", served_name="fake", model_name=labels[MODEL_LABEL], group=int(labels[GROUP_LABEL]),
            spec_revision=labels[REVISION_LABEL], tensor_parallel_size=size, ranks_per_pod=1, pod=name,
        )  # fmt: skip
        self.store, self.address = StatusStore(config), pod["status"]["podIP"]
        self.faults = []
        self.well(pod["spec"]["nodeName"], size)
        return self.store

    def well(self, node: str, size: int) -> None:
        assert self.store is not None
        now = time.time()
        self.faults = [msgspec.structs.replace(fault, recovered_at=now, rung="Respawn") for fault in self.faults]
        stem = self.store.status.model
        ranks = [
            RankStatus(
                rank=rank, pod_index=rank, state=RankState.READY, pod=f"{stem}-{self.store.status.group}-{rank}",
                node=node, epoch=1 + len(self.faults),
            )
            for rank in range(size)
        ]  # fmt: skip
        self._say(GroupState.READY, ranks=ranks, accepting=True, message="", since=now)

    def poison(self) -> float:
        assert self.store is not None
        now = time.time()
        fault = FaultRecord(
            id=len(self.faults) + 1, fault=Fault.HANG, rank=SUSPECT, message="on purpose", at=now, epoch=1
        )
        self.faults.append(fault)
        self._say(GroupState.POISONED, accepting=False, message="on purpose", since=now)
        return now

    def _say(self, state: GroupState, **fields: Any) -> None:
        assert self.store is not None
        said = {"state": state, "faults": [*self.faults], "epoch": 1 + len(self.faults), **fields}
        self.store.take(msgspec.structs.replace(self.store.status, **said))


class Leaders:
    """All groups, kept by a watch of their pods."""

    def __init__(self, kubeconfig: Path) -> None:
        config = yaml.safe_load(kubeconfig.read_text())
        cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
        self._http = httpx.Client(base_url=cluster["server"], verify=client_context(cluster, user), timeout=None)
        self.groups: dict[str, Group] = {}
        self._by_address: dict[str, ASGIApp] = {}
        self._tokens: dict[str, str] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        address = scope["server"][0] if scope["type"] == "http" else ""
        app = self._by_address.get(address) or PlainTextResponse("no group has this address\n", 404)
        await app(scope, receive, send)

    def follow(self, loop: asyncio.AbstractEventLoop) -> None:
        """In a thread, for ever."""
        for kind, pod in self._events():
            labels, metadata = pod["metadata"]["labels"], pod["metadata"]
            name = f"{metadata['namespace']}/{labels[MODEL_LABEL]}/{labels[GROUP_LABEL]}"
            runs = kind != "DELETED" and pod.get("status", {}).get("podIP") and "deletionTimestamp" not in metadata
            token = self._token(metadata["namespace"], secret_of(pod)) if runs else ""
            loop.call_soon_threadsafe(self._heard, name, pod, token)

    def _heard(self, name: str, pod: Object, token: str) -> None:
        group = self.groups.setdefault(name, Group(name))
        uid, index = pod["metadata"]["uid"], int(pod["metadata"]["labels"][POD_INDEX_LABEL])
        if not token:
            if group.pods.get(index) == uid:
                del group.pods[index]
            if index == 0 and not group.pods.get(0):
                self._by_address.pop(group.address, None)
            return
        if group.pods.get(index) == uid:
            return
        group.pods[index] = uid
        size = size_of(pod)
        if index == 0:
            self._by_address.pop(group.address, None)
            self._by_address[pod["status"]["podIP"]] = create_app(group.begin(pod, size), Callers(token))
        elif group.store is not None and group.store.status.state is GroupState.POISONED and len(group.pods) == size:
            group.well(pod["spec"]["nodeName"], size)

    def _token(self, namespace: str, secret: str) -> str:
        """That the pods know the operator by."""
        key = f"{namespace}/{secret}"
        if key not in self._tokens:
            found = self._http.get(f"/api/v1/namespaces/{namespace}/secrets/{secret}").json()
            self._tokens[key] = base64.b64decode(found["data"][TOKEN_KEY]).decode()
        return self._tokens[key]

    def _events(self) -> Iterator[tuple[str, Object]]:
        while True:
            listed = self._http.get("/api/v1/pods", params={"labelSelector": GROUP_PODS}).json()
            yield from (("ADDED", pod) for pod in listed["items"])
            since = {"watch": "true", "resourceVersion": listed["metadata"]["resourceVersion"]}
            with self._http.stream("GET", "/api/v1/pods", params={"labelSelector": GROUP_PODS, **since}) as answer:
                for line in answer.iter_lines():
                    event = json.loads(line)
                    if event["type"] == "ERROR":
                        break
                    yield event["type"], event["object"]


def secret_of(pod: Mapping[str, Any]) -> str:
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    return str(volumes[OPERATOR_TOKEN_VOLUME]["secret"]["secretName"])


def size_of(pod: Mapping[str, Any]) -> int:
    """Ranks of the pod's group, one in each pod."""
    flags = [one.partition("=") for one in pod["spec"]["containers"][0]["args"]]
    return int(next(value for name, _, value in flags if name == "--tensor-parallel-size"))


def control(leaders: Leaders) -> Starlette:
    async def count(_: Request) -> PlainTextResponse:
        whole = [group for group in leaders.groups.values() if group.store and group.store.status.accepting]
        return PlainTextResponse(str(len(whole)))

    async def poison(request: Request) -> PlainTextResponse:
        return PlainTextResponse(repr(leaders.groups[request.query_params["group"]].poison()))

    return Starlette(routes=[Route("/", count), Route("/poison", poison, methods=["POST"])])


async def main(kubeconfig: Path, port: int) -> None:
    leaders = Leaders(kubeconfig)
    threading.Thread(target=leaders.follow, args=(asyncio.get_running_loop(),), daemon=True).start()
    servers = [
        uvicorn.Config(app, host=host, port=number, log_level="warning", access_log=False, lifespan="off")
        for app, host, number in ((leaders, "0.0.0.0", STATUS_PORT), (control(leaders), "127.0.0.1", port))
    ]
    async with asyncio.TaskGroup() as group:
        for config in servers:
            group.create_task(uvicorn.Server(config).serve())


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))
