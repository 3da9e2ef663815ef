"""Prometheus itself, on this machine: it scrapes what it is told to, and is asked by HTTP."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
import yaml
from tests.support.http import HTTP
from tests.support.kubectl import ROOT
from tests.support.ports import free_port
from tests.support.wait import until

PROGRAM: Final = ROOT / ".dev" / "bin" / "prometheus"
UP_SECONDS: Final = 30.0
DOWN_SECONDS: Final = 20.0

Series = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Prometheus:
    url: str

    def ask(self, expression: str) -> list[Series]:
        """What the expression gives now: the series, each with `metric` (labels) and `value`."""
        return list(self._get("query", query=expression)["result"])

    def labelled(self, label: str, selector: str) -> set[str]:
        """The values of a label, as Grafana's label_values(selector, label) asks for them."""
        return {series[label] for series in self._get("series", **{"match[]": selector}) if label in series}

    def targets(self) -> list[Series]:
        return list(self._get("targets", state="active")["activeTargets"])

    def _get(self, what: str, **parameters: str) -> Any:
        answer = HTTP.get(f"{self.url}/api/v1/{what}", params=parameters)
        assert answer.status_code == 200, f"{parameters}: {answer.text}"
        return answer.json()["data"]

    def is_ready(self) -> bool:
        try:
            return HTTP.get(f"{self.url}/-/ready").status_code == 200
        except httpx.TransportError:
            return False


@contextmanager
def prometheus(jobs: Sequence[Mapping[str, Any]], folder: Path) -> Iterator[Prometheus]:
    """A running one with these scrape configurations; `folder` is for its data and log."""
    if not PROGRAM.exists():
        pytest.fail(f"{PROGRAM.relative_to(ROOT)} is missing: `make .dev/bin/prometheus` gets it")
    config, log, address = folder / "prometheus.yaml", folder / "log", f"127.0.0.1:{free_port()}"
    config.write_text(yaml.safe_dump({"scrape_configs": [dict(job) for job in jobs]}))
    options = {"config.file": config, "storage.tsdb.path": folder / "data", "web.listen-address": address}
    command = [str(PROGRAM), *(f"--{name}={value}" for name, value in options.items())]
    server = Prometheus(f"http://{address}")
    with log.open("wb") as output, subprocess.Popen(command, cwd=folder, stdout=output, stderr=output) as process:
        try:
            until("Prometheus", server.is_ready, UP_SECONDS, lambda: log.read_text()[-4000:])
            yield server
        finally:
            process.terminate()
            try:
                process.wait(DOWN_SECONDS)
            finally:
                process.kill()
