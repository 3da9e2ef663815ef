"""The CRD in the chart's release: how an older chart's comes there, its two versions, and what an uninstall leaves.

All of it on a second API server, with a release of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
import yaml
from tests.support.chart import CRD_SOURCE
from tests.support.chart_place import ChartPlace
from tests.support.cluster_model import Object, manifest, tiny_chat
from tests.support.second_api_server import second_api_server

NAME: Final = "tensorparallelmodels.lockstep.dev"


@pytest.fixture
def place(tmp_path: Path) -> Iterator[ChartPlace]:
    with second_api_server(tmp_path) as kubeconfig:
        yield ChartPlace(kubeconfig)


def older_crd() -> Object:
    """As charts before had it: one version, beside the release."""
    crd: Object = yaml.safe_load(CRD_SOURCE.read_text())
    return crd


def test_an_older_crd_becomes_the_releases_with_its_models(place: ChartPlace) -> None:
    place.apply(older_crd(), "--field-manager=admin")
    place.until_served("v1alpha1")
    place.apply(manifest("default", "chat", tiny_chat()))
    before = place.model("v1alpha1")
    place.must("install", values={"crds": {"install": False}})

    refused = place.helm("upgrade")
    assert "exists and cannot be imported into the current release" in refused.stderr, refused
    owner = ("meta.helm.sh/release-name=lockstep", "meta.helm.sh/release-namespace=lockstep-system")
    place.kubectl("label", "crd", NAME, "app.kubernetes.io/managed-by=Helm")
    place.kubectl("annotate", "crd", NAME, *owner)
    place.must("upgrade", "--force-conflicts")
    place.until_served("v1beta1")

    alpha, beta = place.model("v1alpha1"), place.model("v1beta1")
    assert (alpha["metadata"]["uid"], alpha["spec"]) == (before["metadata"]["uid"], before["spec"])
    assert alpha["metadata"]["resourceVersion"] == before["metadata"]["resourceVersion"], "nothing was written"
    assert beta["apiVersion"] == "lockstep.dev/v1beta1"
    assert (beta["spec"], beta["metadata"]["uid"]) == (before["spec"], before["metadata"]["uid"])


def test_a_model_is_one_in_both_versions_and_outlives_the_release(place: ChartPlace) -> None:
    place.must("install")
    place.until_served("v1beta1")
    model = manifest("default", "chat", tiny_chat())
    place.apply(model)
    generation = place.model("v1beta1")["metadata"]["generation"]
    place.apply(model | {"apiVersion": "lockstep.dev/v1beta1"})
    assert place.model("v1alpha1")["metadata"]["generation"] == generation, "the version alone changes nothing"
    place.apply(manifest("default", "chat", tiny_chat(replicas=3)) | {"apiVersion": "lockstep.dev/v1beta1"})
    assert place.model("v1alpha1")["spec"]["replicas"] == 3

    place.uninstall()
    assert place.model("v1beta1")["spec"]["replicas"] == 3
    place.must("install")
    assert place.model("v1beta1")["spec"]["replicas"] == 3
    place.apply(older_crd(), "--force-conflicts")
    assert place.model("v1alpha1")["spec"]["replicas"] == 3
