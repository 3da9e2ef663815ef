"""An operator that serves named namespaces, with a Role in each: one that goes takes nothing from the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.support import kubectl
from tests.support.api_proxy import ApiProxy
from tests.support.chart import render
from tests.support.cluster_api import ClusterApi
from tests.support.cluster_model import OPERATOR_NAMESPACE, Model, tiny_chat
from tests.support.http import HTTP
from tests.support.local_operator import LocalOperator, deployed_settings
from tests.support.shared_key import shared_key
from tests.support.wait import until

NewNamespace = Callable[[str], str]

START_SECONDS: Final = 60.0
SERVED_SECONDS: Final = 60.0
GONE_SECONDS: Final = 90.0
NOWHERE: Final = {"spec": {"nodeSelector": {"lockstep.dev/test": "no-such-node"}}}


class Served:
    """Two namespaces with a model each, of which only the namespaced operator under test is asked what it knows."""

    def __init__(self, api: ClusterApi, new_namespace: NewNamespace, folder: Path) -> None:
        self._api = api
        # The one that goes comes first: an operator that is started meanwhile must not wait for it.
        self.lost, self.kept = new_namespace("lost"), new_namespace("kept")
        self.user = f"system:serviceaccount:{self.kept}:lockstep-of-the-test"
        self.proxy = ApiProxy(kubectl.KUBECONFIG, self.user)
        self.proxy.start()
        deployment = api.find("deployments", OPERATOR_NAMESPACE, "lockstep")
        assert deployment is not None
        settings = deployed_settings(deployment) | {"LOCKSTEP_RESYNC_SECONDS": "5"}
        self.operator = LocalOperator(self.proxy.url, f"{self.lost},{self.kept}", settings, folder / "operator")

    def grant(self, namespace: str) -> None:
        """What the chart makes for a watched namespace."""
        for made in render({"watchNamespaces": [namespace]}):
            if made["kind"] not in ("Role", "RoleBinding") or made["metadata"]["namespace"] != namespace:
                continue  # the operator's own, for its Lease, is the deployed one's
            if made["kind"] == "RoleBinding":
                made["subjects"] = [{"kind": "User", "name": self.user, "apiGroup": "rbac.authorization.k8s.io"}]
            kubectl.apply(made)

    def model(self, namespace: str) -> Model:
        """It asks for no pods: what it is told must be understood, nothing more."""
        made = Model(self._api, namespace, "idle")
        made.apply(tiny_chat(tensorParallelSize=1, replicas=0, template=NOWHERE))
        return made

    def metric(self, name: str, **labels: str) -> float | None:
        """What the operator exposes; None where there is no such series, or no operator."""
        try:
            text = HTTP.get(f"{self.operator.url}/metrics").text
        except httpx.TransportError:
            return None
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        return next((s.value for s in samples if s.name == name and labels.items() <= s.labels.items()), None)

    def ready(self, namespace: str) -> float | None:
        labels = {"namespace": namespace, "model": "idle", "condition": "Ready"}
        return self.metric("lockstep_operator_condition", **labels)

    def until(self, what: str, look: Callable[[], bool], seconds: float = SERVED_SECONDS) -> None:
        until(what, look, seconds, lambda: self.operator.log()[-8000:])

    def is_well(self) -> bool:
        try:
            return HTTP.get(f"{self.operator.url}/readyz").status_code == 200
        except httpx.TransportError:
            return False


@pytest.fixture
def served(api: ClusterApi, new_namespace: NewNamespace, tmp_path: Path) -> Iterator[Served]:
    made = Served(api, new_namespace, tmp_path)
    with shared_key(made.user):
        yield made
    made.operator.kill()  # first: else it would come back to a proxy that is about to close
    made.proxy.stop()


def change(model: Model, **spec: Any) -> None:
    model.apply(tiny_chat(tensorParallelSize=1, template=NOWHERE, **spec))


def test_a_namespace_that_goes_takes_nothing_from_the_others_and_is_served_again_when_it_is_back(
    served: Served, api: ClusterApi
) -> None:
    for namespace in (served.lost, served.kept):
        served.grant(namespace)
    kept = served.model(served.kept)
    served.model(served.lost)
    served.operator.start()
    served.until(
        "both to be served", lambda: served.ready(served.lost) == served.ready(served.kept) == 1, START_SECONDS
    )

    kubectl.kubectl("delete", "namespace", served.lost, timeout=GONE_SECONDS)
    served.proxy.cut_watches()

    told = f"namespace {served.lost} can't be served"
    served.until("the loss in the log", lambda: told in served.operator.log())
    assert served.metric("lockstep_operator_namespace_served", namespace=served.lost) == 0
    assert served.metric("lockstep_operator_namespace_served", namespace=served.kept) == 1
    assert served.is_well(), served.operator.log()
    change(kept, replicas=1)
    served.until("the other namespace's model to be looked at", lambda: served.ready(served.kept) == 0)
    served.until("nothing to be said of the lost model", lambda: served.ready(served.lost) is None, 90)

    served.operator.replace()
    served.until("a new operator to begin without it", served.is_well, START_SECONDS)
    change(kept, replicas=0)
    served.until("the other namespace's model to be looked at", lambda: served.ready(served.kept) == 1)

    kubectl.kubectl("create", "namespace", served.lost)
    served.grant(served.lost)
    served.model(served.lost)
    served.until("the namespace to be served again", lambda: served.ready(served.lost) == 1)
    assert served.operator.log().count("WARNING lockstep_operator: waiting") == 0
    assert "Traceback" not in served.operator.log()
