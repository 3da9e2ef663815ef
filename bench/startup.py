"""Claim: `kubectl apply` to Ready with a small model in two pods takes at most 20 s on a warm node. Where it goes.

    make bench-startup          needs the cluster: make cluster-up images deploy

The API server says when objects appear; the leader's supervisor is asked for every change of its group's status, which
is finer than the seconds of Kubernetes' time stamps.
"""

from __future__ import annotations

import contextlib
import secrets
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import httpx
from bench.report import Row, report
from tests.support.cluster_api import ClusterApi
from tests.support.cluster_model import Model, tiny_chat
from tests.support.kubectl import KUBECONFIG, kubectl

RUNS: Final = 3
DEADLINE: Final = 180.0
AIM: Final = 20.0
CASE: Final = "tiny-chat, 2 pods"

# In the order in which they end. Each lasts from the end of the one before.
PHASES: Final = {
    "accepted": "kubectl apply returns",
    "pods": "the operator and the StatefulSet controller have made every pod",
    "scheduled": "every pod has a node",
    "supervisor": "sandbox, container, Python: the leader's supervisor answers",
    "loading": "every worker has imported torch and begins to load",
    "loaded": "every rank has its weights",
    "joined": "communicator made and proved, KV cache laid out: the group is Ready",
    "ready": "probe, status, operator: the resource is Ready",
}
STATES: Final = ("Absent", "Starting", "Loading", "Loaded", "Ready")


class Clock:
    """Seconds since `kubectl apply` began, for the first time that each thing was seen."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self.seen: dict[str, float] = {}

    def mark(self, phase: str) -> None:
        self.seen.setdefault(phase, time.monotonic() - self._began)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began


def measure(api: ClusterApi, namespace: str) -> dict[str, float]:
    """Seconds from `kubectl apply` to the end of each phase, once."""
    model = Model(api, namespace, f"start-{secrets.token_hex(2)}")
    clock = Clock()
    watcher = threading.Thread(target=watch_group, args=(ClusterApi(KUBECONFIG), model, clock))
    watcher.start()
    model.apply(tiny_chat())
    clock.mark("accepted")
    watch_resources(model, clock)
    watcher.join()
    model.delete()
    model.until_gone()
    return clock.seen


def watch_resources(model: Model, clock: Clock) -> None:
    """What the API server shows, until the resource is Ready."""
    size = model.read()["spec"]["tensorParallelSize"]
    while "ready" not in clock.seen:
        if clock.seconds > DEADLINE:
            raise TimeoutError(model.explain())
        pods = model.pods()
        if len(pods) == size:
            clock.mark("pods")
            if all(pod["spec"].get("nodeName") for pod in pods):
                clock.mark("scheduled")
        if model.is_true("Ready"):
            clock.mark("ready")
        time.sleep(0.05)


def watch_group(api: ClusterApi, model: Model, clock: Clock) -> None:
    """What the group says of itself, change by change, until all its ranks are Ready."""
    address = _first(lambda: _leader_address(api, model), clock)
    token = _first(lambda: model.token() if model.secret("token") else None, clock)
    revision: int | None = None
    with httpx.Client(headers={"Authorization": f"Bearer {token}"}, timeout=40) as client:
        while "joined" not in clock.seen and clock.seconds < DEADLINE:
            query = {} if revision is None else {"after": revision}
            try:
                status = client.get(f"http://{address}:7401/status", params=query).raise_for_status().json()
            except httpx.HTTPError:
                time.sleep(0.02)
                continue
            revision = status["revision"]
            clock.mark("supervisor")
            _mark_states(status, clock)


def _mark_states(status: dict[str, Any], clock: Clock) -> None:
    states = [rank["state"] for rank in status["ranks"]]
    least = min((STATES.index(state) for state in states if state in STATES), default=0)
    for state, phase in (("Loading", "loading"), ("Loaded", "loaded")):
        if states and least >= STATES.index(state):
            clock.mark(phase)
    if status["state"] == "Ready":
        clock.mark("joined")


def _first(look: Callable[[], str | None], clock: Clock) -> str:
    while clock.seconds < DEADLINE:
        if found := look():
            return found
        time.sleep(0.02)
    raise TimeoutError("the leader pod got no address")


def _leader_address(api: ClusterApi, model: Model) -> str | None:
    pod = api.find("pods", model.namespace, f"{model.name}-0-0")
    return pod["status"].get("podIP") if pod else None


@contextlib.contextmanager
def scratch_namespace() -> Iterator[str]:
    name = f"bench-startup-{secrets.token_hex(3)}"
    kubectl("create", "namespace", name)
    try:
        yield name
    finally:
        kubectl("delete", "namespace", name, "--wait=false")


def rows(runs: list[dict[str, float]]) -> list[Row]:
    """The median of each phase's duration, in the order of `PHASES`, and of the whole."""
    found: list[Row] = []
    previous = [0.0 for _ in runs]
    for phase, description in PHASES.items():
        ends = [run[phase] for run in runs]
        lasted = [end - before for end, before in zip(ends, previous, strict=True)]
        found.append(Row(case=CASE, metric=description, value=statistics.median(lasted), unit="s"))
        previous = ends
    whole = statistics.median(previous)
    return [*found, Row(case=CASE, metric="apply to Ready", value=whole, unit="s", peer="aim", peer_value=AIM)]


def main() -> None:
    api = ClusterApi(KUBECONFIG)
    with scratch_namespace() as namespace:
        runs = [measure(api, namespace) for _ in range(RUNS)]
    report("startup", rows(runs))
    print(f"apply to Ready in each run: {[round(run['ready'], 1) for run in runs]} s")


if __name__ == "__main__":
    main()
