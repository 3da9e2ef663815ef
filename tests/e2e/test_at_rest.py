"""What an operator asks a real API server for models that nobody changes: nothing but a token now and then.

Counted between the operator and the API server, where its watches go through as well.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import httpx
import pytest
from tests.support import kubectl
from tests.support.api_proxy import Answer, ApiProxy, Asked, Forward
from tests.support.cluster_api import ClusterApi
from tests.support.cluster_chaos import operator_away
from tests.support.cluster_model import OPERATOR_NAMESPACE, Model, tiny_chat
from tests.support.http import HTTP
from tests.support.local_operator import LocalOperator, deployed_settings, deployed_user
from tests.support.wait import until

from lockstep_operator.cluster.client import RESOURCES
from lockstep_operator.cluster.indexes import INDEXED

NewNamespace = Callable[[str], str]

MODELS: Final = 20
RESYNC_SECONDS: Final = 2  # so there are as many passes in a minute as else in half an hour
WATCHED_SECONDS: Final = 40.0
START_SECONDS: Final = 60.0
CALM_SECONDS: Final = 6.0


class Counted:
    """A plan that forwards everything and keeps what was asked of models: methods and kinds."""

    def __init__(self, namespace: str) -> None:
        self._of_models = f"/namespaces/{namespace}/"
        self.asked: list[tuple[float, str]] = []

    async def __call__(self, asked: Asked, forward: Forward) -> Answer:
        if self._of_models in asked.url and "fieldSelector=metadata.name" not in asked.url:  # may it be watched?
            what = asked.url.partition("?")[0].partition(self._of_models)[2]
            self.asked.append((time.monotonic(), f"{asked.method} {what}"))
        return await forward()

    def since(self, moment: float) -> Counter[str]:
        return Counter(what for when, what in self.asked if when >= moment)


class Watched:
    """An operator of this machine for one namespace, in which nobody else has a model."""

    def __init__(self, api: ClusterApi, new_namespace: NewNamespace, folder: Path) -> None:
        self.namespace, self._api = new_namespace("at-rest"), api
        deployment = api.find("deployments", OPERATOR_NAMESPACE, "lockstep")
        assert deployment is not None
        self.proxy = ApiProxy(kubectl.KUBECONFIG, deployed_user(deployment))
        self.counted = Counted(self.namespace)
        self.proxy.plan = self.counted
        self.proxy.start()
        settings = deployed_settings(deployment) | {"LOCKSTEP_RESYNC_SECONDS": str(RESYNC_SECONDS)}
        self.operator = LocalOperator(self.proxy.url, self.namespace, settings, folder / "operator")

    def make(self, name: str) -> Model:
        model = Model(self._api, self.namespace, name)
        model.apply(tiny_chat(tensorParallelSize=1, replicas=0))
        return model

    def passes(self) -> float:
        """That have found nothing to do."""
        text = HTTP.get(f"{self.operator.url}/metrics").text
        lines = [
            line for line in text.splitlines() if line.startswith('lockstep_operator_reconciles_total{result="quiet"}')
        ]
        return float(lines[0].rpartition(" ")[2]) if lines else 0.0

    def until_calm(self) -> None:
        def calm() -> bool:
            try:
                started = self.passes() > 0
            except httpx.TransportError:
                return False
            return started and not self.counted.since(time.monotonic() - CALM_SECONDS)

        until("the operator to come to rest", calm, START_SECONDS, lambda: self.operator.log()[-8000:])


@pytest.fixture
def watched(api: ClusterApi, new_namespace: NewNamespace, tmp_path: Path) -> Iterator[Watched]:
    with operator_away(api):
        made = Watched(api, new_namespace, tmp_path)
        yield made
        made.operator.kill()
        made.proxy.stop()


def until_told(model: Model) -> None:
    """It asks for no pods, and that is as it should be."""
    model.until("it to be Ready", lambda: model.is_true("Ready"), START_SECONDS)


def test_a_pass_at_rest_asks_nothing_and_an_operator_that_starts_asks_for_lists(watched: Watched) -> None:
    models = [watched.make(f"idle-{number}") for number in range(MODELS)]
    watched.operator.start()
    for model in models:
        until_told(model)
    watched.until_calm()

    began, passes = time.monotonic(), watched.passes()
    time.sleep(WATCHED_SECONDS)
    found = watched.passes() - passes
    assert found > MODELS * WATCHED_SECONDS / RESYNC_SECONDS / 2
    assert watched.counted.since(began) == {}

    began = time.monotonic()
    watched.operator.replace()
    watched.until_calm()
    print(f"{found:.0f} passes at rest; at the start: {watched.counted.since(began)}")
    listed = {f"GET {RESOURCES[kind][1]}": 1 for kind in INDEXED}  # by kopf, for its indexes
    assert watched.counted.since(began) == listed | {"GET limitranges": 1}


def test_a_change_costs_a_look_at_everything_and_then_nothing(watched: Watched) -> None:
    model = watched.make("idle")
    watched.operator.start()
    until_told(model)
    watched.until_calm()

    began = time.monotonic()
    kubectl.kubectl("delete", "service", "idle", "--namespace", watched.namespace)
    watched.until_calm()
    asked = watched.counted.since(began)
    print(f"for a Service that was deleted: {sum(asked.values())} requests, {asked}")
    assert asked["PATCH services/idle"] == 1
    assert asked["GET statefulsets"] <= 4
