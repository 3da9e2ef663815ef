"""The chart's alerts, played by Prometheus' own promtool: each fires when and for whom it should, and else is quiet."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.support.chart import ROOT, one, render

PROMTOOL = ROOT / ".dev" / "bin" / "promtool"
CASES: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "alerts.yaml").read_text())
GROUPS: list[dict[str, Any]] = one(render({"metrics": {"prometheusRule": {"enabled": True}}}), "PrometheusRule")[
    "spec"
]["groups"]


def promtool(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    if not PROMTOOL.exists():
        pytest.fail(f"{PROMTOOL.relative_to(ROOT)} is missing: `make .dev/bin/promtool` gets it")
    return subprocess.run([PROMTOOL, *arguments], cwd=folder, capture_output=True, text=True, timeout=60, check=False)


def play(cases: dict[str, Any], folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "rules.yaml").write_text(yaml.safe_dump({"groups": GROUPS}))
    (folder / "cases.yaml").write_text(yaml.safe_dump(cases))
    return promtool("test", "rules", "cases.yaml", folder=folder)


def expectations() -> Iterator[tuple[str, bool]]:
    for case in CASES["tests"]:
        yield from ((check["alertname"], bool(check.get("exp_alerts"))) for check in case["alert_rule_test"])


def test_prometheus_takes_the_rules(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": GROUPS}))
    checked = promtool("check", "rules", "--lint=all", "--lint-fatal", "rules.yaml", folder=tmp_path)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_alerts_fire_when_they_should_and_are_quiet_else(tmp_path: Path) -> None:
    played = play(CASES, tmp_path)
    assert played.returncode == 0, played.stdout + played.stderr


def test_every_alert_is_seen_firing_and_quiet() -> None:
    alerts = {rule["alert"] for group in GROUPS for rule in group["rules"]}
    assert {(alert, fires) for alert in alerts for fires in (True, False)} == set(expectations())


def test_promtool_can_say_no(tmp_path: Path) -> None:
    first = CASES["tests"][0]
    quiet = {**first, "alert_rule_test": [{"eval_time": "13m", "alertname": "LockstepModelUnavailable"}]}
    played = play({**CASES, "tests": [quiet]}, tmp_path)
    assert played.returncode != 0
    assert "LockstepModelUnavailable" in played.stdout + played.stderr
