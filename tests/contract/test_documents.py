"""What the documents say exists: links lead somewhere, `make` targets are there, models are of the CRD."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from dev import import_graph
from dev.crd_reference import reference
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from tests.support.chart import CHART, CRD_SOURCE, LEAST_VALUES, ROOT, helm
from tests.support.command_line import options
from tests.support.engine_stats import IDLE

from lockstep_operator.decisions import fault_detection, recovery_budget
from lockstep_operator.decisions import recovery_policy as operator_recovery
from lockstep_operator.reporting.metrics import Metrics as OperatorMetrics
from lockstep_operator.types import spec_blocks
from lockstep_operator.types.reasons import EventReason, Reason
from lockstep_operator.types.recovery_state import Rung as OperatorRung
from lockstep_runtime.api.metrics import Metrics as EngineMetrics
from lockstep_runtime.protocol.chaos import Injection
from lockstep_runtime.protocol.status import Fault
from lockstep_runtime.recovery import policy, timing, watchdog
from lockstep_runtime.recovery.log_trail import TrailPhase
from lockstep_runtime.sources.model_config import Architecture
from lockstep_runtime.supervisor import state_machine
from lockstep_runtime.worker import scrub

DOCUMENTS: Final = sorted((*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "operator" / "README.md"))
CRD: Final = yaml.safe_load(CRD_SOURCE.read_text())
SCHEMA: Final = CRD["spec"]["versions"][0]["schema"]["openAPIV3Schema"]


def _slug(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _anchors(path: Path) -> set[str]:
    return {_slug(heading) for heading in re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)}


def _links(path: Path) -> list[str]:
    found = re.findall(r"\]\(([^)\s]+)\)", path.read_text())
    return [link for link in found if not re.match(r"[a-z]+:", link)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for link in _links(document):
        name, _, anchor = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        assert target.exists(), f"{link} does not exist"
        assert not anchor or anchor in _anchors(target), f"{link}: no such heading"


BASES: Final = (ROOT, ROOT / "runtime" / "lockstep_runtime", ROOT / "operator" / "lockstep_operator")


def _paths(document: Path) -> set[str]:
    """Folders and modules that it names as such; a dotted ending is no path."""
    return set(re.findall(r"`([\w.-]+(?:/[\w.-]+)*(?:/|\.(?:py|md)))`", document.read_text()))


def test_every_decision_is_listed() -> None:
    folder = ROOT / "docs" / "decisions"
    assert sorted(_links(folder / "README.md")) == sorted(
        path.name for path in folder.glob("*.md") if path.stem != "README"
    )


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_folders_are_there(document: Path) -> None:
    folders = (*BASES, document.parent)
    assert [name for name in sorted(_paths(document)) if not any((base / name).exists() for base in folders)] == []


def test_documents_name_files_to_check() -> None:
    assert len(_paths(ROOT / "docs" / "architecture.md")) > 60


@pytest.mark.parametrize("document", ["README.md", "docs/models.md"])
def test_the_models_are_those_that_there_are(document: str) -> None:
    rows = re.findall(r"^\|.*\|$", (ROOT / document).read_text(), re.MULTILINE)
    assert sorted(re.findall(r"`(\w+For\w+)`", "".join(rows))) == sorted(Architecture)


def _targets() -> set[str]:
    texts = [path.read_text() for path in (ROOT / "Makefile", *ROOT.glob("*/*.mk"))]
    return {name for text in texts for name in re.findall(r"^([a-z][a-z-]*):", text, re.MULTILINE)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_make_targets_are_there(document: Path) -> None:
    named = re.findall(r"(?:^\$ |`)make ([a-z][a-z-]*)", document.read_text(), re.MULTILINE)
    assert sorted(set(named) - _targets()) == []


def _models() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every TensorParallelModel that a reader may apply: in fenced blocks, in examples, in what helm prints."""
    for document in DOCUMENTS:
        for number, block in enumerate(re.findall(r"```yaml\n(.*?)```", document.read_text(), re.DOTALL)):
            if "kind: TensorParallelModel" in block:
                yield f"{document.relative_to(ROOT)}#{number}", yaml.safe_load(block)
    for example in sorted((ROOT / "examples").glob("*.yaml")):
        for model in yaml.safe_load_all(example.read_text()):
            if model["kind"] == "TensorParallelModel":
                yield example.name, model


