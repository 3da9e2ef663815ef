"""Runs the project's own helm on the chart and hands back what it renders."""

from __future__ import annotations

import functools
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

ROOT: Final = Path(__file__).parents[2]
CHART: Final = ROOT / "charts" / "lockstep"
CRD_SOURCE: Final = CHART / "files" / "crd.yaml"  # of which the chart makes both versions
HELM: Final = ROOT / ".dev" / "bin" / "helm"
OLDEST_KUBERNETES: Final = "1.29.0"  # the chart says so itself
RELEASE: Final = "lockstep"
NAMESPACE: Final = "lockstep-system"
LEAST_VALUES: Final = str(CHART / "ci" / "test-values.yaml")

Manifest = dict[str, Any]
_NO_GAMEDAY: Final = {"tests": {"gameday": {"enabled": False}}}


def helm(*arguments: str, stdin: str | None = None, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Runs helm. Without a built one the test fails: a chart that nobody rendered is not a tested chart."""
    if not HELM.exists():
        pytest.fail(f"{HELM.relative_to(ROOT)} is missing: `make cluster-up` builds it")
    return subprocess.run([HELM, *arguments], input=stdin, capture_output=True, text=True, timeout=timeout, check=False)


def template(
    values: Mapping[str, Any] | None = None, *options: str, release: str = RELEASE
) -> subprocess.CompletedProcess[str]:
    """`helm template` of the chart with these values laid over its own and the least that must be set. What `helm test`
    breaks is left out unless they ask for it: it is not part of what is installed."""
    return _template(json.dumps({**_NO_GAMEDAY, **(values or {})}), options, release)


@functools.cache
def _template(values: str, options: tuple[str, ...], release: str) -> subprocess.CompletedProcess[str]:
    """Cached: many tests look at the same manifests, and helm takes a quarter of a second to start."""
    command = ["template", release, str(CHART), "--namespace", NAMESPACE, "--kube-version", OLDEST_KUBERNETES]
    return helm(*command, *options, "-f", LEAST_VALUES, "-f", "-", stdin=values)


def render(values: Mapping[str, Any] | None = None, *options: str, release: str = RELEASE) -> list[Manifest]:
    """The manifests that these values make. Fails the test with helm's words if they make none."""
    result = template(values, *options, release=release)
    assert result.returncode == 0, result.stderr
    return [document for document in yaml.safe_load_all(result.stdout) if document]


def of_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["kind"] == kind]


def one(manifests: list[Manifest], kind: str) -> Manifest:
    """The only manifest of its kind."""
    found = of_kind(manifests, kind)
    assert len(found) == 1, f"{len(found)} of kind {kind} instead of one"
    return found[0]


def pod_specs(manifests: list[Manifest]) -> dict[str, Manifest]:
    """Every pod spec in the manifests, by "<kind>/<name>", whatever carries it."""
    specs = {}
    for manifest in manifests:
        spec = manifest.get("spec") or {}
        if manifest["kind"] != "Pod":
            spec = spec.get("jobTemplate", {}).get("spec", spec)
            spec = (spec.get("template") or {}).get("spec") or {}
        if "containers" in spec:
            specs[f"{manifest['kind']}/{manifest['metadata']['name']}"] = spec
    return specs
