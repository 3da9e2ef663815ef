"""The CRD in the chart's release: how an older chart's comes there, its two versions, and what an uninstall leaves.

All of it on a second API server, with a release of its own.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
import yaml
from tests.support import kubectl
from tests.support.chart import CHART, CRD_SOURCE, LEAST_VALUES, helm
from tests.support.cluster_model import Object, manifest, tiny_chat
from tests.support.second_api_server import second_api_server
from tests.support.wait import until

NAME: Final = "tensorparallelmodels.lockstep.dev"
INSTALL: Final = (str(CHART), "--values", LEAST_VALUES)
SERVED_SECONDS: Final = 30.0


@dataclass(frozen=True, slots=True)
class Place:
    """An API server with nothing behind it: objects are kept, no pod runs."""

    kubeconfig: Path

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        return kubectl.kubectl(f"--kubeconfig={self.kubeconfig}", *arguments, stdin=stdin)

    def apply(self, document: Object, *options: str) -> str:
        return self.kubectl("apply", "--server-side", *options, "-f", "-", stdin=yaml.safe_dump(document))

    def helm(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return helm(f"--kubeconfig={self.kubeconfig}", "--namespace=lockstep-system", *arguments)

    def must(self, *arguments: str) -> None:
        result = self.helm(*arguments)
        assert result.returncode == 0, result.stderr

    def model(self, version: str) -> Object:
        found: Object = json.loads(
            self.kubectl("get", f"tensorparallelmodels.{version}.lockstep.dev", "chat", "-o=json")
        )
        return found

    def until_served(self, version: str) -> None:
        path = f"/apis/lockstep.dev/{version}/tensorparallelmodels"
        arguments = (f"--kubeconfig={self.kubeconfig}", "get", "--raw", path)
        until(f"{version} to be served", lambda: kubectl.attempt(*arguments).returncode == 0, SERVED_SECONDS)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with second_api_server(tmp_path) as kubeconfig:
        yield Place(kubeconfig)


def older_crd() -> Object:
    """As charts before had it: one version, beside the release."""
    crd: Object = yaml.safe_load(CRD_SOURCE.read_text())
    return crd


def test_an_older_crd_becomes_the_releases_with_its_models(place: Place) -> None:
    place.apply(older_crd(), "--field-manager=admin")
    place.until_served("v1alpha1")
    place.apply(manifest("default", "chat", tiny_chat()))
    before = place.model("v1alpha1")
    place.must("install", "lockstep", *INSTALL, "--create-namespace", "--set=crds.install=false")

    refused = place.helm("upgrade", "lockstep", *INSTALL)
    assert "exists and cannot be imported into the current release" in refused.stderr, refused
    owner = ("meta.helm.sh/release-name=lockstep", "meta.helm.sh/release-namespace=lockstep-system")
    place.kubectl("label", "crd", NAME, "app.kubernetes.io/managed-by=Helm")
    place.kubectl("annotate", "crd", NAME, *owner)
    place.must("upgrade", "lockstep", *INSTALL, "--force-conflicts")
    place.until_served("v1beta1")

    alpha, beta = place.model("v1alpha1"), place.model("v1beta1")
    assert (alpha["metadata"]["uid"], alpha["spec"]) == (before["metadata"]["uid"], before["spec"])
    assert alpha["metadata"]["resourceVersion"] == before["metadata"]["resourceVersion"], "nothing was written"
    assert beta["apiVersion"] == "lockstep.dev/v1beta1"
    assert (beta["spec"], beta["metadata"]["uid"]) == (before["spec"], before["metadata"]["uid"])


def test_a_model_is_one_in_both_versions_and_outlives_the_release(place: Place) -> None:
    place.must("install", "lockstep", *INSTALL, "--create-namespace")
    place.until_served("v1beta1")
    model = manifest("default", "chat", tiny_chat())
    place.apply(model)
    generation = place.model("v1beta1")["metadata"]["generation"]
    place.apply(model | {"apiVersion": "lockstep.dev/v1beta1"})
    assert place.model("v1alpha1")["metadata"]["generation"] == generation, "the version alone changes nothing"
    place.apply(manifest("default", "chat", tiny_chat(replicas=3)) | {"apiVersion": "lockstep.dev/v1beta1"})
    assert place.model("v1alpha1")["spec"]["replicas"] == 3

    place.must("uninstall", "lockstep")
    assert place.model("v1beta1")["spec"]["replicas"] == 3
    place.must("install", "lockstep", *INSTALL)
    assert place.model("v1beta1")["spec"]["replicas"] == 3
    place.apply(older_crd(), "--force-conflicts")
    assert place.model("v1alpha1")["spec"]["replicas"] == 3
