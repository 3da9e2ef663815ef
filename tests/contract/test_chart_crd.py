"""The CRD as the chart installs it: both versions of one source, kept over an uninstall, small enough for a release."""

from __future__ import annotations

import base64
import gzip
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.support.chart import CHART, CRD_SOURCE, LEAST_VALUES, Manifest, helm, of_kind, one, render

from lockstep_operator.types.names import VERSION

SOURCE: Manifest = yaml.safe_load(CRD_SOURCE.read_text())
RELEASE_LIMIT = 1024 * 1024  # bytes of a Secret, in which Helm keeps a release
KIND = "CustomResourceDefinition"


def crd(values: dict[str, Any] | None = None) -> Manifest:
    return one(render(values), KIND)


def test_both_versions_are_the_source_but_for_name_and_storage() -> None:
    (source,) = SOURCE["spec"]["versions"]
    alpha, beta = crd()["spec"]["versions"]
    assert alpha == source
    assert beta == source | {"name": "v1beta1", "storage": False}
    assert (alpha["name"], alpha["storage"]) == ("v1alpha1", True)
    assert {**crd()["spec"], "versions": [source]} == SOURCE["spec"] | {"conversion": {"strategy": "None"}}


def test_the_operator_reads_the_stored_version() -> None:
    (stored,) = (version["name"] for version in crd()["spec"]["versions"] if version["storage"])
    assert stored == VERSION


def test_helm_upgrades_it_with_the_release() -> None:
    assert not (CHART / "crds").exists(), "Helm installs what is there once and never upgrades it"
    assert crd()["metadata"]["name"] == SOURCE["metadata"]["name"]


@pytest.mark.parametrize("keep", [True, False])
def test_uninstalling_leaves_it_unless_told_otherwise(keep: bool) -> None:
    annotations = crd({"crds": {"keep": keep}})["metadata"].get("annotations", {})
    assert annotations == ({"helm.sh/resource-policy": "keep"} if keep else {})


def test_it_can_be_left_to_somebody_else() -> None:
    assert not of_kind(render({"crds": {"install": False}}), KIND)


def test_the_release_fits_its_secret_twice_over(tmp_path: Path) -> None:
    chart = shutil.copytree(CHART, tmp_path / "lockstep")
    metadata = (chart / "Chart.yaml").read_text()
    # Without a cluster helm takes itself for an old Kubernetes.
    (chart / "Chart.yaml").write_text(re.sub(r"^kubeVersion:.*\n", "", metadata, flags=re.MULTILINE))
    result = helm("install", "mine", str(chart), "--dry-run=client", "--output=json", "-f", LEAST_VALUES)
    assert result.returncode == 0, result.stderr
    release = json.dumps(json.loads(result.stdout)).encode()
    # Helm stores base64 of gzip, and a Secret's data is base64 again.
    size = len(base64.b64encode(base64.b64encode(gzip.compress(release))))
    print(f"the release takes {size / 1024:.0f} KiB of {RELEASE_LIMIT / 1024:.0f}")
    assert size < RELEASE_LIMIT / 2