def _unknown(schema: dict[str, Any], value: object, path: str) -> Iterator[str]:
    """Fields that the schema has no place for, and required ones that are missing."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _unknown(schema.get("items", {}), item, f"{path}[{index}]")
    if not isinstance(value, dict) or "properties" not in schema:
        return
    yield from (f"{path}.{name} is missing" for name in schema.get("required", []) if name not in value)
    for name, item in value.items():
        if name in schema["properties"]:
            yield from _unknown(schema["properties"][name], item, f"{path}.{name}")
        elif not schema.get("x-kubernetes-preserve-unknown-fields"):
            yield f"{path}.{name} is unknown"


@pytest.mark.parametrize(("place", "model"), [pytest.param(place, model, id=place) for place, model in _models()])
def test_models_are_of_the_crd(place: str, model: dict[str, Any]) -> None:
    assert model["apiVersion"] == "lockstep.dev/v1beta1"
    assert list(_unknown({**SCHEMA, "required": ["metadata", "spec"]}, model, place)) == []


@pytest.mark.parametrize("namespaces", [[], ["team-a", "team-b"]])
def test_the_model_that_helm_prints_is_of_the_crd(namespaces: list[str], tmp_path: Path) -> None:
    chart = shutil.copytree(CHART, tmp_path / "lockstep")
    metadata = (chart / "Chart.yaml").read_text()
    # Without a cluster helm takes itself for an old Kubernetes.
    (chart / "Chart.yaml").write_text(re.sub(r"^kubeVersion:.*\n", "", metadata, flags=re.MULTILINE))
    options = ["--dry-run=client", "-f", LEAST_VALUES, "-f", "-"]
    result = helm("install", "mine", str(chart), *options, stdin=json.dumps({"watchNamespaces": namespaces}))
    assert result.returncode == 0, result.stderr
    notes = textwrap.dedent(result.stdout.partition("<<YAML\n")[2].partition("    YAML\n")[0])
    model = yaml.safe_load(notes)
    assert list(_unknown({**SCHEMA, "required": ["metadata", "spec"]}, model, "notes")) == []
    assert model["metadata"].get("namespace") == (namespaces[0] if namespaces else None)


def test_the_reference_is_written_from_the_crd() -> None:
    page = (ROOT / "docs" / "crd.md").read_text()
    assert page == reference(CRD), "write it anew: .venv/bin/python -m dev.crd_reference > docs/crd.md"


def test_the_picture_is_drawn_from_the_code() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    assert page == import_graph.drawn_into(page, import_graph.current()), "draw it anew: make picture"
    assert page.partition(import_graph.BEGIN)[2].startswith("\n```mermaid\n")


def test_arrows_that_follow_from_others_are_not_drawn() -> None:
    rooms = {"a": frozenset("bcd"), "b": frozenset("c"), "c": frozenset("d"), "d": frozenset[str]()}
    assert import_graph.reduced(rooms) == {"a": {"b"}, "b": {"c"}, "c": {"d"}, "d": set()}


def test_the_checker_of_models_can_say_no() -> None:
    model = {"kind": "x", "spec": {"model": {"huggingFace": {}}, "replica": 1}}
    assert set(_unknown(SCHEMA, model, "m")) == {
        "m.spec.tensorParallelSize is missing",
        "m.spec.model.huggingFace.repo is missing",
        "m.spec.replica is unknown",
    }


def test_every_reason_is_explained() -> None:
    explained = set(re.findall(r"`([A-Z][A-Za-z]+)`", (ROOT / "docs" / "troubleshooting.md").read_text()))
    assert sorted({*Reason, *EventReason} - explained) == []
    assert sorted({str(fault) for fault in Fault} - explained) == []


def _exposed(text: str) -> set[str]:
    """Names of the metrics in an exposition, without a histogram's parts and the times when counters began."""
    families = [family for family in text_string_to_metric_families(text) if not family.name.endswith("_created")]
    return {family.name + "_total" * (family.type == "counter") for family in families}


def test_metrics_are_exposed() -> None:
    named = set(re.findall(r"`(lockstep_[a-z0-9_]+)`", (ROOT / "docs" / "install.md").read_text()))
    operator = generate_latest(OperatorMetrics().registry).decode()
    engine = EngineMetrics("m", lambda: IDLE).render().decode()
    exposed = _exposed(operator) | _exposed(engine)
    assert sorted(named ^ exposed) == []


def test_every_alert_is_listed_with_its_severity() -> None:
    groups = yaml.safe_load((CHART / "files" / "alerts.yaml").read_text())["groups"]
    alerts = {(rule["alert"], rule["labels"]["severity"]) for group in groups for rule in group["rules"]}
    rows = re.findall(r"^\| `(Lockstep\w+)` \| (\w+) \|", (ROOT / "docs" / "install.md").read_text(), re.MULTILINE)
    assert set(rows) == alerts


