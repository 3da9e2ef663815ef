"""An operator of today where the CRD is an older version's, as after a `helm upgrade` alone: it tells, and goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
import yaml
from tests.support import kubectl
from tests.support.api_proxy import ApiProxy
from tests.support.chart import CRD_SOURCE
from tests.support.cluster_api import ClusterApi
from tests.support.cluster_model import OPERATOR_NAMESPACE, OPERATOR_SELECTOR, Object, manifest, tiny_chat
from tests.support.http import HTTP
from tests.support.local_operator import LocalOperator, deployed_settings, deployed_user
from tests.support.second_api_server import second_api_server
from tests.support.wait import until

TOLD_SECONDS: Final = 15.0
SERVED_SECONDS: Final = 30.0  # until a changed CRD is what the API server publishes
NEW_FIELDS: Final = ("podProblem", "readyRanks", "waiting")  # of status.groups[], which an older version had not


@dataclass(frozen=True, slots=True)
class Place:
    """A second cluster, as far as an operator can see."""

    kubeconfig: Path
    api: ClusterApi
    operator: LocalOperator

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        return kubectl.kubectl(f"--kubeconfig={self.kubeconfig}", *arguments, stdin=stdin)

    def apply(self, document: Object) -> None:
        self.kubectl("apply", "--server-side", "-f", "-", stdin=yaml.safe_dump(document))

    def status(self) -> Object:
        model = self.api.find("tensorparallelmodels", "default", "chat")
        assert model is not None
        status: Object = model.get("status", {})
        return status

    def ready(self) -> Object:
        conditions = self.status().get("conditions", [])
        return next((one for one in conditions if one["type"] == "Ready"), {"message": ""})

    def until(self, what: str, look: Any, seconds: float = TOLD_SECONDS) -> None:
        until(what, look, seconds, lambda: f"{self.status()}\n{self.operator.log()}")

    def readyz(self) -> tuple[int, str]:
        try:
            answer = HTTP.get(f"{self.operator.url}/readyz")
        except httpx.TransportError as error:
            return 0, str(error)
        return answer.status_code, answer.text


@pytest.fixture
def place(api: ClusterApi, tmp_path: Path) -> Iterator[Place]:
    (deployment,) = api.items("deployments", OPERATOR_NAMESPACE, OPERATOR_SELECTOR)
    with second_api_server(tmp_path) as kubeconfig:
        proxy, second = ApiProxy(kubeconfig, deployed_user(deployment)), ClusterApi(kubeconfig)
        proxy.start()
        operator = LocalOperator(proxy.url, "default", deployed_settings(deployment), tmp_path / "operator")
        place = Place(kubeconfig, second, operator)
        account = f"--user={deployed_user(deployment)}"
        try:
            place.kubectl("create", "namespace", OPERATOR_NAMESPACE)  # of its key
            place.kubectl("create", "clusterrolebinding", "operator", "--clusterrole=cluster-admin", account)
            yield place
        finally:
            operator.kill()
            proxy.stop()
            second.close()


def old_crd() -> Object:
    crd: Object = yaml.safe_load(CRD_SOURCE.read_text())
    for version in crd["spec"]["versions"]:
        status = version["schema"]["openAPIV3Schema"]["properties"]["status"]["properties"]
        for field in NEW_FIELDS:
            del status["groups"]["items"]["properties"][field]
    return crd


def test_what_an_older_crd_lacks_is_named_and_the_rest_of_the_status_is_true(place: Place) -> None:
    place.apply(old_crd())
    place.kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=30s")
    until("the CRD to be served", lambda: _is_served(place), SERVED_SECONDS)
    place.apply(manifest("default", "chat", tiny_chat()))

    began = time.monotonic()
    place.operator.start()
    place.until("the status", lambda: place.ready()["message"].startswith("0 of 2 pods of group 0 run"))
    place.until("/readyz to tell", lambda: place.readyz()[0] == 503 and "lacks" in place.readyz()[1])
    print(f"told {time.monotonic() - began:.1f} s after the operator's start")
    assert all(f"status.groups.{field}" in place.readyz()[1] for field in NEW_FIELDS), place.readyz()
    status = place.status()
    assert status["observedGeneration"] == 1
    assert (place.ready()["status"], place.ready()["reason"]) == ("False", "Starting")
    [group] = status["groups"]
    assert not group.keys() & set(NEW_FIELDS)
    assert place.api.find("statefulsets", "default", "chat-0") is not None, "all else is done"
    assert "Traceback" not in place.operator.log()

    place.apply(yaml.safe_load(CRD_SOURCE.read_text()))
    place.operator.replace()  # or wait a minute
    place.until("/readyz to be content", lambda: place.readyz() == (200, "ok\n"), SERVED_SECONDS)
    place.until("what was left out", lambda: "waiting" in place.status()["groups"][0], SERVED_SECONDS)


def _is_served(place: Place) -> bool:
    command = (f"--kubeconfig={place.kubeconfig}", "get", "--raw", "/openapi/v3/apis/lockstep.dev/v1alpha1")
    found = kubectl.attempt(*command)
    return found.returncode == 0 and "tensorParallelSize" in found.stdout
