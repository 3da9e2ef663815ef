"""What is made for other projects, asked of those projects' own schemas: an API server of its own has them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from tests.support import kubectl
from tests.support.chart import render
from tests.support.second_api_server import second_api_server
from tests.support.wait import until

SCHEMAS: Final = kubectl.ROOT / ".dev" / "schemas"
EXAMPLES: Final = kubectl.ROOT / "examples"
SERVED_SECONDS: Final = 60.0
FOREIGN: Final = ("autoscaling/keda.yaml", "gateway/inference-pool.yaml", "mesh/istio.yaml")
MONITORS: Final = ("ServiceMonitor", "PodMonitor", "PrometheusRule")

Object = dict[str, Any]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The kubeconfig of an API server that serves the projects' kinds."""
    with second_api_server(tmp_path_factory.mktemp("other-projects")) as kubeconfig:
        found = [one for path in sorted(SCHEMAS.glob("*.yaml")) for one in yaml.safe_load_all(path.read_text())]
        schemas = [one for one in found if one and one.get("kind") == "CustomResourceDefinition"]
        _kubectl(kubeconfig, "apply", "--server-side", "-f", "-", stdin=yaml.safe_dump_all(schemas))
        names = [f"crd/{one['metadata']['name']}" for one in schemas]
        _kubectl(kubeconfig, "wait", "--for=condition=Established", *names, "--timeout=60s")
        until("all kinds to be served", lambda: _served(kubeconfig) >= _kinds(schemas), SERVED_SECONDS)
        yield kubeconfig


@pytest.mark.parametrize("path", FOREIGN)
def test_an_example_is_what_the_project_asks_for(server: Path, path: str) -> None:
    told = _apply(server, list(yaml.safe_load_all((EXAMPLES / path).read_text())))
    assert told


def test_the_charts_monitors_and_rules_are_what_the_prometheus_operator_asks_for(server: Path) -> None:
    values = {kind[0].lower() + kind[1:]: {"enabled": True} for kind in MONITORS}
    made = [one for one in render({"metrics": values}) if one["kind"] in MONITORS]
    assert len(made) == len(MONITORS)
    _kubectl(server, "create", "namespace", made[0]["metadata"]["namespace"])
    _apply(server, made)


def test_an_unknown_field_is_refused(server: Path) -> None:
    """Else the tests above would say nothing."""
    (policy,) = yaml.safe_load_all((EXAMPLES / "mesh/istio.yaml").read_text())
    policy["spec"]["rulez"] = []
    with pytest.raises(kubectl.KubectlError, match="rulez"):
        _apply(server, [policy])


def _apply(kubeconfig: Path, manifests: list[Object]) -> str:
    options = ("--dry-run=server", "--validate=strict", "-f", "-")
    return _kubectl(kubeconfig, "apply", *options, stdin=yaml.safe_dump_all(manifests))


def _kubectl(kubeconfig: Path, *arguments: str, stdin: str | None = None) -> str:
    return kubectl.kubectl(f"--kubeconfig={kubeconfig}", *arguments, stdin=stdin)


def _served(kubeconfig: Path) -> set[str]:
    return set(_kubectl(kubeconfig, "api-resources", "-o", "name").split())


def _kinds(schemas: list[Object]) -> set[str]:
    return {str(one["metadata"]["name"]) for one in schemas}
