"""An operator that is killed at random moments while a test goes on."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Final, Self

from tests.support import kubectl
from tests.support.cluster_api import ClusterApi
from tests.support.cluster_model import OPERATOR_NAMESPACE, OPERATOR_SELECTOR, Object, operator_log, operator_pods
from tests.support.cluster_processes import container_processes, kill
from tests.support.wait import until

LEASE: Final = "lockstep"


class OperatorKiller:
    """Kills the leading operator's processes `kills` times from a thread, and waits at the end until all are Ready.

    A kill is SIGKILL, so that nothing is tidied up. The pod is deleted too: the kubelet would restart its container
    only after a growing back-off, and the tests are about the operator's memory, not about the kubelet's patience.
    """

    def __init__(self, api: ClusterApi, chance: random.Random, kills: int = 2, longest: float = 5.0) -> None:
        self._api = api
        self._pauses = [chance.uniform(0.1, longest) for _ in range(kills)]
        self._stop = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run)
        self.kills = 0
        print(f"the operator's lives will last {[round(pause, 1) for pause in self._pauses]} s")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._stop.set()
        self._thread.join()
        if self._error is not None and kind is None:
            raise self._error
        until_operator_ready(self._api)

    def _run(self) -> None:
        try:
            for pause in self._pauses:
                pod = until("an operator to kill", lambda: leading_operator(self._api), 60)
                if self._stop.wait(pause):
                    return
                kill_operator(pod)
                self.kills += 1
        except Exception as error:  # a thread's boundary: the test's own thread raises it
            self._error = error


def leading_operator(api: ClusterApi) -> Object | None:
    """The pod that holds the operators' Lease, while there is a process in it."""
    lease = api.find("leases", OPERATOR_NAMESPACE, LEASE) or {"spec": {}}
    holder = lease["spec"].get("holderIdentity")
    pods = [pod for pod in operator_pods(api) if pod["metadata"]["name"] == holder]
    return next((pod for pod in pods if container_processes(pod)), None)


def kill_operator(pod: Object) -> None:
    for pid in container_processes(pod):
        kill(pid)
    name = pod["metadata"]["name"]
    kubectl.kubectl(
        "-n",
        OPERATOR_NAMESPACE,
        "delete",
        "pod",
        name,
        "--grace-period=0",
        "--force",
        "--wait=false",
        "--ignore-not-found",
    )


def until_operator_ready(api: ClusterApi, seconds: float = 60) -> None:
    """As many as there are to be, and one of them leads."""
    (deployment,) = api.items("deployments", OPERATOR_NAMESPACE, OPERATOR_SELECTOR)
    wanted = ["True"] * deployment["spec"]["replicas"]

    def ready() -> bool:
        pods = operator_pods(api)
        conditions = [c for pod in pods for c in pod["status"].get("conditions", []) if c["type"] == "Ready"]
        return [condition["status"] for condition in conditions] == wanted and leading_operator(api) is not None

    until(f"{len(wanted)} operators, Ready", ready, seconds, lambda: operator_log(api, tail=40))


@contextmanager
def operator_away(api: ClusterApi) -> Iterator[Object]:
    """The deployed operator is scaled to nothing meanwhile. Hands out its Deployment."""
    (deployment,) = api.items("deployments", OPERATOR_NAMESPACE, OPERATOR_SELECTOR)
    try:
        scale_operator(deployment, 0)
        until("the operator to be gone", lambda: not api.items("pods", OPERATOR_NAMESPACE, OPERATOR_SELECTOR), 60)
        yield deployment
    finally:
        scale_operator(deployment, deployment["spec"]["replicas"])
        until_operator_ready(api)


def scale_operator(deployment: Object, replicas: int) -> None:
    name = deployment["metadata"]["name"]
    kubectl.kubectl("-n", OPERATOR_NAMESPACE, "scale", "deployment", name, f"--replicas={replicas}")