def _commands(document: Path) -> list[str]:
    """What a reader is told to give to `lockstep`."""
    found = re.findall(r"lockstep ((?:serve|inject|report) [^`|#>\n]+)", document.read_text())
    return [words for words in found if not re.search(r"[A-Z]{3,}|…|--help", words)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_are_of_the_command_line(document: Path) -> None:
    for words in _commands(document):
        options(shlex.split(words))


def test_documents_name_commands_to_check() -> None:
    assert sum(len(_commands(document)) for document in DOCUMENTS) >= 4


RECOVERY: Final = (ROOT / "docs" / "recovery.md").read_text()


def test_every_fault_on_purpose_is_explained() -> None:
    rows = RECOVERY.partition("| `lockstep inject …` |")[2].partition("\n\n")[0].splitlines()[2:]
    named = [words for row in rows for words in re.findall(r"`([^`]+)`", row.split("|")[1])]
    kinds = [
        options(shlex.split(f"inject {words}{'' if '--rank' in words else ' --rank 0'}"))["kind"] for words in named
    ]
    assert sorted(kinds) == sorted(Injection)


def test_every_fault_and_rung_has_its_place() -> None:
    rows = set(re.findall(r"^\| `([A-Za-z]+)` \|", RECOVERY, re.MULTILINE))
    assert {str(fault) for fault in Fault} | {str(rung) for rung in (*policy.Rung, *OperatorRung)} <= rows


@pytest.mark.parametrize(
    "words",
    [
        f"| {policy.REBUILDS}, one comes back in {policy.REBUILD_REFILL_SECONDS:g} s",
        f"| {policy.RESPAWNS}, one comes back in {policy.RESPAWN_REFILL_SECONDS:g} s",
        f"at most {watchdog.CEILING_SECONDS:g} s",
        f"gets {watchdog.WARMING_SECONDS:g} s at least",
        f"once round in {scrub.INTERVAL_SECONDS:g} s",
        f"| `budget.attempts` | {spec_blocks.DEFAULT_ATTEMPTS} |",
        f"| `budget.window` | {spec_blocks.DEFAULT_WINDOW / 3600:g}h |",
        f"| `backoff.initial` | {spec_blocks.DEFAULT_INITIAL:g}s |",
        f"| `backoff.max` | {spec_blocks.DEFAULT_MAX / 60:g}m |",
        f"not Ready for {fault_detection.HUNG_SECONDS:g} s",
        f"A step has {operator_recovery.PATIENCE_SECONDS:g} s",
        f"within {operator_recovery.UNPLACED_SECONDS:g} s, the node is used again",
        f"has served for {recovery_budget.PROVED_SECONDS:g} s",
        f"a rank leaves its collective | {timing.HOST.abort:g} s, or as long as its step takes; "
        f"{timing.NCCL.abort:g} s on NCCL. {timing.HOST.abort_joining:g} s if it was joining; "
        f"{timing.NCCL.abort_joining:g} s on NCCL |",
        f"a rank whose connection is lost comes back | {timing.RECONNECT_SECONDS:g} s |",
        f"a process that was killed ends | {timing.DEATH_SECONDS:g} s |",
        f"| {timing.LOADING_SECONDS:g} s at first; later twice as long as loading took, "
        f"{timing.RELOADING_SECONDS[0]:g} s at least, {timing.RELOADING_SECONDS[1]:g} s at most |",
        f"| {timing.FIRST_SECONDS:g} s at first; later two and a half times that, {timing.STUCK_SECONDS[0]:g} s at "
        f"least, {timing.STUCK_SECONDS[1]:g} s at most |",
        f"a rank that is out of reach | {timing.FIRST_SECONDS:g} s at first, {timing.ABSENT_SECONDS:g} s later |",
        f"{timing.HOST.attempts:g} s of failed attempts in a row, {timing.NCCL.attempts:g} s on NCCL |",
        f"config.json | that | {timing.MODEL_SECONDS:g} s |",
        f"| {timing.POISONED_SECONDS[0]:g} s, doubling up to {timing.POISONED_SECONDS[1]:g} s |",
        f"{state_machine.SLOW_BACKOFF:g} s at least where only a change",
        f"for the first {timing.ACCEPTING_SECONDS:g} s of a recovery",
        f"is asked again for {timing.ROOM_SECONDS:g} s",
    ],
)
def test_bounds_of_recovery_are_those_of_the_code(words: str) -> None:
    assert words in " ".join(RECOVERY.split())


def test_every_line_of_the_log_trail_is_explained() -> None:
    trail = RECOVERY.partition("## The log trail")[2].partition("\n## ")[0]
    rows = [row.split("|")[1] for row in trail.splitlines() if row.startswith("| `")]
    assert {name for row in rows for name in re.findall(r"`(\w+):`", row)} == set(TrailPhase)
